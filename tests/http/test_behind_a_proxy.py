"""Behind proxies: the address of the client, and a path prefix."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from answering import Answering, serving
from instances import new_instance
from service import Service, running
from wire import connect, head, read_answer

from api.settings import ApiSettings
from shared.settings.loader import BadSetting, load

PREFIX = "/site/stow"
PUBLIC_URL = f"https://pacs.example{PREFIX}"
CLAIMED = "198.51.100.7"
SENDER = "127.0.0.2"


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Starts Stowgate with one trusted proxy, 127.0.0.1."""
    with running(
        "run",
        tmp_path_factory.mktemp("behind"),
        STOWGATE_PUBLIC_URL=PUBLIC_URL,
        STOWGATE_TRUSTED_PROXIES="127.0.0.1, fd00::/64",
        # Requests name other hosts too.
        STOWGATE_ALLOW_ANYONE="true",
        # Longer than the body of another request than an upload may take.
        STOWGATE_IDLE_SECONDS="7",
    ) as service:
        yield service


@contextmanager
def proxy(service: Service, strips: bool) -> Iterator[str]:
    """Serves the API under `PREFIX`; yields the URL."""
    api = urlsplit(service.url)

    class PassingOn(Answering):
        def do_POST(self) -> None:
            path = self.path.removeprefix(PREFIX) if strips else self.path
            told = [self.headers.get("X-Forwarded-For"), self.client_address[0]]
            forwarded_for = ", ".join(filter(None, told))
            headers = {
                name: value for name, value in self.headers.items() if name != "X-Forwarded-For"
            } | {"X-Forwarded-For": forwarded_for, "X-Forwarded-Host": "evil.example"}
            asked = http.client.HTTPConnection(api.hostname or "", api.port, timeout=30)
            asked.request("POST", path, self.received(), headers)
            answer = asked.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.read())
            asked.close()

    with serving(PassingOn) as url:
        yield f"{url}{PREFIX}"


def send_from(address: str, url: str, body: bytes) -> http.client.HTTPResponse:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(
        place.hostname or "", place.port, timeout=30, source_address=(address, 0)
    )
    headers = {"Content-Type": "application/dicom", "X-Forwarded-For": CLAIMED}
    connection.request("POST", f"{place.path}/dicomweb/studies", body, headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


def source(service: Service, answer: http.client.HTTPResponse) -> str:
    payload = service.opened(answer.headers["X-Payload-ID"])
    return str(payload["workflow_request"]["trigger"]["source"])


@pytest.mark.parametrize("strips", [True, False], ids=["strips its prefix", "leaves it"])
def test_the_source_is_the_client_behind_a_proxy_with_a_prefix(
    behind: Service, strips: bool
) -> None:
    with proxy(behind, strips) as url:
        answer = send_from(SENDER, url, new_instance())

    assert answer.status == 200
    payload_id = answer.headers["X-Payload-ID"]
    assert answer.headers["Link"] == f'<{PUBLIC_URL}/payloads/{payload_id}>; rel="status"'
    assert source(behind, answer) == SENDER


def test_x_forwarded_for_of_an_untrusted_peer_is_ignored(behind: Service) -> None:
    answer = send_from(SENDER, behind.url, new_instance())

    assert source(behind, answer) == SENDER


@pytest.mark.parametrize(
    ("proxies", "expected"),
    [("0", SENDER), ("1", CLAIMED), ("2", SENDER), ("127.0.0.2", CLAIMED), ("10.0.0.0/8", SENDER)],
)
def test_x_forwarded_for_counts_only_from_trusted_proxies(
    tmp_path: Path, proxies: str, expected: str
) -> None:
    with running("run", tmp_path, STOWGATE_TRUSTED_PROXIES=proxies) as service:
        answer = send_from(SENDER, service.url, new_instance())

        assert source(service, answer) == expected


def test_links_use_the_public_url_and_never_a_header(behind: Service) -> None:
    instance = new_instance()
    lies = {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "Forwarded": "host=evil"}
    lies |= {"X-Forwarded-Proto": "ftp", "X-Forwarded-Prefix": "/evil"}

    stored = behind.post("/dicomweb/studies", instance, "application/dicom", **lies)
    created = requests.post(
        f"{behind.url}/config/vae", json={"virtualAeTitle": "BEHIND"}, headers=lies, timeout=30
    )

    payload_id = stored.headers["X-Payload-ID"]
    assert stored.headers["Link"] == f'<{PUBLIC_URL}/payloads/{payload_id}>; rel="status"'
    assert created.headers["Location"] == f"{PUBLIC_URL}/config/vae/BEHIND"
    for answer in (stored, created):
        assert "evil" not in str(answer.headers) + answer.text


@pytest.mark.parametrize(
    "path", [f"{PREFIX}/dicomweb/studies", "/%64icomweb/studies", "/site%2Fstow//dicomweb/studies"]
)
def test_every_spelling_of_an_upload_path_has_the_deadline_of_an_upload(
    behind: Service, path: str
) -> None:
    with connect(behind) as sock:
        sock.sendall(
            head(
                f"POST {path} HTTP/1.1",
                "Content-Type: application/dicom",
                "Content-Length: 1000",
            )
            + bytes(500)
        )

        assert read_answer(sock)[0] == 408


@pytest.mark.parametrize(
    "path",
    [
        "//config/vae",
        "///config/vae",
        "/config//vae",
        "/config/vae/",
        "/%63onfig/vae",
        "/config%2Fvae",
        "/./config/vae",
        "/x/../config/vae",
        "/dicomweb/../config/vae",
        "/dicomweb/%2e%2e/config/vae",
        "/dicomweb//config/vae",
        "//health/ready",
        "/metrics/",
        "//openapi.json",
        "http://localhost//config/vae",
        f"/{PREFIX}/config/vae",
        f"{PREFIX}//config/vae",
        "/site/%73tow/config/vae",
        "/site%2Fstow/config/vae",
    ],
)
def test_a_path_that_could_bypass_a_proxy_rule_is_not_served(behind: Service, path: str) -> None:
    with connect(behind) as sock:
        sock.sendall(head(f"GET {path} HTTP/1.1"))

        # Below /dicomweb the path may be one for uploads, without GET.
        assert read_answer(sock)[0] in (404, 405)


@pytest.mark.parametrize(
    "target", ["/config/vae", f"{PREFIX}/config/vae?x=//", f"http://localhost{PREFIX}/config/vae"]
)
def test_a_path_is_served_with_and_without_the_prefix(behind: Service, target: str) -> None:
    with connect(behind) as sock:
        sock.sendall(head(f"GET {target} HTTP/1.1"))

        assert read_answer(sock)[0] == 200


def test_a_served_path_is_not_accepted_as_prefix(
    behind: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in behind.get("/openapi.json").json()["paths"]:
        monkeypatch.setenv("STOWGATE_PUBLIC_URL", f"https://pacs.example{path.partition('{')[0]}")
        with pytest.raises(BadSetting, match="STOWGATE_PUBLIC_URL"):
            load(ApiSettings)
