"""The limit of concurrent uploads, and which upload is aborted for a new one."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

from api.admission.watchdog import Watchdog
from api.http.problems import TooBusy

if TYPE_CHECKING:
    # The server imports this module before prometheus_client may be imported.
    from shared.runtime.metrics import ApiMetrics

EXTENSION = "stowgate-admission"
"""The key of the `Admission` in the `extensions` of the Flask application, for the server."""


class Receiving(Protocol):
    """An upload that may be aborted. Other threads call its methods."""

    def stalled_seconds(self) -> float:
        """Return how long the sender has stalled."""

    def cut(self) -> None:
        """Abort the upload with 408."""


class UploadLimiter:
    """Limits concurrent uploads, each identified by its connection. Thread-safe.

    The server acquires a slot for an upload before it assigns a thread, and releases the slot when
    the request is done. Until a slot is free, the upload waits without a thread
    (`api/server/worker.py`).

    When all slots are in use, the upload that has stalled longest is aborted for a new one. So
    stalled senders cannot block others, and a sender that is only slow is never aborted.

    Args:
        max_uploads: The number of slots.
        patience_seconds: How long an upload may stall before it is aborted for another one.
        metrics: Count the uploads that wait or are received.
    """

    def __init__(self, max_uploads: int, *, patience_seconds: float, metrics: "ApiMetrics") -> None:
        self._max_uploads = max_uploads
        self._patience_seconds = patience_seconds
        self._metrics = metrics
        self._lock = threading.Lock()
        # None before and after the upload's body is read.
        self._uploads: dict[Hashable, Receiving | None] = {}

    @property
    def uploads(self) -> int:
        """The number of uploads with a slot."""
        with self._lock:
            return len(self._uploads)

    def acquire(self, connection: Hashable) -> bool:
        """Try to acquire a slot, without waiting."""
        with self._lock:
            if len(self._uploads) >= self._max_uploads and not self._abort_one():
                return False
            self._uploads[connection] = None
            return True

    def release(self, connection: Hashable) -> None:
        """Release the slot of `connection`, if it has one."""
        with self._lock:
            self._uploads.pop(connection, None)

    def waiting(self, count: int) -> None:
        """Report the number of uploads that wait for a slot."""
        self._metrics.uploads_waiting.set(count)

    @contextmanager
    def receiving(self, connection: Hashable, upload: Receiving) -> Iterator[None]:
        """Let `upload` be aborted for others while it is received.

        Raises:
            TooBusy: The connection has no slot.
        """
        if not self._set(connection, upload):
            raise TooBusy(
                f"too many concurrent uploads (limit: {self._max_uploads}); send it again later"
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

    def _abort_one(self) -> bool:
        """Frees the slot at once; the thread ends a moment later."""
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
    """The limits that the server and the application share."""

    limiter: UploadLimiter
    watchdog: Watchdog
