"""How many uploads are received at a time, which wait for that, and which one gives way."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from api.problems import TooBusy
from shared.metrics import ApiMetrics

_LOOK_SECONDS = 0.5


class Receiving(Protocol):
    """An upload, as far as it has to do with the others."""

    def stalled_seconds(self) -> float:
        """For how long its sender has kept it waiting; for another thread."""

    def cut(self) -> None:
        """End it with 408; for another thread."""


class Slots:
    """For `most` uploads at a time. Safe between threads.

    Up to `most_waiting` more wait for their turn, in the order in which they came, each for
    `wait_seconds` at most; all others are turned away at once.

    When all slots are taken, the upload whose sender has stalled for the longest gives way, if that
    is for longer than `patience_seconds`. So senders that stall keep nobody out for long, while
    there is room they have the time that they need, and one that is only slow never gives way.
    """

    def __init__(
        self,
        most: int,
        most_waiting: int,
        *,
        wait_seconds: float,
        patience_seconds: float,
        metrics: ApiMetrics,
    ) -> None:
        self._most = most
        self._most_waiting = most_waiting
        self._wait_seconds = wait_seconds
        self._patience_seconds = patience_seconds
        self._metrics = metrics
        self._changed = threading.Condition()
        self._uploads: set[Receiving] = set()
        self._waiting: deque[Receiving] = deque()

    @contextmanager
    def taken(self, upload: Receiving) -> Iterator[None]:
        """Raises `TooBusy`."""
        with self._changed:
            if self._waiting or not self._has_room():
                with self._metrics.uploads_waiting.track_inprogress():
                    self._wait(upload)
            self._uploads.add(upload)
        try:
            with self._metrics.uploads.track_inprogress():
                yield
        finally:
            with self._changed:
                self._uploads.discard(upload)
                self._changed.notify_all()

    def _wait(self, upload: Receiving) -> None:
        if len(self._waiting) >= self._most_waiting:
            raise self._too_busy()
        end = time.monotonic() + self._wait_seconds
        self._waiting.append(upload)
        try:
            while self._waiting[0] is not upload or not self._has_room():
                left_seconds = end - time.monotonic()
                if left_seconds <= 0:
                    raise self._too_busy()
                self._changed.wait(min(left_seconds, _LOOK_SECONDS))
        finally:
            self._waiting.remove(upload)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Made by the upload that gives way, where there is none; its thread ends in a moment."""
        if len(self._uploads) < self._most:
            return True
        stalled = {upload: upload.stalled_seconds() for upload in self._uploads}
        slowest = max(stalled, key=lambda upload: stalled[upload])
        if stalled[slowest] < self._patience_seconds:
            return False
        self._uploads.discard(slowest)
        slowest.cut()
        return True

    def _too_busy(self) -> TooBusy:
        return TooBusy(
            f"the uploads in progress are as many as are taken at a time ({self._most}); "
            "send it again later"
        )
