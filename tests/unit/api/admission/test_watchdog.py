"""What ends the reads of senders that take too long."""

import threading
import time

import pytest
from service import wait_for

from api.admission.watchdog import Hourglass


class Sender:
    def __init__(self) -> None:
        self.cuts = 0

    def cut(self) -> None:
        self.cuts += 1


def test_a_lack_of_threads_for_a_moment_does_not_let_later_senders_take_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hourglass, first, late = Hourglass(), Sender(), Sender()

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as lack:
        lack.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            hourglass.turn(first, time.monotonic())

    hourglass.turn(late, time.monotonic())

    wait_for(lambda: late.cuts)
    assert first.cuts == 0
