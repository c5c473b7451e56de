"""How many uploads are received at a time, and which one gives way to another."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from api.problems import TooBusy


class Upload(Protocol):
    def stalled_seconds(self) -> float:
        """For how long its sender has kept it waiting; for another thread."""

    def cut(self) -> None:
        """End it with 408; for another thread."""


class Slots:
    """For `most` uploads at a time. Safe between threads.

    When all are taken, the one whose sender has stalled for the longest gives way, if that is for
    longer than `patience_seconds`. So senders that stall keep nobody out for long, while there is
    room they have the time that they need, and one that is only slow never gives way.
    """

    def __init__(self, most: int, patience_seconds: float) -> None:
        self._most = most
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._uploads: set[Upload] = set()

    @contextmanager
    def taken(self, upload: Upload) -> Iterator[None]:
        """Raises `TooBusy`."""
        with self._lock:
            if len(self._uploads) >= self._most:
                self._make_room()
            self._uploads.add(upload)
        try:
            yield
        finally:
            with self._lock:
                self._uploads.discard(upload)

    def _make_room(self) -> None:
        """The thread of the one that is cut ends in a moment; its slot is free at once."""
        stalled = {upload: upload.stalled_seconds() for upload in self._uploads}
        slowest = max(stalled, key=lambda upload: stalled[upload])
        if stalled[slowest] < self._patience_seconds:
            raise TooBusy(
                f"{self._most} uploads are in progress, as many as are taken at a time; send it "
                "again later"
            )
        self._uploads.discard(slowest)
        slowest.cut()
