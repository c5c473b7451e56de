"""Start, end and restart of the services `run`, `api` and `worker`."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from commands import run_stowgate
from disks import small_disk
from instances import new_instance
from service import Service, running, wait_for

from shared.adapters.folder.store import FolderObjectStore
from shared.record_store import Records


@pytest.mark.parametrize("command", ["run", "api", "worker", "check"])
def test_an_invalid_setting_stops_the_start_with_one_line(command: str, tmp_path: Path) -> None:
    variable = "STOWGATE_WORKER_LISTEN" if command == "worker" else "STOWGATE_LISTEN"

    started = run_stowgate(command, data=tmp_path, **{variable: "nowhere"})

    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert f"{variable} is 'nowhere', but must be host:port" in line


@pytest.mark.parametrize(
    ("command", "variable"),
    [("run", "STOWGATE_LISTEN"), ("api", "STOWGATE_LISTEN"), ("worker", "STOWGATE_WORKER_LISTEN")],
)
def test_an_address_in_use_stops_the_start_with_one_line(
    command: str, variable: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = run_stowgate(command, data=tmp_path, **{variable: address})

    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert f"{variable} is '{address}'" in line
    assert line.endswith(
        "it is in use; stop the other process, or set another port, or 0 for a free one"
    )


def test_an_api_with_the_memory_broker_warns_that_no_worker_is_notified(tmp_path: Path) -> None:
    with running("api", tmp_path) as api:
        assert api.get("/health/ready").ok
        warned = [line for line in api.log.read_text().splitlines() if '"warning"' in line]

    (line,) = warned
    assert "STOWGATE_BROKER=memory" in json.loads(line)["event"]


def test_a_relay_does_not_wait_for_a_worker_that_no_event_reaches(tmp_path: Path) -> None:
    instance = new_instance()
    with running("api", tmp_path) as api:
        answer = api.post("/dicomweb/studies", instance, "application/dicom")
    added = Records(FolderObjectStore(tmp_path / "stowgate")).find(answer.headers["X-Payload-ID"])

    assert added is not None
    assert added.record.lease is not None
    assert added.record.lease.until == added.record.due_at


def test_run_prints_the_public_url_that_senders_use(tmp_path: Path) -> None:
    public_url = "https://pacs.example/stow"
    with running("run", tmp_path, STOWGATE_PUBLIC_URL=public_url) as service:
        assert service.process.stdout
        told = service.process.stdout.readline()

    assert told.split() == ["send", "DICOM", "to", f"{public_url}/dicomweb/studies"]


def test_a_restarted_run_finds_the_payloads_of_the_previous_one(tmp_path: Path) -> None:
    with running("run", tmp_path) as first:
        answer = first.post("/dicomweb/studies", new_instance(), "application/dicom")
        payload_id = answer.headers["X-Payload-ID"]
        first.opened(payload_id)
        assert first.stop() == 0

    with running("run", tmp_path) as second:
        assert second.get(f"/payloads/{payload_id}").json()["state"] == "opened"


def _hang_up(service: Service) -> None:
    """Send SIGHUP to every process, as a closing terminal does."""
    for process_id in service.process_ids():
        os.kill(process_id, signal.SIGHUP)


@contextmanager
def _hang_up_means(action: signal.Handlers) -> Iterator[None]:
    """Set the disposition of SIGHUP that child processes inherit."""
    before = signal.signal(signal.SIGHUP, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def attached() -> Iterator[None]:
    """Child processes react to SIGHUP, even if the tests run under nohup(1)."""
    with _hang_up_means(signal.SIG_DFL):
        yield


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("command", ["run", "api", "worker"])
def test_a_service_ends_with_its_terminal(command: str, tmp_path: Path) -> None:
    with running(command, tmp_path) as service:
        assert service.get("/health/live").status_code == 200

        _hang_up(service)

        assert service.process.wait(60) == 0


@pytest.fixture
def detached() -> Iterator[None]:
    """Child processes ignore SIGHUP, as under nohup(1)."""
    with _hang_up_means(signal.SIG_IGN):
        yield


@pytest.mark.usefixtures("detached")
@pytest.mark.parametrize("command", ["run", "api", "worker"])
def test_a_detached_service_outlives_its_terminal(command: str, tmp_path: Path) -> None:
    with running(command, tmp_path) as service:
        assert service.get("/health/live").status_code == 200
        before = service.process_ids()

        _hang_up(service)

        assert service.get("/health/live").status_code == 200
        assert service.process_ids() == before
        assert service.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_change_the_number_of_gunicorn_processes_are_ignored(
    stowgate: Service, number: int
) -> None:
    assert stowgate.get("/health/live").status_code == 200
    status = Path(f"/proc/{stowgate.process.pid}/status").read_text()
    (ignored,) = re.findall(r"SigIgn:\s+([0-9a-f]+)", status)

    assert int(ignored, 16) >> (number - 1) & 1


def test_a_pending_payload_is_opened_after_the_next_start(tmp_path: Path) -> None:
    with running("api", tmp_path) as api:
        answer = api.post("/dicomweb/studies", new_instance(), "application/dicom")
        payload_id = answer.headers["X-Payload-ID"]
        assert api.get(f"/payloads/{payload_id}").json()["state"] == "pending"
        api.kill()

    with running("run", tmp_path) as pair:
        assert pair.opened(payload_id)["file_count"] == 1
        wait_for(lambda: pair.metric("stowgate_announced_again_total"))


def test_the_metrics_of_two_api_processes_are_added_up(tmp_path: Path) -> None:
    with running("api", tmp_path, STOWGATE_API_PROCESSES="2") as api:
        for _ in range(10):
            assert api.post("/dicomweb/studies", new_instance(), "application/dicom").ok

        def all_counted() -> bool:
            return 'stowgate_posts_total{status="200"} 10.0' in api.get("/metrics").text

        wait_for(all_counted, seconds=10)


def test_a_full_disk_of_temporary_files_crashes_no_api_process(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "small", mebibytes=1) as disk,
        running("api", tmp_path / "data", STOWGATE_API_PROCESSES="2", TMPDIR=str(disk)) as api,
    ):
        wait_for(lambda: len(api.process_ids()) == 3)
        assert api.get("/health/live").status_code == 200
        before = api.process_ids()
        with suppress(OSError):
            (disk / "full").write_bytes(bytes(2 << 20))

        for _ in range(10):
            assert api.post("/dicomweb/studies", new_instance(), "application/dicom").ok
        assert api.process_ids() == before
