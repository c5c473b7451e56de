"""Authentication and authorization of real processes."""

import base64
import hashlib
import hmac
import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import pytest
import requests
from instances import new_instance
from issuer import AUDIENCE, ISSUER, Issuer, Key, issuing
from openapi_spec_validator import validate
from service import STOWGATE, Service, environment, running, wait_for

from api.auth.basic import user_line
from api.http.routes import Scope

PASSWORD = "correct-horse-battery"
PUBLIC = [("GET", "/health/live"), ("GET", "/health/ready"), ("GET", "/openapi.json")]
GUARDED = [
    ("POST", "/dicomweb/studies", Scope.STORE),
    ("POST", "/dicomweb/studies/1.2.3", Scope.STORE),
    ("POST", "/dicomweb/w-1/studies", Scope.STORE),
    ("POST", "/dicomweb/w-1/studies/1.2.3", Scope.STORE),
    ("POST", "/dicomweb/vae/AE-1/studies", Scope.STORE),
    ("POST", "/dicomweb/vae/AE-1/studies/1.2.3", Scope.STORE),
    ("POST", "/dicomweb/vae/AE-1/w-1/studies", Scope.STORE),
    ("POST", "/dicomweb/vae/AE-1/w-1/studies/1.2.3/", Scope.STORE),
    ("POST", "//dicomweb//studies//", Scope.STORE),
    ("GET", "/payloads", Scope.READ),
    ("HEAD", "/payloads", Scope.READ),
    ("GET", "/payloads/x", Scope.READ),
    ("POST", "/payloads/x/replay", Scope.ADMIN),
    ("GET", "/config/vae", Scope.READ),
    ("GET", "/config/vae/x", Scope.READ),
    ("GET", "/config/vae/plug-ins", Scope.READ),
    ("POST", "/config/vae", Scope.ADMIN),
    ("PUT", "/config/vae", Scope.ADMIN),
    ("DELETE", "/config/vae/x", Scope.ADMIN),
    ("GET", "/metrics", Scope.READ),
]

Ask = Callable[..., requests.Response]


def asking(service: Service) -> Ask:
    def ask(method: str, path: str, **arguments: Any) -> requests.Response:
        return requests.request(method, service.url + path, timeout=60, **arguments)

    return ask


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def key() -> Key:
    return Key("first")


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory, key: Key) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("jwt")
    (folder / "issuer.pem").write_bytes(key.pem())
    with running(
        "run",
        folder,
        STOWGATE_AUTH="jwt",
        STOWGATE_JWT_KEYS=str(folder / "issuer.pem"),
        STOWGATE_JWT_ISSUER=ISSUER,
        STOWGATE_JWT_AUDIENCE=AUDIENCE,
        STOWGATE_METRICS_OPEN="false",
    ) as service:
        yield service


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("users") / "users"
    file.write_text(
        "# users\n\n"
        + user_line("all", list(Scope), PASSWORD)
        + "\n"
        + user_line("bound", [Scope.STORE], PASSWORD, ["AE-1", "AE-2", "AE-3/w-9"])
        + "\n"
    )
    return file


@pytest.fixture(scope="module")
def by_password(tmp_path_factory: pytest.TempPathFactory, users: Path) -> Iterator[Service]:
    with running(
        "run",
        tmp_path_factory.mktemp("basic"),
        STOWGATE_AUTH="basic",
        STOWGATE_USERS=str(users),
    ) as service:
        yield service


@pytest.mark.parametrize(("method", "path", "scope"), GUARDED)
def test_an_endpoint_requires_its_scope(
    by_token: Service, key: Key, method: str, path: str, scope: Scope
) -> None:
    ask = asking(by_token)
    others = " ".join(f"stowgate:{other}" for other in Scope if other is not scope)

    anonymous = ask(method, path)
    without = ask(method, path, headers=bearer(key.token(scope=others)))
    having = ask(method, path, headers=bearer(key.token(scope=f"stowgate:{scope}")))

    assert (anonymous.status_code, without.status_code) == (401, 403)
    assert anonymous.headers["WWW-Authenticate"] == 'Bearer realm="stowgate"'
    assert without.headers["WWW-Authenticate"] == (
        f'Bearer realm="stowgate", error="insufficient_scope", scope="stowgate:{scope}"'
    )
    assert having.status_code not in (401, 403)
    for refusal in (anonymous, without):
        assert refusal.headers["Content-Type"] == "application/problem+json"
        assert ("X-Correlation-ID" in refusal.headers) == (scope is Scope.STORE)
        if method != "HEAD":
            assert refusal.json()["detail"]


