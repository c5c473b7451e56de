"""What senders that stall, trickle or never hang up take from everyone else: nothing."""

import json
import os
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from instances import new_instance
from service import Service, running, wait_for
from wire import connect, everything, head, read_answer, statuses

# Of 4 threads each of these took all for half a minute or more when a connection held a thread.
DEADLINE_SECONDS = 15.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running("run", tmp_path_factory.mktemp("few"), STOWGATE_API_THREADS="4") as service:
        yield service


UPLOAD_OF_TEXT = head(
    "POST /dicomweb/studies HTTP/1.1", "Content-Type: text/plain", "Content-Length: 100000"
)
VAE = head("POST /config/vae HTTP/1.1", "Content-Type: application/json", "Content-Length: 1000")
CHUNKED = "Transfer-Encoding: chunked"
VAE_IN_CHUNKS = head("POST /config/vae HTTP/1.1", CHUNKED)


@pytest.mark.parametrize(
    ("count", "sent"),
    [
        pytest.param(100, b"", id="idle"),
        pytest.param(20, b"GET /health/live HTTP/1.1\r\nX-Half: ", id="half-heads"),
        pytest.param(
            20, head("GET /health/live HTTP/1.1") + b"GET /health", id="half-heads-read-ahead"
        ),
        pytest.param(
            30, head("GET /health/live HTTP/1.1", "Connection: close"), id="never-hang-up"
        ),
        pytest.param(16, UPLOAD_OF_TEXT + b"abc", id="stalled-in-a-refused-upload"),
        pytest.param(16, VAE + b"{", id="stalled-in-a-vae"),
        pytest.param(16, VAE_IN_CHUNKS + b"5\r\n{", id="stalled-in-a-vae-in-chunks"),
        pytest.param(
            16,
            head("POST /health/live HTTP/1.1", "Content-Length: 1000"),
            id="stalled-in-a-body-that-nothing-reads",
        ),
    ],
)
def test_others_are_served_beside_senders_that_hold_on(
    service: Service, count: int, sent: bytes
) -> None:
    with ExitStack() as connections:
        for _ in range(count):
            sock = connections.enter_context(connect(service))
            sock.sendall(sent)

        live = requests.get(f"{service.url}/health/live", timeout=DEADLINE_SECONDS)

        assert live.status_code == 200
        stored = requests.post(
            f"{service.url}/dicomweb/studies",
            data=new_instance(),
            headers={"Content-Type": "application/dicom"},
            timeout=DEADLINE_SECONDS,
        )
        assert stored.status_code == 200


