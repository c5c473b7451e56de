"""HTTP/1.1 by hand, for what no client would send."""

import re
import socket
from urllib.parse import urlsplit

from service import Service


def connect(service: Service) -> socket.socket:
    place = urlsplit(service.url)
    return socket.create_connection((place.hostname, place.port), timeout=60)


def head(request_line: str, *lines: str) -> bytes:
    return "\r\n".join([request_line, "Host: localhost", *lines, "", ""]).encode()


def read_answer(sock: socket.socket) -> tuple[int, bytes, bytes]:
    """Status, head and body of the one answer that comes next."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += received_some(sock)
    answer_head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", answer_head, re.IGNORECASE)
    while length and len(body) < int(length[1]):
        body += received_some(sock)
    return int(answer_head.split()[1]), answer_head, body


def received_some(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    assert data, "the connection ended before the answer was whole"
    return data


def everything(sock: socket.socket) -> bytes:
    """All that comes until the service closes."""
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


def statuses(received: bytes) -> list[int]:
    """Those of all answers in it."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]
