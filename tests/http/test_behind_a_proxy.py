"""Behind proxies: who sent it, and where it is under a path of theirs."""

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
    """A Stowgate that knows one proxy, at 127.0.0.1."""
    with running(
        "run",
        tmp_path_factory.mktemp("behind"),
        STOWGATE_PUBLIC_URL=PUBLIC_URL,
        STOWGATE_TRUSTED_PROXIES="127.0.0.1, fd00::/64",
        # Also to a Host that is not its own.
        STOWGATE_ALLOW_ANYONE="true",
        # Longer than the body of a request that is no upload may take.
        STOWGATE_IDLE_SECONDS="7",
    ) as service:
        yield service


@contextmanager
def proxy(service: Service, strips: bool) -> Iterator[str]:
    """Serves the API below `PREFIX`, as most proxies do: the URL of that."""
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
def test_a_proxy_may_serve_it_below_a_path_and_the_source_is_the_sender(
    behind: Service, strips: bool
) -> None:
    with proxy(behind, strips) as url:
        answer = send_from(SENDER, url, new_instance())

    assert answer.status == 200
    payload_id = answer.headers["X-Payload-ID"]
    assert answer.headers["Link"] == f'<{PUBLIC_URL}/payloads/{payload_id}>; rel="status"'
    assert source(behind, answer) == SENDER


def test_who_comes_past_the_proxy_is_not_believed(behind: Service) -> None:
    answer = send_from(SENDER, behind.url, new_instance())

    assert source(behind, answer) == SENDER


@pytest.mark.parametrize(
    ("proxies", "expected"),
    [("0", SENDER), ("1", CLAIMED), ("2", SENDER), ("127.0.0.2", CLAIMED), ("10.0.0.0/8", SENDER)],
)
def test_a_setting_says_whose_word_is_taken(tmp_path: Path, proxies: str, expected: str) -> None:
    with running("run", tmp_path, STOWGATE_TRUSTED_PROXIES=proxies) as service:
        answer = send_from(SENDER, service.url, new_instance())

        assert source(service, answer) == expected


def test_urls_are_those_of_the_setting_and_never_of_a_header(behind: Service) -> None:
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
def test_an_upload_has_the_time_of_an_upload_however_its_path_is_written(
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
def test_a_path_that_a_rule_of_a_proxy_may_not_know_again_is_not_served(
    behind: Service, path: str
) -> None:
    with connect(behind) as sock:
        sock.sendall(head(f"GET {path} HTTP/1.1"))

        # Below /dicomweb it may be one to store to, which answers no GET.
        assert read_answer(sock)[0] in (404, 405)


@pytest.mark.parametrize(
    "target", ["/config/vae", f"{PREFIX}/config/vae?x=//", f"http://localhost{PREFIX}/config/vae"]
)
def test_a_path_is_served_as_it_is_documented_with_and_without_the_prefix(
    behind: Service, target: str
) -> None:
    with connect(behind) as sock:
        sock.sendall(head(f"GET {target} HTTP/1.1"))

        assert read_answer(sock)[0] == 200


def test_what_is_served_is_no_path_prefix(behind: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in behind.get("/openapi.json").json()["paths"]:
        monkeypatch.setenv("STOWGATE_PUBLIC_URL", f"https://pacs.example{path.partition('{')[0]}")
        with pytest.raises(BadSetting, match="STOWGATE_PUBLIC_URL"):
            load(ApiSettings)
