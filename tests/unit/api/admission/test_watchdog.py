"""The watchdog, which ends reads from senders that are too slow."""

import threading
import time

import pytest
from service import wait_for

from api.admission.watchdog import Watchdog


class Sender:
    def __init__(self) -> None:
        self.cuts = 0

    def cut(self) -> None:
        self.cuts += 1


def test_a_sender_that_is_late_is_cut_until_its_read_ends() -> None:
    watchdog, late = Watchdog(), Sender()

    watchdog.watch(late, time.monotonic())

    wait_for(lambda: late.cuts >= 2)


def test_a_sender_that_has_finished_is_not_cut() -> None:
    watchdog, finished, late = Watchdog(), Sender(), Sender()
    watchdog.watch(finished, time.monotonic())
    watchdog.stop(finished)

    watchdog.watch(late, time.monotonic())

    wait_for(lambda: late.cuts)
    assert finished.cuts == 0


def test_a_sender_that_is_in_time_is_not_cut() -> None:
    watchdog, in_time, late = Watchdog(), Sender(), Sender()
    watchdog.watch(in_time, time.monotonic() + 3600)

    watchdog.watch(late, time.monotonic())

    wait_for(lambda: late.cuts)
    assert in_time.cuts == 0


def test_a_temporary_lack_of_threads_does_not_switch_the_watchdog_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watchdog, first, late = Watchdog(), Sender(), Sender()

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as lack:
        lack.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            watchdog.watch(first, time.monotonic())

    watchdog.watch(late, time.monotonic())

    wait_for(lambda: late.cuts)
    assert first.cuts == 0