def test_a_vae_shows_who_created_and_who_changed_it(by_token: Service, key: Key) -> None:
    ask = asking(by_token)
    maker, changer = (bearer(key.token(scope="stowgate:admin", sub=n)) for n in ("ada", "bo"))

    made = ask("POST", "/config/vae", json={"virtualAeTitle": "MADE"}, headers=maker).json()
    changed = ask("PUT", "/config/vae", json={"name": "MADE"}, headers=changer).json()

    assert (made["createdBy"], made.get("updatedBy")) == ("ada", None)
    assert (changed["createdBy"], changed["updatedBy"]) == ("ada", "bo")


def test_every_operation_of_the_openapi_document_is_tested_here(by_token: Service) -> None:
    document = json.loads(by_token.get("/openapi.json").content)

    validate(document)
    guarded = {
        (method.upper(), path, operation["security"][0]["bearer"][0])
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method != "parameters" and "security" in operation
    }
    assert len(guarded) == len(GUARDED) - 2  # without the two other spellings
    assert ("DELETE", "/config/vae/{name}", "admin") in guarded
    described = document["paths"]["/payloads"]["get"]
    assert {"401", "403"} <= set(described["responses"])
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


@pytest.mark.parametrize(("method", "path"), PUBLIC)
def test_health_and_the_openapi_document_are_public(
    by_token: Service, method: str, path: str
) -> None:
    assert asking(by_token)(method, path).status_code == 200


def test_metrics_are_open_by_default(by_password: Service) -> None:
    assert by_password.get("/metrics").status_code == 200


def test_a_missing_path_is_404_or_405_without_credentials_too(by_token: Service) -> None:
    ask = asking(by_token)

    assert ask("GET", "/nowhere").status_code == 404
    assert ask("GET", "/dicomweb/studies").status_code == 405
    assert ask("OPTIONS", "/dicomweb/studies").status_code == 204


def forged_with_the_public_key(key: Key) -> str:
    """Sign with HS256 and the PEM as the secret, which PyJWT refuses to do."""

    def part(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    _, payload, _ = key.token(scope="stowgate:read").encode().split(b".")
    signed = part(b'{"alg":"HS256","typ":"JWT","kid":"first"}') + b"." + payload
    return (signed + b"." + part(hmac.digest(key.pem(), signed, hashlib.sha256))).decode()


def tampered(token: str) -> str:
    head, _, signature = token.split(".")
    claims = {"sub": "x", "iss": ISSUER, "aud": AUDIENCE, "exp": 9999999999, "scope": "a"}
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"{head}.{payload}.{signature}"


def nested_header() -> str:
    head = base64.urlsafe_b64encode(b"[" * 6000).rstrip(b"=").decode()
    return f"{head}.e30.e30"


NOW = int(time.time())


@pytest.mark.parametrize(
    ("token_of", "words"),
    [
        pytest.param(lambda k: k.token(signed_with=None, algorithm="none"), "algorithm", id="none"),
        pytest.param(forged_with_the_public_key, "algorithm", id="hs256-public-key"),
        pytest.param(lambda k: k.token(algorithm="RS512"), "algorithm", id="not-pinned"),
        pytest.param(lambda _: Key("first").token(), "signature", id="foreign-key"),
        pytest.param(lambda k: tampered(k.token()), "signature", id="tampered"),
        pytest.param(lambda k: k.token(aud="other"), "audience", id="audience"),
        pytest.param(lambda k: k.token(aud=None), "lacks", id="no-audience"),
        pytest.param(lambda k: k.token(iss="https://other"), "issuer", id="issuer"),
        pytest.param(lambda k: k.token(iss=None), "lacks", id="no-issuer"),
        pytest.param(lambda k: k.token(exp=NOW - 600), "expired", id="expired"),
        pytest.param(lambda k: k.token(exp=None), "lacks", id="no-expiry"),
        pytest.param(lambda k: k.token(exp=float("inf")), "malformed", id="endless"),
        pytest.param(lambda k: k.token(nbf=NOW + 86_400), "not valid yet", id="not-yet"),
        pytest.param(lambda k: k.token(sub=None), "lacks", id="no-subject"),
        pytest.param(lambda k: k.token(sub="a\nb"), "printable", id="forged-line"),
        pytest.param(lambda k: k.token(stowgate_vaes=7), "list of strings", id="vaes"),
        pytest.param(lambda k: k.token(stowgate_source=7), "its source is not valid", id="source"),
        pytest.param(
            lambda k: k.token(stowgate_source="x" * 16), "a source is 1 to 15", id="long-source"
        ),
        pytest.param(lambda _: "a.b.c", "malformed", id="nonsense"),
        pytest.param(lambda _: nested_header(), "malformed", id="nested"),
    ],
)
def test_an_invalid_token_is_rejected_with_the_reason(
    by_token: Service, key: Key, token_of: Callable[[Key], str], words: str
) -> None:
    answer = asking(by_token)("GET", "/payloads", headers=bearer(token_of(key)))

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="stowgate", error="invalid_token"'
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer ",
        "Bearer a=b",
        "Basic YTpi",
        "Negotiate x",
        "\xe9",
        "Basic \xe9",
        "x" * 999,
    ],
)
def test_credentials_of_another_scheme_are_ignored(by_token: Service, header: str) -> None:
    answer = asking(by_token)(
        "GET", "/payloads", headers={"Authorization": header.encode("latin-1")}
    )

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="stowgate"'


