"""Pools when the system refuses further threads."""

import threading
from concurrent.futures import wait

import pytest
from service import wait_for

from shared.runtime.threads import started_pool


def _no_more_threads_than(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_one_of_few(thread: threading.Thread) -> None:
        if len(started) == count:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one_of_few)


def test_a_pool_uses_all_its_threads_when_the_system_has_none_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = started_pool(3, "pool")
    _no_more_threads_than(0, monkeypatch)
    together = threading.Barrier(3)

    done = wait([pool.submit(together.wait) for _ in range(3)], timeout=30).done

    assert len(done) == 3


def test_a_pool_that_cannot_start_all_threads_keeps_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _no_more_threads_than(2, monkeypatch)

    with pytest.raises(RuntimeError, match="can't start new thread"):
        started_pool(3, "too-wide")

    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("too-wide")])
