"""The hosts that a request may name without authentication."""

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from instances import new_instance
from service import Service, running
from wire import connect, head, read_answer

PUBLIC_URL = "https://pacs.example:8443/stow"
VAE = b'{"virtualAeTitle": "REBOUND"}'


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """On loopback, without authentication, with a public URL."""
    with running(
        "run",
        tmp_path_factory.mktemp("public"),
        STOWGATE_PUBLIC_URL=PUBLIC_URL,
        STOWGATE_CORS_ORIGINS="https://viewer.example",
    ) as service:
        yield service


def ask(
    service: Service, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, bytes]:
    """Send these headers only; underscores stand for hyphens."""
    place = urlsplit(service.url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    said = answer.status, answer.read()
    connection.close()
    return said


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil-localhost",
        "localhost@evil.example",
        "localhost, evil.example",
        "0.0.0.0",
        "10.0.0.1:8080",
        "[::]:8080",
        "[2001:db8::1]",
        "127.1",
        "a..b",
        ".",
        "[]",
        "[::1",
        ":8080",
        "",
        "x" * 300,
    ],
)
def test_dns_rebinding_does_not_reach_any_endpoint(public: Service, host: str) -> None:
    instance = new_instance()
    dicom = {"Content_Type": "application/dicom"}
    pretended = {"X_Forwarded_Host": "localhost", "Origin": "http://evil.example"}
    asked = [
        ("POST", "/dicomweb/studies", instance, dicom),
        ("OPTIONS", "/dicomweb/studies", b"", {}),
        ("POST", "/config/vae", VAE, pretended | {"Sec_Fetch_Site": "same-origin"}),
        ("GET", "/config/vae", b"", pretended),
        ("GET", "/payloads", b"", {}),
        ("GET", "/health/ready", b"", {}),
        ("GET", "/metrics", b"", {}),
        ("GET", "/openapi.json", b"", {}),
    ]

    answers = [
        ask(public, method, path, body, Host=host, **headers)
        for method, path, body, headers in asked
    ]

    assert {status for status, _ in answers} == {421}
    assert all(b"STOWGATE_PUBLIC_URL" in body for _, body in answers)
    assert b"evil" not in b"".join(body for _, body in answers)
    assert not public.payloads_with(instance)
    assert "REBOUND" not in public.get("/config/vae").text


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:1",
        "localhost.:8080",
        "127.0.0.1",
        "127.0.0.1.",
        "127.8.9.10:443",
        "[::1]",
        "[0:0:0:0:0:0:0:1]:8080",
        "[::ffff:7f00:1]",
        "pacs.example",
        "PACS.example:8443",
        "pacs.example.:80",
    ],
)
def test_loopback_and_the_host_of_the_public_url_are_accepted_with_any_port(
    public: Service, host: str
) -> None:
    assert ask(public, "GET", "/payloads", Host=host)[0] == 200


def test_the_public_host_is_accepted_only_with_a_public_url(stowgate: Service) -> None:
    assert ask(stowgate, "GET", "/payloads", Host="localhost")[0] == 200
    assert ask(stowgate, "GET", "/payloads", Host="pacs.example")[0] == 421


def test_an_http_1_0_request_without_host_is_accepted(stowgate: Service) -> None:
    with connect(stowgate) as sock:
        sock.sendall(b"GET /payloads HTTP/1.0\r\n\r\n")

        assert read_answer(sock)[0] == 200


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/payloads", 200),
        ("http://evil.example/payloads", 421),
        ("HTTP://evil.example:80/payloads", 421),
    ],
)
def test_the_host_of_an_absolute_request_target_is_checked_too(
    stowgate: Service, target: str, status: int
) -> None:
    with connect(stowgate) as sock:
        sock.sendall(head(f"GET {target} HTTP/1.1"))

        assert read_answer(sock)[0] == status


def test_a_rejected_host_is_recorded_in_the_audit_trail(public: Service) -> None:
    ask(public, "POST", "/dicomweb/studies", new_instance(), Host="evil.example")

    audited = [line for line in public.log.read_text().splitlines() if '"audit"' in line]
    assert any('"status": 421' in line and '"event": "store"' in line for line in audited)


def test_any_host_is_accepted_with_allow_anyone(tmp_path: Path) -> None:
    with running("run", tmp_path, STOWGATE_ALLOW_ANYONE="true") as service:
        for host in ("evil.example", "a..b", ".", "x" * 300, "[::1"):
            dicom = {"Content_Type": "application/dicom", "Host": host}
            stored = ask(service, "POST", "/dicomweb/studies", new_instance(), **dicom)
            wrong = ask(service, "POST", "/dicomweb/nothing", b"x", **dicom)

            assert (stored[0], wrong[0]) == (200, 404)