@pytest.mark.parametrize(
    "claims_at",
    [
        pytest.param(lambda now: {"exp": now - 5, "scope": "stowgate:read"}, id="just-expired"),
        pytest.param(lambda now: {"nbf": now + 20, "scope": "stowgate:read"}, id="just-not-yet"),
        pytest.param(lambda _: {"scope": "openid stowgate:read"}, id="scope"),
        pytest.param(lambda _: {"scp": ["stowgate:read"]}, id="scp-list"),
        pytest.param(lambda _: {"scp": "x stowgate:read"}, id="scp"),
        pytest.param(lambda _: {"roles": ["stowgate:read"]}, id="roles"),
        pytest.param(
            lambda _: {"roles": {"of": "others"}, "scope": "stowgate:read"}, id="roles-of-others"
        ),
        pytest.param(
            lambda _: {"aud": ["account", AUDIENCE], "scope": "stowgate:read"}, id="audiences"
        ),
    ],
)
def test_a_token_within_the_leeway_or_with_other_claim_formats_is_accepted(
    by_token: Service, key: Key, claims_at: Callable[[int], dict[str, Any]]
) -> None:
    token = key.token(**claims_at(int(time.time())))

    assert asking(by_token)("GET", "/payloads", headers=bearer(token)).status_code == 200


@pytest.mark.parametrize(
    "group",
    ["00000000-0000-0000-0000-{:012}", "CN=CT Operators {:04},OU=Radiology,DC=hospital,DC=example"],
)
def test_a_token_with_200_groups_is_accepted(by_token: Service, key: Key, group: str) -> None:
    groups = [group.format(number) for number in range(200)]
    token = key.token(scope="stowgate:read", groups=groups)

    assert asking(by_token)("GET", "/payloads", headers=bearer(token)).status_code == 200


def test_a_scope_without_the_prefix_is_ignored(by_token: Service, key: Key) -> None:
    token = key.token(scope="read store admin", roles=["admin", "read"])

    assert asking(by_token)("GET", "/payloads", headers=bearer(token)).status_code == 403


@pytest.fixture(scope="module")
def bound_vaes(by_token: Service, key: Key) -> None:
    admin = bearer(key.token(scope="stowgate:admin"))
    for vae in (
        {"virtualAeTitle": "MINE", "workflows": ["w-1", "w-2"]},
        {"virtualAeTitle": "ROUTED"},
        {"virtualAeTitle": "OTHER", "workflows": ["w-1"]},
    ):
        made = asking(by_token)("POST", "/config/vae", json=vae, headers=admin)
        assert made.status_code == 201


