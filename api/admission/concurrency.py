"""How many uploads are received at a time, and which one gives way."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

from api.admission.watchdog import Watchdog
from api.http.problems import TooBusy

if TYPE_CHECKING:
    # The server is imported before prometheus_client may be.
    from shared.runtime.metrics import ApiMetrics

EXTENSION = "stowgate-admission"
"""Where the Flask application has its `Admission`, for the server, among its `extensions`."""


class Receiving(Protocol):
    """An upload, as far as it has to do with the others."""

    def stalled_seconds(self) -> float:
        """For how long its sender has kept it waiting; for another thread."""

    def cut(self) -> None:
        """End it with 408; for another thread."""


class UploadLimiter:
    """For `most` uploads at a time, each known by its connection. Safe between threads.

    The server takes a slot for an upload before it gives it a thread, and gives it back when that
    is done; until one is free the upload waits without a thread (`api/server/worker.py`).

    When all slots are taken, the upload whose sender has stalled for the longest gives way, if that
    is for longer than `patience_seconds`. So senders that stall keep nobody out for long, while
    there is room they have the time that they need, and one that is only slow never gives way.
    """

    def __init__(self, most: int, *, patience_seconds: float, metrics: "ApiMetrics") -> None:
        self._most = most
        self._patience_seconds = patience_seconds
        self._metrics = metrics
        self._lock = threading.Lock()
        # None before the body of the upload is read, and behind it.
        self._uploads: dict[Hashable, Receiving | None] = {}

    def acquire(self, connection: Hashable) -> bool:
        """Whether it has a slot now. It never waits."""
        with self._lock:
            if len(self._uploads) >= self._most and not self._one_gave_way():
                return False
            self._uploads[connection] = None
            return True

    def release(self, connection: Hashable) -> None:
        """Nothing happens where it has no slot, or none any more."""
        with self._lock:
            self._uploads.pop(connection, None)

    def waiting(self, count: int) -> None:
        """So many uploads wait for a slot now."""
        self._metrics.uploads_waiting.set(count)

    @contextmanager
    def receiving(self, connection: Hashable, upload: Receiving) -> Iterator[None]:
        """From now on `upload` may have to give way. Raises `TooBusy` without a slot."""
        if not self._set(connection, upload):
            raise TooBusy(
                "the uploads in progress are as many as are taken at a time "
                f"({self._most}); send it again later"
            )
        try:
            with self._metrics.uploads.track_inprogress():
                yield
        finally:
            self._set(connection, None)

    def _set(self, connection: Hashable, upload: Receiving | None) -> bool:
        with self._lock:
            has_slot = connection in self._uploads
            if has_slot:
                self._uploads[connection] = upload
            return has_slot

    def _one_gave_way(self) -> bool:
        """Its thread ends in a moment; its slot is free at once."""
        stalled = [
            (upload.stalled_seconds(), connection, upload)
            for connection, upload in self._uploads.items()
            if upload is not None
        ]
        seconds, connection, upload = max(stalled, key=itemgetter(0), default=(0.0, None, None))
        if upload is None or seconds < self._patience_seconds:
            return False
        del self._uploads[connection]
        upload.cut()
        return True


@dataclass(frozen=True)
class Admission:
    """What the server and the application share."""

    limiter: UploadLimiter
    watchdog: Watchdog
