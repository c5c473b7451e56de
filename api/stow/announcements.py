"""Announces new records and replays to the workers.

Nothing waits for the broker's confirm; if the broker does not accept an event, the relay finds the
record or the replay.
"""

from collections.abc import Callable
from functools import partial

import structlog

from shared.errors import StowgateError
from shared.events import InstancesStored
from shared.ports import Publication
from shared.runtime.metrics import ApiMetrics
from shared.trace_context import logged

_log = structlog.get_logger()


class Announcements:
    def __init__(
        self, announce: Callable[[InstancesStored], Publication], metrics: ApiMetrics
    ) -> None:
        """`announce` publishes an event, and does not wait for the confirm."""
        self._announce = announce
        self._metrics = metrics

    def make(self, event: InstancesStored) -> None:
        settled = partial(self._settled, event)
        try:
            publication = self._announce(event)
        except StowgateError as error:
            settled(error)
        else:
            publication.on_settled(settled)

    def _settled(self, event: InstancesStored, error: BaseException | None) -> None:
        if error is None:
            return
        self._metrics.unannounced.inc()
        _log.warning(
            "event not announced; the relay will announce it",
            payload_id=event.payload_id,
            correlation_id=event.correlation_id,
            error=str(error),
            **logged(event.traceparent),
        )