@pytest.mark.usefixtures("bound_vaes")
@pytest.mark.parametrize(
    ("bindings", "path", "status"),
    [
        (["MINE"], "/dicomweb/vae/MINE/studies", 200),
        (["MINE"], "/dicomweb/vae/MINE/w-1/studies/", 200),
        (["MINE"], "/dicomweb//vae//MINE//w-2//studies", 200),
        (["MINE"], "/dicomweb/vae/MINE/w-9/studies", 403),
        (["MINE"], "/dicomweb/vae/MINE/W-1/studies", 403),
        (["MINE"], "/dicomweb/vae/OTHER/studies", 403),
        (["MINE"], "/dicomweb/vae/OTHER/w-1/studies", 403),
        (["MINE"], "/dicomweb/studies", 403),
        (["MINE"], "/dicomweb/w-1/studies", 403),
        (["MINE"], "/dicomweb/MINE/studies", 403),
        (["ROUTED"], "/dicomweb/vae/ROUTED/studies", 200),
        (["ROUTED"], "/dicomweb/vae/ROUTED/w-1/studies", 403),
        (["MINE/w-9"], "/dicomweb/vae/MINE/w-9/studies", 200),
        (["MINE/w-9"], "/dicomweb/vae/MINE/w-1/studies", 403),
        (["MINE/w-9"], "/dicomweb/vae/MINE/studies", 403),
        (["MINE/None"], "/dicomweb/vae/MINE/studies", 403),
        (["None/w-1", "None"], "/dicomweb/w-1/studies", 403),
        (["MINE/w-9"], "/dicomweb/w-9/studies", 403),
        (["MINE/w-9"], "/dicomweb/vae/OTHER/w-9/studies", 403),
        ("MINE ROUTED/w-9", "/dicomweb/vae/MINE/w-1/studies", 200),
        ("MINE ROUTED/w-9", "/dicomweb/vae/ROUTED/w-9/studies", 200),
        ("MINE ROUTED/w-9", "/dicomweb/vae/MINE/w-9/studies", 403),
        (None, "/dicomweb/vae/MINE/w-9/studies", 200),
    ],
)
def test_a_bound_caller_may_only_use_its_vaes_and_their_workflows(
    by_token: Service, key: Key, bindings: Any, path: str, status: int
) -> None:
    claims = {} if bindings is None else {"stowgate_vaes": bindings}
    token = key.token(scope="stowgate:store stowgate:read", **claims)
    instance = new_instance()

    answer = asking(by_token)(
        "POST",
        path,
        data=instance,
        headers={"Content-Type": "application/dicom", **bearer(token)},
    )

    assert answer.status_code == status
    assert len(by_token.payloads_with(instance)) == (status == 200)
    # Bindings do not restrict reading.
    assert asking(by_token)("GET", "/payloads", headers=bearer(token)).status_code == 200


@pytest.mark.parametrize("claim", [[], ""])
def test_a_caller_with_empty_bindings_may_store_nowhere(
    by_token: Service, key: Key, claim: Any
) -> None:
    token = key.token(scope="stowgate:store", stowgate_vaes=claim)

    answer = asking(by_token)("POST", "/dicomweb/vae/MINE/studies", headers=bearer(token))

    assert answer.status_code == 403


def test_an_idempotency_key_belongs_to_its_caller(by_token: Service, key: Key) -> None:
    instance = new_instance()

    def payload_of(name: str) -> str:
        headers = {
            **bearer(key.token(sub=name, scope="stowgate:store")),
            "Content-Type": "application/dicom",
            "Idempotency-Key": "the-same",
        }
        answer = asking(by_token)("POST", "/dicomweb/studies", data=instance, headers=headers)
        assert answer.status_code == 200
        return answer.headers["X-Payload-ID"]

    assert payload_of("one") == payload_of("one")
    assert payload_of("one") != payload_of("two")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_reads_its_401_while_sending_a_large_body(
    by_password: Service, chunked: bool
) -> None:
    pieces = (bytes(1 << 20) for _ in range(32))

    answer = by_password.post(
        "/dicomweb/studies", pieces if chunked else bytes(32 << 20), "application/dicom"
    )

    assert answer.status_code == 401
    assert answer.headers["Connection"] == "close"
    assert "X-Correlation-ID" in answer.headers


