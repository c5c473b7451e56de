"""Announces new records to the workers, after the sender has its answer.

No request waits for it: the relay announces the record if this fails.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore

import structlog

from shared.errors import Transient
from shared.events import InstancesStored
from shared.runtime.metrics import ApiMetrics
from shared.trace_context import logged

_log = structlog.get_logger()

# Events that may wait for a slow broker; the relay sends any others.
_MAX_WAITING = 100


class Announcements:
    def __init__(
        self,
        announce: Callable[[InstancesStored], None],
        announcers: ThreadPoolExecutor | None,
        metrics: ApiMetrics,
    ) -> None:
        """`announce` runs in the threads of `announcers`. Without them it runs in the request's
        thread, for an `announce` that never waits."""
        self._announce = announce
        self._announcers = announcers
        self._may_wait = BoundedSemaphore(_MAX_WAITING)
        self._metrics = metrics

    def make(self, event: InstancesStored) -> None:
        if self._announcers is None:
            self._announce_or_leave(event)
        elif self._may_wait.acquire(blocking=False):
            self._announcers.submit(self._announce_in_turn, event)
        else:
            self._leave_to_relay(event, "too many events are waiting for the broker")

    def _announce_in_turn(self, event: InstancesStored) -> None:
        try:
            self._announce_or_leave(event)
        finally:
            self._may_wait.release()

    def _announce_or_leave(self, event: InstancesStored) -> None:
        try:
            self._announce(event)
        except Transient as error:
            self._leave_to_relay(event, str(error))

    def _leave_to_relay(self, event: InstancesStored, why: str) -> None:
        self._metrics.unannounced.inc()
        _log.warning(
            "event not announced; the relay will announce it",
            payload_id=event.payload_id,
            correlation_id=event.correlation_id,
            error=why,
            **logged(event.traceparent),
        )
