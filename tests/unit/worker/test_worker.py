"""The composition and the shutdown of a worker, over real folder stores."""

import threading
from collections.abc import Sequence
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry
from service import wait_for

from shared.ids import PayloadIds
from shared.runtime.backends import Backends, open_backends
from shared.settings.loader import load
from shared.sweep_cursor import CURSOR, SweepCursor
from shared.time import utc_now
from worker.leader import SoleLeader
from worker.main import Routine, Worker, compose
from worker.pending_cleanup import PendingCleanup
from worker.settings import WorkerSettings

UPLOAD = timedelta(seconds=1000)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    monkeypatch.setenv("STOWGATE_DATA", str(tmp_path))
    monkeypatch.setenv("STOWGATE_MAX_UPLOAD_SECONDS", str(int(UPLOAD.total_seconds())))
    return load(WorkerSettings)


@pytest.fixture
def backends(settings: WorkerSettings) -> Backends:
    opened = open_backends(settings, store_threads=4)
    opened.instances.prepare()
    opened.state.prepare()
    return opened


def test_the_sweep_keeps_an_upload_for_twice_its_maximum_duration(
    settings: WorkerSettings, backends: Backends
) -> None:
    now = utc_now()
    payload_ids = PayloadIds(settings.state_bucket)
    SweepCursor(
        state=backends.state,
        instances=backends.instances,
        payload_ids=payload_ids,
        clock=lambda: now - timedelta(days=1),
    ).read()
    begun = backends.state.get(CURSOR).version
    left, swept = (payload_ids.mint(now - UPLOAD * times) for times in (1.9, 2.1))
    for payload_id in (left, swept):
        backends.instances.put(f"{payload_id}/dcm/1/2/3.dcm", BytesIO(b"x"), 1, "application/dicom")

    worker = compose(settings, backends, CollectorRegistry())
    worker.start()
    wait_for(lambda: backends.state.get(CURSOR).version != begun)
    worker.stop()

    assert list(backends.instances.folders("")) == [left]


def test_a_service_starts_with_an_unreadable_sweep_cursor(backends: Backends) -> None:
    backends.state.create(CURSOR, b"{", "application/json")

    with structlog.testing.capture_logs() as log:
        backends.prepare()

    assert [line["event"] for line in log] == ["object store ready"]


def _with_a_leftover(
    settings: WorkerSettings,
    backends: Backends,
    routines: Sequence[Routine] = (),
    routines_end_seconds: float = 60,
) -> Worker:
    cleanup = PendingCleanup(backends.state)
    composed = compose(settings, backends, CollectorRegistry())
    backends.state.create("pending/opened", b"{}", "application/json")
    cleanup.add(["pending/opened"])
    return Worker(
        backends.consumer,
        composed._handler,
        routines,
        cleanup,
        SoleLeader(),
        routines_end_seconds,
        dead_letters=backends.dead_letters,
        note_refusal=composed._note_refusal,
        replays=composed._replays,
    )


def test_a_stopping_worker_removes_the_leftovers_of_opened_records(
    settings: WorkerSettings, backends: Backends
) -> None:
    worker = _with_a_leftover(settings, backends)
    worker.start()

    worker.stop()

    assert list(backends.state.list("pending/")) == []


def test_a_stopping_worker_sends_no_request_to_a_store_that_blocks_a_routine(
    settings: WorkerSettings, backends: Backends
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def ask() -> None:
        asked.set()
        answered.wait(60)

    worker = _with_a_leftover(settings, backends, [Routine("relay", ask, 1)], 0.1)
    worker.start()
    asked.wait(60)

    worker.stop()

    assert len(list(backends.state.list("pending/"))) == 1
    answered.set()