def test_more_idle_connections_than_there_may_be_keep_nobody_out(tmp_path: Path) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, files[1]))
    with ExitStack() as started:
        try:
            service = started.enter_context(running("run", tmp_path, STOWGATE_API_THREADS="4"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)
        for _ in range(300):
            started.enter_context(connect(service))

        live = requests.get(f"{service.url}/health/live", timeout=DEADLINE_SECONDS)

        assert live.status_code == 200


@pytest.mark.parametrize(
    ("count", "asked"), [(5, b""), (1, b""), (5, head("GET /health/live HTTP/1.1"))]
)
def test_without_a_file_descriptor_left_who_waits_longest_makes_room(
    tmp_path: Path, count: int, asked: bytes
) -> None:
    with running("run", tmp_path) as service, ExitStack() as idle:
        for _ in range(count):
            sock = idle.enter_context(connect(service))
            if asked:
                sock.sendall(asked)
                assert read_answer(sock)[0] == 200
        wait_for(lambda: open_connections(service) == count)
        process_id = service.process_ids()[1]
        open_files = max(map(int, os.listdir(f"/proc/{process_id}/fd")))
        resource.prlimit(process_id, resource.RLIMIT_NOFILE, (open_files + 1, open_files + 1))

        for _ in range(3):
            live = requests.get(f"{service.url}/health/live", timeout=DEADLINE_SECONDS)
            assert live.status_code == 200

        assert service.process_ids()[1] == process_id


def test_who_asks_on_and_on_and_takes_no_answers_is_hung_up_on(service: Service) -> None:
    wait_for(lambda: open_connections(service) == 0)
    asking = head("GET /openapi.json HTTP/1.1") * 500
    with ExitStack() as connections:
        for _ in range(40):
            connections.enter_context(connect(service)).sendall(asking)

        def hung_up() -> bool:
            live = requests.get(f"{service.url}/health/live", timeout=DEADLINE_SECONDS)
            assert live.status_code == 200
            return open_connections(service) <= 1

        # Longer than a thread would wait for one of them to take its answer.
        wait_for(hung_up, seconds=60)


def test_a_head_that_comes_in_pieces_is_served(service: Service) -> None:
    with connect(service) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (b"GET /health/li", b"ve HTTP/1.1\r\nHost: local", b"host\r\n\r", b"\n"):
            sock.sendall(piece)
            service.get("/health/live")

        assert read_answer(sock)[0] == 200


def test_a_half_head_is_hung_up_on(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(b"GET /health/live HTTP/1.1\r\nX-Half: ")

        assert sock.recv(100) == b""


def test_a_stalled_body_of_a_vae_is_answered_408(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(VAE + b"{")

        assert read_answer(sock)[0] == 408


def test_bodies_of_vaes_that_stall_do_not_take_every_thread(service: Service) -> None:
    def status_beside() -> int:
        return requests.post(f"{service.url}/config/vae", data=b"[]", timeout=60).status_code

    with connect(service) as one, connect(service) as another:
        one.sendall(VAE + b"{")
        another.sendall(VAE + b"{")

        assert wait_for(lambda: status_beside() == 429)
        assert service.get("/health/live").status_code == 200
        assert (read_answer(one)[0], read_answer(another)[0]) == (408, 408)

    assert status_beside() == 400


EXPECTS = "Expect: 100-continue"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (("POST /dicomweb/studies HTTP/1.1", "Content-Type: text/plain", "Content-Length: 9"), 415),
        (("POST /dicomweb/studies HTTP/1.1", "Content-Type: text/plain", CHUNKED), 415),
        (("POST /config/vae HTTP/1.1", "Content-Length: 2000000"), 413),
        (("POST /nowhere HTTP/1.1", "Content-Length: 9"), 404),
    ],
    ids=["upload", "chunked", "vae", "nowhere"],
)
def test_a_sender_that_asks_first_is_not_told_to_send_what_is_refused(
    service: Service, sent: tuple[str, ...], status: int
) -> None:
    with connect(service) as sock:
        sock.sendall(head(*sent, EXPECTS))

        answer = everything(sock)

    assert statuses(answer) == [status]
    assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize("framing", ["Content-Length: 9", CHUNKED])
@pytest.mark.parametrize(
    ("target", "status"), [("POST /nowhere", 404), ("DELETE /health/live", 405)]
)
def test_an_answer_before_the_body_says_that_the_connection_ends(
    service: Service, target: str, status: int, framing: str
) -> None:
    with connect(service) as sock:
        sock.sendall(head(f"{target} HTTP/1.1", framing))

        answer = everything(sock)

    assert statuses(answer) == [status]
    assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize("framing", ["Content-Length: 4", CHUNKED])
def test_a_sender_that_asks_first_is_told_to_go_on_and_may_ask_again(
    service: Service, framing: str
) -> None:
    asking = head("POST /config/vae HTTP/1.1", framing, EXPECTS)
    body = b"2\r\n[]\r\n0\r\n\r\n" if framing == CHUNKED else b"[]  "
    with connect(service) as sock:
        for _ in range(2):
            sock.sendall(asking)
            assert read_answer(sock)[0] == 100

            sock.sendall(body)
            assert read_answer(sock)[0] == 400


def test_a_connection_is_used_again(service: Service) -> None:
    with connect(service) as sock:
        for _ in range(3):
            sock.sendall(head("GET /health/live HTTP/1.1"))
            status, answer_head, _ = read_answer(sock)

            assert status == 200
            assert b"connection: keep-alive" in answer_head.lower()


def test_requests_sent_at_once_are_answered_in_order(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(
            head("GET /health/live HTTP/1.1")
            + head("GET /nowhere HTTP/1.1")
            + head("GET /health/live HTTP/1.1", "Connection: close")
        )
        assert statuses(everything(sock)) == [200, 404, 200]


def test_a_refused_upload_ends_its_connection_behind_the_answer(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(UPLOAD_OF_TEXT)
        status, answer_head, _ = read_answer(sock)

        assert status == 415
        assert b"connection: close" in answer_head.lower()
        sock.sendall(bytes(100000))
        assert sock.recv(100) == b""


def test_a_sender_sees_the_refusal_of_a_large_body_it_is_sending(service: Service) -> None:
    answer = service.post("/nowhere", bytes(32 << 20), "application/dicom")

    assert answer.status_code == 404


LARGE_BYTES = 96 << 20


def test_a_sender_that_reads_no_answer_before_it_has_sent_everything_gets_the_refusal(
    service: Service,
) -> None:
    """As `HttpURLConnection` of Java does."""
    sent = head(
        "POST /dicomweb/studies HTTP/1.1",
        "Content-Type: text/plain",
        f"Content-Length: {LARGE_BYTES}",
    )
    with connect(service) as sock:
        sock.sendall(sent)
        for _ in range(LARGE_BYTES >> 20):
            sock.sendall(bytes(1 << 20))

        assert read_answer(sock)[0] == 415


def test_a_sender_that_trickles_behind_its_refusal_is_hung_up_on(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(UPLOAD_OF_TEXT)
        assert read_answer(sock)[0] == 415

        def hung_up() -> bool:
            try:
                sock.sendall(b"x")
            except OSError:
                return True
            return False

        wait_for(hung_up)


def open_connections(service: Service) -> int:
    """That have come to the service and that it holds, in its own process or a child."""
    port = urlsplit(service.url).port
    lines = Path(f"/proc/{service.process.pid}/net/tcp").read_text().splitlines()[1:]
    # Local port, and a state other than LISTEN and TIME_WAIT; a socket nobody holds has inode 0.
    return sum(
        int(local.split(":")[1], 16) == port and state not in ("0A", "06") and inode != "0"
        for _, local, _, state, _, _, _, _, _, inode, *_ in map(str.split, lines)
    )


def test_connections_that_ended_leave_nothing_behind(service: Service) -> None:
    with ExitStack() as connections:
        for sent in (
            b"",
            b"GET /",
            VAE + b"{",
            UPLOAD_OF_TEXT,
            b"\r\n\r\n",
            head("GET / HTTP/1.1"),
        ):
            connections.enter_context(connect(service)).sendall(sent)
        wait_for(lambda: open_connections(service) >= 6)

    wait_for(lambda: open_connections(service) == 0)


def test_a_peer_that_does_not_hang_up_is_hung_up_on(service: Service) -> None:
    wait_for(lambda: open_connections(service) == 0)
    with connect(service) as sock:
        sock.sendall(head("GET /health/live HTTP/1.1", "Connection: close"))
        assert read_answer(sock)[0] == 200
        assert open_connections(service) == 1

        wait_for(lambda: open_connections(service) == 0)


@pytest.mark.parametrize("asked_before", [True, False])
def test_an_idle_connection_is_served_near_the_end_of_its_time_and_closed_behind_it(
    tmp_path: Path, asked_before: bool
) -> None:
    asking = head("GET /health/live HTTP/1.1")
    with (
        running("run", tmp_path, STOWGATE_KEEP_ALIVE_SECONDS="3") as service,
        connect(service) as sock,
    ):
        if asked_before:
            sock.sendall(asking)
            assert read_answer(sock)[0] == 200

        # Less than the time, as the machine may be slow.
        closed, _, _ = select.select([sock], [], [], 2)
        assert not closed
        sock.sendall(asking)
        assert read_answer(sock)[0] == 200
        assert sock.recv(100) == b""


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(head("GET /health/live HTTP/1.1"), id="kept-alive"),
        pytest.param(b"", id="new"),
        pytest.param(b"GET /health", id="half-head"),
        pytest.param(head("GET /health/live HTTP/1.1", "Connection: close"), id="never-hangs-up"),
    ],
)
def test_the_service_stops_beside_a_connection_that_idles(tmp_path: Path, sent: bytes) -> None:
    with running("run", tmp_path, STOWGATE_API_THREADS="4") as service, connect(service) as sock:
        sock.sendall(sent)
        if sent.endswith(b"\r\n\r\n"):
            assert read_answer(sock)[0] == 200
        wait_for(lambda: open_connections(service) == 1)

        service.process.terminate()

        # Sooner than the 65 s that an idle connection is kept for, and a stop may take.
        assert service.process.wait(DEADLINE_SECONDS) == 0


MARK = "DOE^JOHN"


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        pytest.param(f"{MARK} nonsense\r\n\r\n".encode(), 400, "request line", id="line"),
        pytest.param(f"G\x01{MARK} / HTTP/1.1\r\n\r\n".encode(), 400, "method", id="method"),
        pytest.param(f"GET /{MARK} HTTP/9.9\r\n\r\n".encode(), 400, "version", id="version"),
        pytest.param(f"GET /{MARK} HTTP/1.1\n\n".encode(), 400, "request line", id="bare-lf"),
        pytest.param(head("GET / HTTP/1.1", f"{MARK} : x"), 400, "name of a header", id="name"),
        pytest.param(head("GET / HTTP/1.1", f"X-A: x\r\n{MARK}"), 400, "header", id="no-colon"),
        pytest.param(head("GET / HTTP/1.1", f"X-A: {MARK}\x00"), 400, "header", id="nul"),
        pytest.param(head("GET / HTTP/1.1", f"X-A: x\r\n {MARK}"), 400, "folded", id="folded"),
        pytest.param(head(f"GET /{MARK * 600} HTTP/1.1"), 414, "too long", id="long-line"),
        pytest.param(
            head("GET / HTTP/1.1", f"X-A: {MARK * 9000}"), 431, "header fields", id="long-field"
        ),
        pytest.param(
            head("GET / HTTP/1.1", *[f"X-{n}: {MARK}" for n in range(200)]),
            431,
            "header fields",
            id="many-fields",
        ),
        pytest.param(
            f"GET / HTTP/1.1\r\nX-A: {MARK * 10000}".encode(), 431, "header fields", id="endless"
        ),
        pytest.param(head("POST / HTTP/1.1", f"Expect: {MARK}"), 417, "Expect", id="expect"),
        pytest.param(
            head("POST / HTTP/1.1", f"Transfer-Encoding: {MARK}"), 501, "Transfer-Enc", id="coding"
        ),
    ],
)
def test_a_hostile_head_is_refused_in_fixed_words(
    service: Service, sent: bytes, status: int, words: str
) -> None:
    with connect(service) as sock:
        sock.sendall(sent)
        answered, answer_head, body = read_answer(sock)

        assert sock.recv(100) == b""
    problem = json.loads(body)
    assert (answered, problem["status"]) == (status, status)
    assert b"Content-Type: application/problem+json" in answer_head
    assert b"connection: close" in answer_head.lower()
    assert words in problem["detail"]
    log = service.log.read_text()
    assert problem["detail"] in log
    for text in (answer_head.decode(), body.decode(), log):
        assert "DOE" not in text
        assert "JOHN" not in text
