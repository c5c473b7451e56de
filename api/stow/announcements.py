"""Telling the workers of what was recorded, once its sender has the answer.

Nobody waits for it: what is recorded will be opened, told or not.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore

import structlog

from shared.errors import Transient
from shared.events import InstancesStored
from shared.runtime.metrics import ApiMetrics

_log = structlog.get_logger()

# For a slow broker; those beyond are the relay's.
_MAX_WAITING = 100


class Announcements:
    def __init__(
        self,
        announce: Callable[[InstancesStored], None],
        announcers: ThreadPoolExecutor | None,
        metrics: ApiMetrics,
    ) -> None:
        """`announce` is called by `announcers`, or without them by whoever serves the request:
        where it waits for nobody, another thread only costs time."""
        self._announce = announce
        self._announcers = announcers
        self._may_wait = BoundedSemaphore(_MAX_WAITING)
        self._metrics = metrics

    def make(self, payload_id: str, correlation_id: str) -> None:
        event = InstancesStored(payload_id, correlation_id)
        if self._announcers is None:
            self._tell_workers(event)
        elif self._may_wait.acquire(blocking=False):
            self._announcers.submit(self._tell_in_turn, event)
        else:
            self._leave_to_relay(event, "too many wait for the broker already")

    def _tell_in_turn(self, event: InstancesStored) -> None:
        try:
            self._tell_workers(event)
        finally:
            self._may_wait.release()

    def _tell_workers(self, event: InstancesStored) -> None:
        try:
            self._announce(event)
        except Transient as error:
            self._leave_to_relay(event, str(error))

    def _leave_to_relay(self, event: InstancesStored, why: str) -> None:
        self._metrics.unannounced.inc()
        _log.warning(
            "event not announced; the relay will",
            payload_id=event.payload_id,
            correlation_id=event.correlation_id,
            error=why,
        )
