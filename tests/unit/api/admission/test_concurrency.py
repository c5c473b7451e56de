"""Concurrent uploads: which one waits, and which one is cut."""

import pytest
from prometheus_client import CollectorRegistry

from api.admission.concurrency import UploadLimiter
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
def limiter() -> UploadLimiter:
    metrics = ApiMetrics(CollectorRegistry())
    return UploadLimiter(2, patience_seconds=PATIENCE_SECONDS, metrics=metrics)


def test_a_slot_that_is_released_is_free_again(limiter: UploadLimiter) -> None:
    assert [limiter.acquire(name) for name in "abc"] == [True, True, False]

    limiter.release("a")

    assert [limiter.acquire(name) for name in "cd"] == [True, False]


def test_an_upload_without_a_slot_is_refused(limiter: UploadLimiter) -> None:
    limiter.acquire("a")

    with pytest.raises(TooBusy), limiter.receiving("b", Upload()):
        pass

    assert limiter.acquire("b")


def test_the_upload_that_has_stalled_longest_is_cut_for_a_new_one(limiter: UploadLimiter) -> None:
    long, longest = Upload(PATIENCE_SECONDS), Upload(2 * PATIENCE_SECONDS)
    limiter.acquire("a")
    limiter.acquire("b")
    with limiter.receiving("a", long), limiter.receiving("b", longest):
        assert limiter.acquire("c")

        assert (long.was_cut, longest.was_cut) == (False, True)


def test_an_upload_that_has_not_stalled_for_long_keeps_its_slot(limiter: UploadLimiter) -> None:
    uploads = Upload(0.9 * PATIENCE_SECONDS), Upload()
    limiter.acquire("a")
    limiter.acquire("b")
    with limiter.receiving("a", uploads[0]), limiter.receiving("b", uploads[1]):
        assert not limiter.acquire("c")

    assert not any(upload.was_cut for upload in uploads)


def test_an_upload_that_is_being_answered_keeps_its_slot(limiter: UploadLimiter) -> None:
    limiter.acquire("a")
    limiter.acquire("b")
    with limiter.receiving("a", Upload(2 * PATIENCE_SECONDS)):
        pass

    assert not limiter.acquire("c")


def test_an_upload_that_was_cut_releases_no_slot_of_another(limiter: UploadLimiter) -> None:
    limiter.acquire("a")
    limiter.acquire("b")
    with limiter.receiving("a", Upload(PATIENCE_SECONDS)):
        assert limiter.acquire("c")
    limiter.release("a")

    assert not limiter.acquire("d")
