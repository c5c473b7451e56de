"""Uploads that wait for a slot, and senders that stall or trickle while all slots are in use."""

import os
import re
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
import requests
from instances import new_instance
from service import Service, running, wait_for
from wire import connect, everything, head, read_answer, statuses

from api.auth.basic import user_line
from api.http.routes import Scope

DICOM = "application/dicom"
BEGUN = head(
    "POST /dicomweb/studies HTTP/1.1", f"Content-Type: {DICOM}", "Content-Length: 10000000"
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Accepts two concurrent uploads, with an idle timeout of an hour."""
    with running(
        "run",
        tmp_path,
        STOWGATE_MAX_UPLOADS="2",
        STOWGATE_UPLOAD_WAIT_SECONDS="0",
        STOWGATE_IDLE_SECONDS="3600",
    ) as service:
        yield service


def _status(service: Service) -> int:
    return int(service.post("/dicomweb/studies", new_instance(), DICOM).status_code)


def _in_progress(service: Service, count: int) -> bool:
    return f"stowgate_uploads_in_progress {count}.0" in service.get("/metrics").text


def _waiting(service: Service, count: int) -> bool:
    return f"stowgate_uploads_waiting {count}.0" in service.get("/metrics").text


def test_two_hundred_stalled_senders_do_not_block_another(service: Service) -> None:
    with ExitStack() as connections:
        stalled = [connections.enter_context(connect(service)) for _ in range(200)]
        for sock in stalled:
            sock.sendall(BEGUN + b"x" * 1000)
        wait_for(lambda: _in_progress(service, 2))

        assert service.get("/health/ready").status_code == 200
        wait_for(lambda: _status(service) == 200)
        for sock in stalled[:-2]:
            sock.shutdown(socket.SHUT_WR)
        answers = [statuses(everything(sock)) for sock in stalled[:-2]]

    assert {status for (status,) in answers} <= {400, 408, 429}
    assert [408] in answers


def test_trickling_senders_are_cut_for_a_new_one(service: Service) -> None:
    done = threading.Event()

    def trickle(sock: socket.socket) -> None:
        with suppress(OSError):
            while not done.wait(0.2):
                sock.sendall(b"x")

    with ExitStack() as connections:
        trickling = [connections.enter_context(connect(service)) for _ in range(2)]
        for sock in trickling:
            sock.sendall(BEGUN)
            threading.Thread(target=trickle, args=[sock], daemon=True).start()
        wait_for(lambda: _in_progress(service, 2))
        assert _status(service) == 429

        wait_for(lambda: _status(service) == 200)
        done.set()


def test_a_sender_that_keeps_sending_keeps_its_slot(service: Service) -> None:
    instance = new_instance(PixelData=bytes(8 << 20))
    others: list[int] = []

    def body() -> Iterator[bytes]:
        for start in range(0, len(instance), 1 << 18):
            yield instance[start : start + (1 << 18)]
            wait_for(lambda: _in_progress(service, 2) or others)
            others.append(_status(service))
            # The whole upload exceeds the patience, but no single pause does.
            time.sleep(0.3)

    with connect(service) as stalled:
        stalled.sendall(BEGUN)
        wait_for(lambda: _in_progress(service, 1))

        answer = requests.post(
            f"{service.url}/dicomweb/studies",
            data=body(),
            headers={"Content-Type": DICOM},
            timeout=60,
        )

        assert answer.status_code == 200
        # The stalled upload was cut, not this one.
        assert others[-1] == 200
        assert statuses(everything(stalled)) == [408]


def test_slow_senders_do_not_cut_each_other(service: Service) -> None:
    instance = new_instance(PixelData=bytes(256 << 10))

    def body() -> Iterator[bytes]:
        for start in range(0, len(instance), 1 << 14):
            yield instance[start : start + (1 << 14)]
            # The whole upload exceeds the patience, at about 40 kB/s.
            time.sleep(0.4)

    def send(_: int) -> list[int]:
        statuses: list[int] = []
        while not statuses or statuses[-1] == 429:
            headers = {"Content-Type": DICOM}
            url = f"{service.url}/dicomweb/studies"
            statuses.append(
                requests.post(url, data=body(), headers=headers, timeout=60).status_code
            )
        return statuses

    with ThreadPoolExecutor(3) as senders:
        answers = list(senders.map(send, range(3)))

    assert [statuses[-1] for statuses in answers] == [200] * 3


def test_waiting_uploads_are_served_in_order_of_arrival(tmp_path: Path) -> None:
    instance = new_instance()
    lines = (f"Content-Type: {DICOM}", f"Content-Length: {len(instance)}")
    with (
        running(
            "run",
            tmp_path,
            STOWGATE_MAX_UPLOADS="1",
            STOWGATE_UPLOAD_WAIT_SECONDS="60",
            STOWGATE_IDLE_SECONDS="3600",
        ) as service,
        ExitStack() as connections,
    ):
        first, second, third = (connections.enter_context(connect(service)) for _ in range(3))
        first.sendall(head("POST /dicomweb/studies HTTP/1.1", *lines))
        wait_for(lambda: _in_progress(service, 1))
        for waiting, count in ((second, 1), (third, 2)):
            waiting.sendall(head("POST /dicomweb/studies HTTP/1.1", *lines) + instance)
            wait_for(partial(_waiting, service, count))

        first.sendall(instance)

        payload_ids = []
        for sock in (first, second, third):
            found = re.search(r"X-Payload-ID: (\S+)", sock.recv(65536).decode())
            assert found
            payload_ids.append(found[1])
        newest_first = [p["payload_id"] for p in service.get("/payloads").json()["payloads"]]
        assert newest_first == payload_ids[::-1]


@pytest.mark.parametrize("threads", ["4", "40"])
def test_a_burst_of_200_small_uploads_succeeds(tmp_path: Path, threads: str) -> None:
    instances = [new_instance() for _ in range(200)]
    all_ready = threading.Barrier(200)
    with (
        running(
            "run", tmp_path, STOWGATE_API_THREADS=threads, STOWGATE_UPLOAD_WAIT_SECONDS="60"
        ) as service,
        ThreadPoolExecutor(200) as senders,
    ):

        def send(instance: bytes) -> int:
            all_ready.wait()
            return int(service.post("/dicomweb/studies", instance, DICOM).status_code)

        assert Counter(senders.map(send, instances)) == {200: 200}


def test_a_burst_of_100_uploads_with_one_new_password_succeeds(
    tmp_path: Path,
) -> None:
    users = tmp_path / "users"
    users.write_text(user_line("page", [Scope.STORE], "correct-horse-battery"))
    instances = [new_instance() for _ in range(100)]
    all_ready = threading.Barrier(100)
    with (
        running(
            "run",
            tmp_path,
            STOWGATE_AUTH="basic",
            STOWGATE_USERS=str(users),
            STOWGATE_UPLOAD_WAIT_SECONDS="60",
        ) as service,
        ThreadPoolExecutor(100) as senders,
    ):

        def send(instance: bytes) -> int:
            all_ready.wait()
            return requests.post(
                f"{service.url}/dicomweb/studies",
                data=instance,
                headers={"Content-Type": DICOM},
                auth=("page", "correct-horse-battery"),
                timeout=120,
            ).status_code

        assert Counter(senders.map(send, instances)) == {200: 100}


BEGUN_AND_SENT = ("Content-Length: 4", f"Content-Type: {DICOM}")


def _threads(service: Service) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in service.process_ids())


def test_waiting_uploads_use_no_thread_and_do_not_block_others(tmp_path: Path) -> None:
    with (
        running(
            "run", tmp_path, STOWGATE_MAX_UPLOADS="1", STOWGATE_UPLOAD_WAIT_SECONDS="60"
        ) as service,
        ExitStack() as connections,
    ):
        first = connections.enter_context(connect(service))
        first.sendall(head("POST /dicomweb/studies HTTP/1.1", *BEGUN_AND_SENT))
        wait_for(lambda: _in_progress(service, 1))
        before = _threads(service)
        waiting = [connections.enter_context(connect(service)) for _ in range(100)]
        for sock in waiting:
            sock.sendall(head("POST /dicomweb/studies HTTP/1.1", *BEGUN_AND_SENT) + b"none")

        wait_for(lambda: _waiting(service, 100))
        # At most one thread for each of the other requests.
        assert _threads(service) <= before + 5
        assert service.get("/health/ready").status_code == 200

        first.sendall(b"none")
        assert {read_answer(sock)[0] for sock in (first, *waiting)} == {409}


def test_an_upload_that_waits_too_long_gets_429_with_retry_after(
    tmp_path: Path,
) -> None:
    with (
        running(
            "run", tmp_path, STOWGATE_MAX_UPLOADS="1", STOWGATE_UPLOAD_WAIT_SECONDS="1"
        ) as service,
        connect(service) as first,
        connect(service) as second,
    ):
        first.sendall(head("POST /dicomweb/studies HTTP/1.1", *BEGUN_AND_SENT))
        wait_for(lambda: _in_progress(service, 1))
        second.sendall(head("POST /dicomweb/studies HTTP/1.1", *BEGUN_AND_SENT))
        wait_for(lambda: _waiting(service, 1))

        status, answer_head, _ = read_answer(second)

        assert status == 429
        assert re.search(rb"Retry-After: [1-9]", answer_head)
        assert service.metric("stowgate_uploads_waiting") == 0
        first.sendall(b"none")
        assert read_answer(first)[0] == 409


def test_uploads_beyond_half_of_the_connections_get_429_at_once(tmp_path: Path) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, files[1]))
    settings = {"STOWGATE_MAX_UPLOADS": "1", "STOWGATE_UPLOAD_WAIT_SECONDS": "60"}
    with ExitStack() as started:
        try:
            service = started.enter_context(
                running("run", tmp_path, **settings, STOWGATE_IDLE_SECONDS="3600")
            )
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)
        stalled = started.enter_context(connect(service))
        stalled.sendall(BEGUN)
        wait_for(lambda: _in_progress(service, 1))
        # Half of the 128 connections that 256 files allow.
        for _ in range(64):
            started.enter_context(connect(service)).sendall(BEGUN)
        wait_for(lambda: _waiting(service, 64))

        assert _status(service) == 429
        assert service.get("/health/live").status_code == 200


def test_a_waiting_upload_gets_a_response_when_the_service_stops(tmp_path: Path) -> None:
    with (
        running(
            "run", tmp_path, STOWGATE_MAX_UPLOADS="1", STOWGATE_UPLOAD_WAIT_SECONDS="60"
        ) as service,
        connect(service) as first,
        connect(service) as second,
    ):
        first.sendall(head("POST /dicomweb/studies HTTP/1.1", *BEGUN_AND_SENT))
        wait_for(lambda: _in_progress(service, 1))
        second.sendall(head("POST /dicomweb/studies HTTP/1.1", *BEGUN_AND_SENT))
        wait_for(lambda: _waiting(service, 1))

        service.process.terminate()

        assert read_answer(second)[0] == 429
        first.sendall(b"none")
        assert read_answer(first)[0] == 409
