"""Who has a slot, and who gives way."""

import pytest
from prometheus_client import CollectorRegistry

from api.admission.concurrency import Slots
from api.http.problems import TooBusy
from shared.runtime.metrics import ApiMetrics

PATIENCE_SECONDS = 5.0


class Upload:
    def __init__(self, stalled_seconds: float = 0.0) -> None:
        self.was_cut = False
        self._stalled_seconds = stalled_seconds

    def stalled_seconds(self) -> float:
        return self._stalled_seconds

    def cut(self) -> None:
        self.was_cut = True


@pytest.fixture
def slots() -> Slots:
    metrics = ApiMetrics(CollectorRegistry())
    return Slots(2, patience_seconds=PATIENCE_SECONDS, metrics=metrics)


def test_there_are_so_many_slots_and_one_that_is_given_back_is_free(slots: Slots) -> None:
    assert [slots.take(name) for name in "abc"] == [True, True, False]

    slots.give_back("a")

    assert [slots.take(name) for name in "cd"] == [True, False]


def test_an_upload_without_a_slot_is_refused_and_takes_none(slots: Slots) -> None:
    slots.take("a")

    with pytest.raises(TooBusy), slots.receiving("b", Upload()):
        pass

    assert slots.take("b")


def test_the_one_that_has_stalled_for_the_longest_gives_way(slots: Slots) -> None:
    long, longest = Upload(PATIENCE_SECONDS), Upload(2 * PATIENCE_SECONDS)
    slots.take("a")
    slots.take("b")
    with slots.receiving("a", long), slots.receiving("b", longest):
        assert slots.take("c")

        assert (long.was_cut, longest.was_cut) == (False, True)


def test_one_that_has_not_stalled_for_long_keeps_its_slot(slots: Slots) -> None:
    uploads = Upload(0.9 * PATIENCE_SECONDS), Upload()
    slots.take("a")
    slots.take("b")
    with slots.receiving("a", uploads[0]), slots.receiving("b", uploads[1]):
        assert not slots.take("c")

    assert not any(upload.was_cut for upload in uploads)


def test_one_that_is_being_answered_keeps_its_slot(slots: Slots) -> None:
    slots.take("a")
    slots.take("b")
    with slots.receiving("a", Upload(2 * PATIENCE_SECONDS)):
        pass

    assert not slots.take("c")


def test_one_that_gave_way_gives_nothing_back(slots: Slots) -> None:
    slots.take("a")
    slots.take("b")
    with slots.receiving("a", Upload(PATIENCE_SECONDS)):
        assert slots.take("c")
    slots.give_back("a")

    assert not slots.take("d")