def test_a_401_is_sent_before_any_of_the_body_arrives(by_password: Service) -> None:
    place = urlsplit(by_password.url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as sock:
        sock.sendall(
            b"POST /dicomweb/studies HTTP/1.1\r\nHost: s\r\nContent-Type: application/dicom\r\n"
            b"Content-Length: 1000000\r\n\r\n"
        )

        assert sock.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_user_stores_and_reads_with_a_password(by_password: Service) -> None:
    ask = asking(by_password)
    me = ("all", PASSWORD)

    stored = ask(
        "POST",
        "/dicomweb/studies",
        data=new_instance(),
        headers={"Content-Type": "application/dicom"},
        auth=me,
    )

    assert stored.status_code == 200
    shown = ask("GET", f"/payloads/{stored.headers['X-Payload-ID']}", auth=me)
    assert shown.status_code == 200


@pytest.mark.parametrize(
    "given", [("all", "wrong"), ("nobody", PASSWORD), ("all", ""), ("", ""), ("ALL", PASSWORD)]
)
def test_a_wrong_name_and_a_wrong_password_get_the_same_error(
    by_password: Service, given: tuple[str, str]
) -> None:
    answer = asking(by_password)("GET", "/payloads", auth=given)

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="stowgate", charset="UTF-8"'
    assert answer.json()["detail"] == "wrong user name or password"


@pytest.mark.parametrize("given", ["all:p\xe4ssw\xf6rter", "\xe4ll:password"])
def test_a_password_in_latin_1_is_rejected_with_a_hint_at_the_character_set(
    by_password: Service, given: str
) -> None:
    credentials = base64.b64encode(given.encode("latin-1")).decode()

    answer = asking(by_password)(
        "GET", "/payloads", headers={"Authorization": f"Basic {credentials}"}
    )

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="stowgate", charset="UTF-8"'
    assert "character set, such as Latin-1" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/dicomweb/vae/AE-3/studies", 403),
        ("/dicomweb/studies", 403),
        ("/dicomweb/vae/AE-2/studies", 400),  # no VAE has that title
        ("/dicomweb/vae/AE-3/w-9/studies", 400),
        ("/dicomweb/vae/AE-3/w-8/studies", 403),
    ],
)
def test_a_bound_user_may_only_store_to_its_vaes(
    by_password: Service, path: str, status: int
) -> None:
    answer = asking(by_password)("POST", path, data=b"x", auth=("bound", PASSWORD))

    assert answer.status_code == status
    assert asking(by_password)("GET", "/payloads", auth=("bound", PASSWORD)).status_code == 403


def test_a_valid_change_of_the_users_file_is_loaded_and_an_invalid_one_is_not(
    tmp_path: Path,
) -> None:
    file = tmp_path / "users"
    file.write_text(user_line("a", [Scope.READ], PASSWORD) + "\n")
    with running("api", tmp_path, STOWGATE_AUTH="basic", STOWGATE_USERS=str(file)) as api:

        def status(name: str) -> int:
            return asking(api)("GET", "/payloads", auth=(name, PASSWORD)).status_code

        assert (status("a"), status("b")) == (200, 401)
        file.write_text(user_line("b", [Scope.READ], PASSWORD) + "\n")
        assert (status("a"), status("b")) == (401, 200)
        file.write_text("b:read:\n")
        assert status("b") == 200
        file.unlink()
        assert status("b") == 200
        assert api.log.read_text().count("its last valid content stays in use") == 2


def test_passwords_and_tokens_are_in_no_log(by_password: Service, by_token: Service) -> None:
    mark = "secret-mark-4711"
    basic = base64.b64encode(f"all:{mark}".encode()).decode()
    token = Key("first").token(sub=mark)
    for service in (by_password, by_token):
        for header in (f"Basic {basic}", f"Bearer {token}", f"Bearer {mark}", mark):
            asking(service)("GET", "/payloads", headers={"Authorization": header})
        asking(service)("POST", "/dicomweb/studies", data=b"x", headers=bearer(mark))
        log = service.log.read_text()

        assert '"status": 401' in log
        for secret in (mark, basic, token.split(".")[1], PASSWORD):
            assert secret not in log


def test_key_rotation_is_followed_and_known_keys_work_without_the_issuer(
    tmp_path: Path, key: Key
) -> None:
    with issuing(key) as issuer, _asking_issuer(tmp_path, issuer) as api:
        status = _status_by(api)
        assert status(key) == 200
        asked = issuer.asked
        assert status(key) == 200
        assert issuer.asked == asked

        rotated = Key("second")
        issuer.keys = [rotated]
        wait_for(lambda: status(rotated) == 200)
        assert status(key) == 401

        issuer.close()
        unknown = Key("third")
        wait_for(lambda: status(unknown) == 503)
        assert status(rotated) == 200


def test_a_hung_issuer_does_not_block_callers_with_a_known_key(tmp_path: Path, key: Key) -> None:
    with (
        issuing(key) as issuer,
        _asking_issuer(tmp_path, issuer, STOWGATE_API_THREADS="4") as api,
        ThreadPoolExecutor(16) as clients,
    ):
        status = _status_by(api)
        assert status(key) == 200
        issuer.goes_on.clear()
        unknown = Key("unknown")
        wait_for(lambda: status(unknown) == 503)
        answers = [clients.submit(status, unknown) for _ in range(32)]

        for _ in range(5):
            assert status(key) == 200
            assert api.get("/health/live").status_code == 200

        assert {answer.result() for answer in answers} == {503}
        issuer.goes_on.set()
        wait_for(lambda: status(unknown) == 401)


