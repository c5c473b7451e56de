"""Who sends, by name: the `source` that a workflow's `data_origins` is compared with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
from instances import new_instance
from issuer import AUDIENCE, ISSUER, Key
from service import Service, running, wait_for

from api.auth.basic import parse_users, user_line
from api.auth.watched_file import Malformed
from api.http.routes import Scope

PASSWORD = "correct-horse-battery"
ADDRESS = "127.0.0.1"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("sources")
    users = folder / "users"
    everything = list(Scope)
    users.write_text(
        f"{user_line('plain', everything, PASSWORD)}\n"
        f"{user_line('ct-1', everything, PASSWORD, source='CT_ROOM 1')}\n"
    )
    with running("run", folder, STOWGATE_AUTH="basic", STOWGATE_USERS=str(users)) as service:
        yield service


def _ask(service: Service, method: str, path: str, who: str = "plain", **given: Any) -> Any:
    answer = requests.request(method, service.url + path, auth=(who, PASSWORD), timeout=60, **given)
    assert answer.ok, answer.text
    return answer


def _vae(service: Service, source: str | None = None) -> str:
    title = f"AE-{uuid4().hex[:8]}"
    given = {} if source is None else {"source": source}
    created = _ask(service, "POST", "/config/vae", json={"virtualAeTitle": title, **given})
    assert created.json().get("source") == source
    return title


def _payload_sent(service: Service, path: str, who: str) -> Any:
    headers = {"Content-Type": "application/dicom"}
    answer = _ask(service, "POST", path, who, data=new_instance(), headers=headers)
    payload_id = answer.headers["X-Payload-ID"]
    return _ask(service, "GET", f"/payloads/{payload_id}").json()


def _source_sent(service: Service, path: str, who: str) -> str:
    return str(_payload_sent(service, path, who)["source"])


def test_a_payload_names_the_caller_that_sent_it(service: Service) -> None:
    payload = _payload_sent(service, "/dicomweb/studies", "ct-1")

    assert payload["caller"] == "ct-1"
    page = _ask(service, "GET", f"/ui/payloads/{payload['payload_id']}").text
    assert "authenticated as ct-1" in page


@pytest.mark.parametrize(
    ("who", "vae_source", "source"),
    [
        ("plain", None, ADDRESS),
        ("plain", "RADIOLOGY", "RADIOLOGY"),
        ("ct-1", None, "CT_ROOM 1"),
        ("ct-1", "RADIOLOGY", "CT_ROOM 1"),
    ],
)
def test_the_source_is_the_callers_name_else_the_vaes_else_the_address(
    service: Service, who: str, vae_source: str | None, source: str
) -> None:
    path = f"/dicomweb/vae/{_vae(service, vae_source)}/studies"

    assert _source_sent(service, path, who) == source


def test_a_callers_name_holds_without_a_vae_and_is_in_the_workflow_request(
    service: Service,
) -> None:
    headers = {"Content-Type": "application/dicom"}
    answer = _ask(
        service, "POST", "/dicomweb/studies", "ct-1", data=new_instance(), headers=headers
    )

    assert _source_sent(service, "/dicomweb/studies", "ct-1") == "CT_ROOM 1"
    request = _opened(service, answer.headers["X-Payload-ID"])["workflow_request"]
    assert request["trigger"]["source"] == "CT_ROOM 1"


def _opened(service: Service, payload_id: str) -> Any:
    def look() -> Any:
        payload = _ask(service, "GET", f"/payloads/{payload_id}").json()
        return payload if payload["state"] == "opened" else None

    return wait_for(look)


def test_the_source_of_a_vae_can_be_changed_and_taken_away(service: Service) -> None:
    title = _vae(service, "A")

    changed = _ask(service, "PUT", "/config/vae", json={"name": title, "source": "B"}).json()
    left = _ask(service, "PUT", "/config/vae", json={"name": title, "workflows": ["w"]}).json()
    taken = _ask(service, "PUT", "/config/vae", json={"name": title, "source": None}).json()

    assert (changed["source"], left["source"]) == ("B", "B")
    assert "source" not in taken


def test_a_token_may_name_the_source(tmp_path: Path) -> None:
    key = Key("first")
    (tmp_path / "issuer.pem").write_bytes(key.pem())
    with running(
        "run",
        tmp_path,
        STOWGATE_AUTH="jwt",
        STOWGATE_JWT_KEYS=str(tmp_path / "issuer.pem"),
        STOWGATE_JWT_ISSUER=ISSUER,
        STOWGATE_JWT_AUDIENCE=AUDIENCE,
        STOWGATE_JWT_SOURCE_CLAIM="ae",
    ) as service:
        token = key.token(scope="stowgate:store stowgate:read", ae="MR-7")
        headers = {"Authorization": f"Bearer {token}"}
        stored = service.post("/dicomweb/studies", new_instance(), "application/dicom", **headers)
        payload_id = stored.headers["X-Payload-ID"]
        shown = requests.get(f"{service.url}/payloads/{payload_id}", headers=headers, timeout=60)

    assert shown.json()["source"] == "MR-7"


def _line(*more: str) -> str:
    return ":".join([user_line("a", [Scope.STORE], PASSWORD), *more])


def test_a_line_of_a_user_may_have_bindings_a_source_or_both() -> None:
    found = [
        parse_users(_line(*more))["a"].caller for more in ((), ("AE",), ("", "CT"), ("AE", "CT"))
    ]

    bindings = [caller.vaes for caller in found]
    assert bindings == [None, frozenset({"AE"}), None, frozenset({"AE"})]
    assert [caller.source for caller in found] == [None, None, "CT", "CT"]


@pytest.mark.parametrize("more", [("",), ("", ""), ("AE", ""), ("", "CT/1"), ("", "x" * 16)])
def test_a_line_with_an_empty_or_bad_field_is_refused(more: tuple[str, ...]) -> None:
    with pytest.raises(Malformed):
        parse_users(_line(*more))
