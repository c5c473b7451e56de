"""Requests whose end two readers could see in two places (RFC 9112 11.2): never read on behind one.

Behind each comes a second request, which a proxy in front would have taken for part of the first.
"""

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from instances import multipart, new_instance
from service import Service, running
from wire import connect, everything, head, read_answer, statuses

SMUGGLED = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = "POST /dicomweb/studies HTTP/1.1"
TYPE = "Content-Type: application/dicom"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running("run", tmp_path_factory.mktemp("smuggling"), STOWGATE_IDLE_SECONDS="2") as service:
        yield service


def _payloads(service: Service) -> list[object]:
    return list(service.get("/payloads").json()["payloads"])


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["Content-Length: 3", "Content-Length: 30"], id="two-lengths"),
        pytest.param(["Content-Length: 3", "Content-Length: 3"], id="one-length-twice"),
        pytest.param(["Content-Length: 3, 30"], id="list-of-lengths"),
        pytest.param(["Content-Length: +3"], id="signed-length"),
        pytest.param(["Content-Length: -3"], id="negative-length"),
        pytest.param(["Content-Length: 0x3"], id="hexadecimal-length"),
        pytest.param(["Content-Length: 3_0"], id="underscore-in-length"),
        pytest.param(["Content-Length: \u00b3"], id="superscript-length"),
        pytest.param(["Content-Length:"], id="empty-length"),
        pytest.param(["Content-Length: 3", CHUNKED], id="length-and-chunked"),
        pytest.param([CHUNKED, "Content-Length: 3"], id="chunked-and-length"),
        pytest.param([CHUNKED, CHUNKED], id="chunked-twice"),
        pytest.param(["Transfer-Encoding: chunked, chunked"], id="chunked-twice-in-a-list"),
        pytest.param(["Transfer-Encoding: chunked, identity"], id="chunked-not-last"),
        pytest.param(["Transfer-Encoding: xchunked"], id="unknown-coding"),
        pytest.param(["Transfer-Encoding: chunked;q=1"], id="coding-with-parameter"),
        pytest.param(["Transfer-Encoding: \x0bchunked"], id="control-before-coding"),
        pytest.param(["Transfer-Encoding : chunked", "Content-Length: 3"], id="space-before-colon"),
        pytest.param([" Transfer-Encoding: chunked", "Content-Length: 3"], id="folded-coding"),
        pytest.param(["X: y\nTransfer-Encoding: chunked", "Content-Length: 3"], id="bare-lf"),
        pytest.param(["X: y\rTransfer-Encoding: chunked", "Content-Length: 3"], id="bare-cr"),
    ],
)
def test_a_request_whose_length_is_in_doubt_is_refused_and_ends_its_connection(
    service: Service, lines: list[str]
) -> None:
    with connect(service) as sock:
        sock.sendall(head(POST, TYPE, *lines) + b"0\r\n\r\n" + SMUGGLED)

        (status,) = statuses(everything(sock))

    assert status in (400, 501)
    assert _payloads(service) == []


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(b"3\nabc\r\n0\r\n\r\n", id="size-ended-by-bare-lf"),
        pytest.param(b"3\r\nabcd\r\n0\r\n\r\n", id="longer-than-its-size"),
        pytest.param(b"3\r\nabc0\r\n\r\n", id="no-line-end-behind-data"),
        pytest.param(b"0x3\r\nabc\r\n0\r\n\r\n", id="prefixed-size"),
        pytest.param(b"+3\r\nabc\r\n0\r\n\r\n", id="signed-size"),
        pytest.param(b"-3\r\nabc\r\n0\r\n\r\n", id="negative-size"),
        pytest.param(b"3_0\r\nabc\r\n0\r\n\r\n", id="underscore-in-size"),
        pytest.param(b" 3\r\nabc\r\n0\r\n\r\n", id="space-before-size"),
        pytest.param(b"\r\n0\r\n\r\n", id="empty-size"),
        pytest.param(b"3;" + b"x" * 200_000 + b"\r\nabc\r\n0\r\n\r\n", id="endless-extension"),
        pytest.param(b"3\r\nabc\r\n0\r\n" + b"X: y\r\n" * 50_000 + b"\r\n", id="many-trailers"),
    ],
)
def test_malformed_chunks_are_refused_and_end_their_connection(
    service: Service, chunks: bytes
) -> None:
    with connect(service) as sock:
        sock.sendall(head(POST, TYPE, CHUNKED) + chunks + SMUGGLED)

        (status,) = statuses(everything(sock))

    assert status == 400
    assert _payloads(service) == []


def test_a_chunk_that_claims_more_than_ever_comes_is_ended_in_time(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(head(POST, TYPE, CHUNKED) + b"ffffffffffffffff\r\nabc\r\n0\r\n\r\n" + SMUGGLED)

        assert statuses(everything(sock)) == [408]


def test_chunks_of_http_1_0_are_refused_and_end_their_connection(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(
            head("POST /dicomweb/studies HTTP/1.0", TYPE, CHUNKED) + b"0\r\n\r\n" + SMUGGLED
        )

        assert statuses(everything(sock)) == [400]


def test_a_body_of_http_1_0_without_its_length_is_not_taken_for_none(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(head("POST /dicomweb/studies HTTP/1.0", TYPE) + new_instance())
        sock.shutdown(socket.SHUT_WR)

        status, _, body = read_answer(sock)

    assert status == 400
    assert b"Content-Length" in body


def test_a_body_longer_than_its_length_is_not_taken_for_another_request(service: Service) -> None:
    body, content_type = multipart(new_instance())
    with connect(service) as sock:
        sock.sendall(
            head(POST, f"Content-Type: {content_type}", f"Content-Length: {len(body)}")
            + body
            + b"\r\n garbage\r\n\r\n"
        )

        first, *others = statuses(everything(sock))

    assert (first, others) == (200, [400])


def test_behind_a_body_that_came_too_slowly_no_other_request_is_read(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(head(POST, TYPE, "Content-Length: 1000") + b"x" * 400)
        answer = sock.recv(65536)
        sock.sendall(b"x" * 600 + 50 * SMUGGLED)
        answer += everything(sock)

    assert statuses(answer) == [408]
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_behind_a_small_body_that_came_too_slowly_no_other_request_is_read(
    service: Service, method: str
) -> None:
    before = _payloads(service)
    with connect(service) as sock:
        sock.sendall(head(f"{method} /config/vae HTTP/1.1", f"Content-Length: {len(SMUGGLED) + 1}"))
        sock.sendall(b"{")
        status, answer_head, _ = read_answer(sock)
        with suppress(ConnectionError):
            sock.sendall(SMUGGLED)
            assert everything(sock) == b""

    assert status == 408
    assert b"connection: close" in answer_head.lower()
    assert _payloads(service) == before


def test_a_small_body_that_does_not_arrive_whole_changes_nothing(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(head("POST /config/vae HTTP/1.1", "Content-Length: 500"))
        sock.sendall(b'{"virtualAeTitle": "CUT"}')
        sock.shutdown(socket.SHUT_WR)
        status, _, body = read_answer(sock)

    assert status == 400
    assert b"the body is truncated" in body
    assert b"CUT" not in service.get("/config/vae").content


def test_what_stands_behind_the_head_belongs_to_the_body_and_opens_nothing(
    service: Service,
) -> None:
    inner = head("DELETE /config/vae/ANY HTTP/1.1")
    with connect(service) as sock:
        sock.sendall(head(POST, TYPE, f"Content-Length: {len(inner)}", "Connection: close") + inner)

        assert statuses(everything(sock)) == [409]