def test_a_flood_of_unknown_keys_causes_one_fetch_in_five_seconds(tmp_path: Path, key: Key) -> None:
    with issuing(key) as issuer, _asking_issuer(tmp_path, issuer) as api:
        status = _status_by(api)
        begun = time.monotonic()
        for number in range(50):
            assert status(Key(f"unknown-{number}", key.private)) == 401
        assert issuer.asked <= 1 + (time.monotonic() - begun) / 5


def _asking_issuer(folder: Path, issuer: Issuer, **settings: str) -> Any:
    return running(
        "api",
        folder,
        STOWGATE_AUTH="jwt",
        STOWGATE_JWT_KEYS=issuer.url,
        STOWGATE_JWT_ISSUER=ISSUER,
        STOWGATE_JWT_AUDIENCE=AUDIENCE,
        **settings,
    )


def _status_by(service: Service) -> Callable[[Key], int]:
    def status(key: Key) -> int:
        token = key.token(scope="stowgate:read")
        return asking(service)("GET", "/payloads", headers=bearer(token)).status_code

    return status


def _run(*arguments: str, words: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, *arguments],
        env=environment(Path("unused"), settings),
        input=words,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["run", "api"])
def test_no_authentication_on_a_public_address_is_refused_at_start(
    command: str, tmp_path: Path
) -> None:
    started = _run(command, STOWGATE_DATA=str(tmp_path), STOWGATE_LISTEN="0.0.0.0:0")

    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert "STOWGATE_LISTEN is '0.0.0.0:0'" in line
    assert "STOWGATE_ALLOW_ANYONE" in line


def test_no_authentication_on_a_public_address_is_allowed_by_a_setting(tmp_path: Path) -> None:
    with running("api", tmp_path, STOWGATE_LISTEN="0.0.0.0:0", STOWGATE_ALLOW_ANYONE="true") as api:
        assert api.get("/payloads").status_code == 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"STOWGATE_AUTH": "basic"}, "needs STOWGATE_USERS"),
        ({"STOWGATE_AUTH": "basic", "STOWGATE_USERS": "missing"}, "could not read"),
        ({"STOWGATE_AUTH": "jwt"}, "needs STOWGATE_JWT_KEYS"),
    ],
)
def test_a_missing_setting_or_file_stops_the_start_with_one_line(
    settings: dict[str, str], words: str, tmp_path: Path
) -> None:
    started = _run("api", STOWGATE_DATA=str(tmp_path), **settings)

    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert words in line


def test_an_invalid_users_line_is_reported_by_number_and_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text(user_line("a", [Scope.READ], PASSWORD) + "\nb:read:plain-password\n")

    started = _run(
        "api", STOWGATE_DATA=str(tmp_path), STOWGATE_AUTH="basic", STOWGATE_USERS=str(file)
    )

    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert "line 2 is not" in line
    assert "plain-password" not in line


def test_an_unsigned_token_is_rejected(by_token: Service) -> None:
    """Sent without a client library, which would normalize the header."""
    place = urlsplit(by_token.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    unsigned = jwt.encode({"sub": "x", "iss": ISSUER, "aud": AUDIENCE}, "", algorithm="none")
    connection.request("GET", "/payloads", headers={"authorization": f"bEARER {unsigned}"})

    assert connection.getresponse().status == 401
    connection.close()


def test_only_readers_see_why_a_dependency_is_down(tmp_path: Path, users: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    settings = {
        "STOWGATE_AUTH": "basic",
        "STOWGATE_USERS": str(users),
        "STOWGATE_BROKER": f"amqp://guest:guest@127.0.0.1:{port}/a-virtual-host",
    }
    with running("api", tmp_path, **settings) as service:
        ask = asking(service)
        unauthorized = [
            ask("GET", "/health/ready"),
            ask("GET", "/health/ready", auth=("all", "wrong")),
            ask("GET", "/health/ready", auth=("bound", PASSWORD)),
            ask("GET", "/health/ready", headers=bearer("x")),
        ]
        reader = ask("GET", "/health/ready", auth=("all", PASSWORD))

    for answer in unauthorized:
        assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
        assert answer.json()["dependencies"]["broker"] == {"status": "down"}
        assert str(port) not in answer.text
    assert str(port) in reader.json()["dependencies"]["broker"]["detail"]
