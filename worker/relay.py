"""Announces again what is due: never announced, waiting for another attempt, or left by a worker
that died.

The record is the truth and the event only a bell, so an event too many costs nothing and one too
few costs this relay's pause. It rings while the queue is short: what is in a long queue is not
lost. Any number of relays may run.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple

import structlog

from shared.errors import StowgateError
from shared.events import InstancesStored
from shared.ids import minted_at
from shared.metrics import WorkerMetrics
from shared.ports import ListedObject
from shared.records import (
    IngestRecord,
    Records,
    State,
    payload_id_of,
)
from shared.time import MAX_AHEAD, Clock, has_ended, utc_now

_log = structlog.get_logger()

# Above this many waiting events the queue is a backlog.
_SHORT_QUEUE = 100

# After an announcement a record is left alone for this long.
_AGAIN = timedelta(seconds=30)

# A record that is settled and still in pending/ for this long was left by a worker that died. To
# move one earlier could collide with the worker that is moving it.
_LEFT = timedelta(seconds=60)


class _Seen(NamedTuple):
    """A version of a record that was read: when it is next of interest, and how often tried."""

    modified_at: datetime
    not_before: datetime
    attempts: int


class Relay:
    def __init__(
        self,
        *,
        records: Records,
        announce: Callable[[InstancesStored], None],
        backlog: Callable[[], int],
        metrics: WorkerMetrics,
        clock: Clock = utc_now,
    ) -> None:
        self._records = records
        self._announce = announce
        self._backlog = backlog
        self._metrics = metrics
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def look(self) -> None:
        """One pass over the pending records. Errors of the engines end it and are logged."""
        try:
            pending = self._records.pending()
            self._measure(pending)
            self._announce_due(pending)
        except StowgateError as error:
            _log.warning("relay could not finish its pass", error=str(error))

    def _measure(self, pending: list[ListedObject]) -> None:
        self._metrics.pending.set(len(pending))
        now = self._clock()
        received_at = minted_at(payload_id_of(pending[0].key)) if pending else now
        self._metrics.oldest_pending_seconds.set(max(0.0, (now - received_at).total_seconds()))
        self._metrics.failed.set(self._records.failed(pending))

    def _announce_due(self, pending: list[ListedObject]) -> None:
        """`_seen` remembers what was read, so that a pass reads only what changed or is due.

        What was tried the least comes first, lest many that fail again and again keep it waiting.
        """
        now = self._clock()
        listed_at = {listed.key: listed.modified_at for listed in pending}
        self._seen = {
            key: seen
            for key, seen in self._seen.items()
            if listed_at.get(key) == seen.modified_at and seen.not_before <= now + MAX_AHEAD
        }
        room = _SHORT_QUEUE - self._backlog()
        for listed in sorted(pending, key=self._attempts):
            seen = self._seen.get(listed.key)
            if room <= 0 or (seen is not None and seen.not_before > now):
                continue
            try:
                held = self._records.read(listed.key)
            except StowgateError as error:
                # Unreadable, or the store keeps that one from us; the others are no worse for it.
                self._records.ping()
                _log.error("record passed over", error=str(error))
                held = None
            if held is None:
                self._seen[listed.key] = _Seen(listed.modified_at, now + _AGAIN, 0)
                continue
            if held.record.state is not State.PENDING:
                if has_ended(listed.modified_at + _LEFT, now):
                    self._records.move(held)
                continue
            when = _due(held.record, now)
            if when <= now:
                self._announce_again(held.record)
                room -= 1
                when = now + _AGAIN
            self._seen[listed.key] = _Seen(listed.modified_at, when, held.record.attempts)

    def _attempts(self, listed: ListedObject) -> int:
        """As far as is known: of what is new or changed it is not, and that is to be read."""
        seen = self._seen.get(listed.key)
        return seen.attempts if seen else 0

    def _announce_again(self, record: IngestRecord) -> None:
        self._announce(InstancesStored(record.payload_id, record.correlation_id))
        self._metrics.announced_again.inc()
        _log.info("announced again", payload_id=record.payload_id, attempts=record.attempts)


def _due(record: IngestRecord, now: datetime) -> datetime:
    moments = [record.due_at, record.lease.until] if record.lease else [record.due_at]
    return max((moment for moment in moments if not has_ended(moment, now)), default=now)
