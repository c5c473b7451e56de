"""How many uploads are received at a time, and which one gives way to another."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from api.problems import TooBusy


class Upload(Protocol):
    awaited_since: float | None
    """When its sender was asked for the piece that is still to come, by the monotonic clock."""

    def cut(self) -> None:
        """End it with 408; for another thread."""


class Slots:
    """For `most` uploads at a time. Safe between threads.

    When all are taken, the one that has been waiting for its sender the longest gives way, if that
    is for longer than `patience_seconds`. So senders that stall keep nobody out for long, and while
    there is room a slow one has the time that it needs.
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
        waiting = {u: since for u in self._uploads if (since := u.awaited_since) is not None}
        slowest = min(waiting, key=lambda upload: waiting[upload], default=None)
        if slowest is None or time.monotonic() - waiting[slowest] < self._patience_seconds:
            raise TooBusy(
                f"{self._most} uploads are in progress, as many as are taken at a time; send it "
                "again later"
            )
        self._uploads.discard(slowest)
        slowest.cut()
