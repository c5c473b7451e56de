"""The bodies of requests that are not uploads."""

from functools import partial
from threading import BoundedSemaphore

from flask import request

from api.admission.body import RequestBody
from api.admission.watchdog import Watchdog
from api.http.problems import TooBusy

_MAX_BYTES = 1 << 20

_BODY_SECONDS = 5.0

# A stalled body blocks a thread for some seconds, so not all threads may receive one.
_MAX_BODIES = 2
_MAX_WAIT_SECONDS = 0.25


class SmallBodies:
    """Receives bodies of up to 1 MiB within five seconds, two at a time."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._receiving = BoundedSemaphore(_MAX_BODIES)

    def receive(self) -> bytes:
        """Read the body of the current request.

        Raises:
            BadRequest, TooLarge, SenderTooSlow: As `RequestBody` raises them.
            TooBusy: Two other bodies are being received.
        """
        body = RequestBody.of(
            request,
            limit_bytes=_MAX_BYTES,
            idle_seconds=_BODY_SECONDS,
            max_seconds=_BODY_SECONDS,
            watchdog=self._watchdog,
        )
        if not self._receiving.acquire(timeout=_MAX_WAIT_SECONDS):
            raise TooBusy("too many concurrent request bodies; send it again later")
        try:
            return b"".join(iter(partial(body.read, _MAX_BYTES), b""))
        finally:
            self._receiving.release()
