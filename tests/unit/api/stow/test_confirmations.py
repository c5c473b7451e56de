"""The thread that confirms new records to the sweep."""

import threading

import structlog
from service import wait_for

from api.stow.confirmations import Confirmations
from shared.errors import StoreUnavailable


class Confirmer:
    """Counts its calls, and raises given errors first."""

    def __init__(self, *errors: Exception) -> None:
        self.calls = 0
        self._errors = list(errors)
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self) -> None:
        self.calls += 1
        self.go_on.wait()
        if self._errors:
            raise self._errors.pop(0)


def started(confirmer: Confirmer) -> Confirmations:
    confirmations = Confirmations(confirmer, pause_seconds=0.01)
    confirmations.start()
    return confirmations


def test_several_records_are_confirmed_by_one_call() -> None:
    confirmer = Confirmer()
    confirmations = started(confirmer)
    confirmer.go_on.clear()

    confirmations.recorded()
    wait_for(lambda: confirmer.calls == 1)
    for _ in range(100):
        confirmations.recorded()
    confirmer.go_on.set()

    wait_for(lambda: confirmer.calls == 2)
    confirmations.recorded()
    wait_for(lambda: confirmer.calls == 3)


def test_nothing_is_confirmed_without_new_records() -> None:
    confirmer = Confirmer()
    confirmations = started(confirmer)
    confirmations.recorded()

    wait_for(lambda: confirmer.calls == 1)
    wait_for(lambda: not confirmations._recorded.is_set())

    assert confirmer.calls == 1


def test_a_failed_confirmation_is_retried_after_any_error() -> None:
    confirmer = Confirmer(StoreUnavailable("away"), RuntimeError("cannot start new thread"))

    with structlog.testing.capture_logs() as log:
        started(confirmer).recorded()
        wait_for(lambda: confirmer.calls == 3)

    assert log[0]["error"] == "away"
    assert log[1]["error"].startswith("RuntimeError at ")
