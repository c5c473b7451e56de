"""Announces pending records again: never announced, due for another attempt, or left by a crashed
worker.

An event only says that a record should be read, so a superfluous event costs nothing, and a missing
one costs a pause of the relay. A short queue is filled up. Behind a long queue most due records are
already in it, and the relay cannot tell which: each pass then announces a few, and the same record
at growing intervals. So no record starves, and the queue hardly grows.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain, islice, zip_longest

import structlog

from shared.errors import StowgateError
from shared.events import InstancesStored
from shared.ports import ListedObject, Publication
from shared.record_store import Records
from shared.records import IngestRecord, State, payload_id_of
from shared.runtime.metrics import WorkerMetrics
from shared.time import MAX_AHEAD, Clock, has_ended, utc_now
from shared.trace_context import logged

_log = structlog.get_logger()

# The queue is filled up to this many waiting events.
_SHORT_QUEUE = 100

# Announced in each pass even with a long queue.
_MIN_ANNOUNCED = 10

# Read in each pass, so that a relay that starts with many records soon announces some.
_MAX_READ = 1000

# Pause before a record is announced again. Behind a long queue it doubles with each announcement
# that no worker has handled.
_AGAIN = timedelta(seconds=30)
_MAX_DOUBLINGS = 7

# A settled record still in pending/ after this time was left by a crashed worker. Moving it earlier
# could collide with the worker that settled it.
_LEFTOVER = timedelta(seconds=60)

_POLL_SECONDS = 1.0


@dataclass(slots=True)
class _Seen:
    """A version of a record, and its announcements. Without `correlation_id` it was unreadable.

    `listed` identifies the version. Some stores list times in full seconds, in which a record may
    change twice; then its size differs.
    """

    listed: ListedObject
    due_at: datetime
    attempts: int = 0
    correlation_id: str | None = None
    traceparent: str | None = None
    announced_at: datetime | None = None
    announcements: int = 0

    def not_before(self, queue_is_long: bool) -> datetime:
        if self.announced_at is None:
            return self.due_at
        doublings = min(self.announcements - 1, _MAX_DOUBLINGS) if queue_is_long else 0
        return max(self.due_at, self.announced_at + _AGAIN * (1 << doublings))


class Relay:
    def __init__(
        self,
        *,
        records: Records,
        announce: Callable[[InstancesStored], Publication],
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

    def run_once(self) -> bool:
        """Run one pass over the pending records; return whether it finished.

        Errors of the object store and of the broker are logged and end the pass.
        """
        try:
            pending = self._records.pending()
            self._measure(pending)
            self._announce_due(pending)
        except StowgateError as error:
            _log.warning("relay did not finish its pass", error=str(error))
            return False
        return True

    def stand_by(self) -> None:
        """Forget everything: another worker's relay announces and measures."""
        self._metrics.backlog.forget()
        self._seen.clear()

    def _measure(self, pending: list[ListedObject]) -> None:
        failed = self._records.failed(pending)
        oldest_pending = payload_id_of(pending[0].key) if pending else None
        oldest_failed = failed[-1] if failed else None
        self._metrics.backlog.measured("pending", len(pending), oldest_pending)
        self._metrics.backlog.measured("failed", len(failed), oldest_failed)

    def _announce_due(self, pending: list[ListedObject]) -> None:
        now = self._clock()
        self._forget_changed(pending, now)
        backlog = self._backlog()
        self._metrics.backlog.measured_queue(backlog)
        self._read_unseen(pending, now)
        room = max(_SHORT_QUEUE - backlog, _MIN_ANNOUNCED)
        due = self._due(pending, now, queue_is_long=backlog > _SHORT_QUEUE - _MIN_ANNOUNCED)
        self._announce_all(islice(due, room), now)

    def _forget_changed(self, pending: list[ListedObject], now: datetime) -> None:
        now_listed = {listed.key: listed for listed in pending}
        self._seen = {
            key: seen
            for key, seen in self._seen.items()
            if now_listed.get(key) == seen.listed
            and seen.not_before(queue_is_long=True) <= now + MAX_AHEAD
            and (seen.correlation_id is not None or seen.due_at > now)
        }

    def _read_unseen(self, pending: list[ListedObject], now: datetime) -> None:
        unseen = (listed for listed in pending if listed.key not in self._seen)
        for listed in islice(unseen, _MAX_READ):
            try:
                versioned = self._records.read(listed.key)
            except StowgateError as error:
                # If the store answers, the error concerns this record only.
                self._records.ping()
                _log.error("record skipped", error=str(error))
                versioned = None
            if versioned is None:
                self._seen[listed.key] = _Seen(listed, now + _AGAIN)
            elif versioned.record.state is State.PENDING:
                self._seen[listed.key] = _Seen(
                    listed,
                    _due_at(versioned.record, now),
                    versioned.record.attempts,
                    versioned.record.correlation_id,
                    versioned.record.traceparent,
                )
            elif has_ended(listed.modified_at + _LEFTOVER, now):
                self._records.move(versioned)

    def _due(
        self, pending: list[ListedObject], now: datetime, queue_is_long: bool
    ) -> Iterator[str]:
        """Return the keys of due records: those with the fewest announcements first, then the
        oldest. New records and retries alternate, so that neither kind delays the other."""
        due = [
            listed.key
            for listed in pending
            if (seen := self._seen.get(listed.key)) is not None
            and seen.correlation_id is not None
            and seen.not_before(queue_is_long) <= now
        ]
        due.sort(key=lambda key: self._seen[key].announcements)
        fresh = [key for key in due if not self._seen[key].attempts]
        tried = [key for key in due if self._seen[key].attempts]
        return filter(None, chain.from_iterable(zip_longest(fresh, tried)))

    def _announce_all(self, keys: Iterable[str], now: datetime) -> None:
        """Send all before waiting for a confirm, as a slow broker may take seconds for each."""
        under_way: list[tuple[str, Publication]] = []
        failure: StowgateError | None = None
        for key in keys:
            seen = self._seen[key]
            event = InstancesStored(payload_id_of(key), seen.correlation_id or "", seen.traceparent)
            try:
                under_way.append((key, self._announce(event)))
            except StowgateError as error:
                failure = error
                break
        for key, publication in under_way:
            try:
                # An overdue event was sent too.
                while not publication.wait(_POLL_SECONDS) and publication.overdue is None:
                    pass
            except StowgateError as error:
                failure = error
            else:
                self._note_announced(key, now)
        if failure is not None:
            raise failure

    def _note_announced(self, key: str, now: datetime) -> None:
        seen = self._seen[key]
        seen.announced_at = now
        seen.announcements += 1
        self._metrics.announced_again.inc()
        _log.info(
            "announced again",
            payload_id=payload_id_of(key),
            attempts=seen.attempts,
            **logged(seen.traceparent),
        )


def _due_at(record: IngestRecord, now: datetime) -> datetime:
    moments = [record.due_at, record.lease.until] if record.lease else [record.due_at]
    return max((moment for moment in moments if not has_ended(moment, now)), default=now)
