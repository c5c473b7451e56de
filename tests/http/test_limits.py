"""Each limit is told while the sender is still sending, and nothing is kept of what broke it."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from instances import new_instance
from service import Service, running

DICOM = "Content-Type: application/dicom"


@contextmanager
def _unfinished_post(
    service: Service, *headers: str, path: str = "/dicomweb/studies", chunked: bool = True
) -> Iterator[socket.socket]:
    """A POST whose body never ends."""
    place = urlsplit(service.url)
    framing = ["Transfer-Encoding: chunked"] if chunked else []
    lines = [f"POST {path} HTTP/1.1", f"Host: {place.netloc}", *framing, *headers, "", ""]
    with socket.create_connection((place.hostname, place.port), timeout=60) as sock:
        sock.sendall("\r\n".join(lines).encode())
        yield sock


def _refusal(sock: socket.socket) -> tuple[int, dict[str, str], str]:
    """Status, headers and words of the answer."""
    received = b""
    while piece := sock.recv(65536):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    headers = dict(re.findall(r"([^\r\n:]+): ([^\r\n]*)", head.decode().partition("\r\n")[2]))
    assert headers["Content-Type"] == "application/problem+json"
    problem = orjson.loads(body)
    status = int(head.split()[1])
    assert problem["status"] == status
    return status, headers, problem["detail"]


def test_a_sender_that_comes_too_often_is_429_before_its_body(tmp_path: Path) -> None:
    with running("run", tmp_path, STOWGATE_RATE_PER_SENDER="2") as service:
        for _ in range(2):
            answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")
            assert answer.status_code == 200

        with _unfinished_post(service, DICOM) as sock:
            status, headers, words = _refusal(sock)

        assert status == 429
        assert 1 <= int(headers["Retry-After"]) <= 30
        assert "2 requests a minute" in words
        assert service.get("/health/live").status_code == 200
