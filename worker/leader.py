"""Leader election: the worker that holds the lease in the state bucket relays and sweeps.

Two leaders at once, as with differing clocks, do no harm: they do the same work twice.
"""

import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

import orjson
import structlog

from shared import versions
from shared.errors import ObjectMissing, StowgateError, VersionConflict
from shared.ports import ObjectStore
from shared.records import Lease
from shared.time import Clock, iso_utc, utc_now

_log = structlog.get_logger()

LEASE_KEY = "leader/lease.json"

VERSION = 1

_JSON = "application/json"

# The followers together read the lease as often as this number of workers would.
_READERS = 5


class Leadership(Protocol):
    def leads(self) -> bool:
        """Whether this worker leads now."""

    def release(self) -> None:
        """Let another worker lead at once."""


class SoleLeader:
    """The leadership of an embedded worker, whose events reach no other process."""

    def leads(self) -> bool:
        return True

    def release(self) -> None:
        """Does nothing."""


class LeaderLease:
    """Acquires and renews the lease whenever `leads` is called. Safe between threads."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        owner: str,
        duration: timedelta,
        workers: Callable[[], int],
        clock: Clock = utc_now,
    ) -> None:
        """`owner` identifies this worker and is unique. Another worker takes over from a crashed
        leader after `duration`. `workers` returns the number of workers."""
        self._store = store
        self._owner = owner
        self._duration = duration
        self._workers = workers
        self._clock = clock
        self._lock = threading.Lock()
        # The version of the lease while this worker holds it, else None.
        self._version: str | None = None
        self._until = self._checked_at = self._next_check = datetime.min.replace(tzinfo=UTC)

    def leads(self) -> bool:
        """Whether this worker leads now. Errors of the object store are logged; a leader then stays
        one until its lease expires."""
        with self._lock:
            now = self._clock()
            try:
                return self._is_renewed(now) or self._is_acquired(now)
            except StowgateError as error:
                _log.warning("could not read or renew the leader's lease", error=str(error))
                return self._version is not None and now < self._until

    def release(self) -> None:
        with self._lock:
            if self._version is None:
                return
            try:
                self._store.replace(LEASE_KEY, self._lease(self._clock()), self._version, _JSON)
            except StowgateError as error:
                _log.info("could not release the leader's lease", error=str(error))
            self._version = None
            self._next_check = self._checked_at

    def _is_renewed(self, now: datetime) -> bool:
        if self._version is None:
            return False
        left = self._until - now
        if self._duration / 2 < left <= self._duration:
            return True
        until = now + self._duration
        try:
            self._version = self._store.replace(LEASE_KEY, self._lease(until), self._version, _JSON)
        except VersionConflict:
            self._version = None
            self._next_check = self._checked_at
            return False
        self._until = until
        return True

    def _is_acquired(self, now: datetime) -> bool:
        if self._checked_at <= now < self._next_check:
            return False
        self._checked_at = now
        try:
            found = self._store.get(LEASE_KEY)
        except ObjectMissing:
            found = None
        try:
            lease = None if found is None else _decode(found.data)
        except versions.WrittenByNewer:
            self._next_check = now + self._duration  # a newer Stowgate leads
            return False
        # A lease that ends later was written while a clock was ahead.
        if lease and lease.owner != self._owner and now < lease.until <= now + 2 * self._duration:
            self._next_check = lease.until + random.uniform(0, 1) * self._spread()  # noqa: S311
            return False
        until = now + self._duration
        try:
            if found:
                self._version = self._store.replace(
                    LEASE_KEY, self._lease(until), found.version, _JSON
                )
            else:
                self._version = self._store.create(LEASE_KEY, self._lease(until), _JSON)
        except VersionConflict:
            self._next_check = until  # another one was quicker
            return False
        self._until = until
        if lease is None or lease.owner != self._owner:
            _log.info("this worker is now the leader: it relays and sweeps")
        return True

    def _spread(self) -> timedelta:
        """The time after the end of the lease over which the followers spread their checks."""
        try:
            others = self._workers() - 1
        except StowgateError:
            others = 0
        return self._duration * max(0, others) / _READERS

    def _lease(self, until: datetime) -> bytes:
        return orjson.dumps({"version": VERSION, "owner": self._owner, "until": iso_utc(until)})


def _decode(data: bytes) -> Lease | None:
    """Return None for damaged data, which then counts as expired. Raises `WrittenByNewer`."""
    try:
        row = versions.loads(data, VERSION)
        return Lease(row["owner"], datetime.fromisoformat(row["until"]).astimezone(UTC))
    except versions.WrittenByNewer:
        raise
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
