"""One worker at a time relays and sweeps: the one that holds the lease in the state bucket.

Two that do so at once, as while clocks differ, harm nothing: they do the same work twice.
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

# All workers that wait look at the lease so often together, however many they are, as these would.
_LOOKING = 5


class Leadership(Protocol):
    def leads(self) -> bool:
        """Whether this worker is the one now."""

    def release(self) -> None:
        """Let another one lead at once."""


class SoleLeader:
    """For a worker whose events reach no other process: what it does not do nobody does."""

    def leads(self) -> bool:
        return True

    def release(self) -> None:
        """There is nobody else."""


class LeaderLease:
    """The lease, taken and renewed as it is asked for. Safe between threads."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        owner: str,
        duration: timedelta,
        workers: Callable[[], int],
        clock: Clock = utc_now,
    ) -> None:
        """`owner` names this worker, as no other. A leader that dies is followed by another one
        when `duration` is over; `workers` returns how many there are."""
        self._store = store
        self._owner = owner
        self._duration = duration
        self._workers = workers
        self._clock = clock
        self._lock = threading.Lock()
        # Of the lease while this worker holds it, else None.
        self._version: str | None = None
        self._until = self._looked_at = self._look_at = datetime.min.replace(tzinfo=UTC)

    def leads(self) -> bool:
        """An object store that does not answer is logged; until the lease ends nothing changes."""
        with self._lock:
            now = self._clock()
            try:
                return self._is_renewed(now) or self._is_taken(now)
            except StowgateError as error:
                _log.warning("lease of the leading worker not reached", error=str(error))
                return self._version is not None and now < self._until

    def release(self) -> None:
        with self._lock:
            if self._version is None:
                return
            try:
                self._store.replace(LEASE_KEY, self._lease(self._clock()), self._version, _JSON)
            except StowgateError as error:
                _log.info("lease of the leading worker not released", error=str(error))
            self._version = None
            self._look_at = self._looked_at

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
            self._look_at = self._looked_at
            return False
        self._until = until
        return True

    def _is_taken(self, now: datetime) -> bool:
        if self._looked_at <= now < self._look_at:
            return False
        self._looked_at = now
        try:
            found = self._store.get(LEASE_KEY)
        except ObjectMissing:
            found = None
        try:
            lease = None if found is None else _decode(found.data)
        except versions.WrittenByNewer:
            self._look_at = now + self._duration  # a newer Stowgate leads
            return False
        # One that ends later was written by a clock that was ahead.
        if lease and lease.owner != self._owner and now < lease.until <= now + 2 * self._duration:
            self._look_at = lease.until + random.uniform(0, 1) * self._spread()  # noqa: S311
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
            self._look_at = until  # another one was quicker
            return False
        self._until = until
        if lease is None or lease.owner != self._owner:
            _log.info("this worker leads: it relays and sweeps")
        return True

    def _spread(self) -> timedelta:
        """Over which the workers that wait look at the lease once it has ended, one by one."""
        try:
            others = self._workers() - 1
        except StowgateError:
            others = 0
        return self._duration * max(0, others) / _LOOKING

    def _lease(self, until: datetime) -> bytes:
        return orjson.dumps({"version": VERSION, "owner": self._owner, "until": iso_utc(until)})


def _decode(data: bytes) -> Lease | None:
    """None for what is no lease, which keeps nobody waiting. Raises `WrittenByNewer`."""
    try:
        row = versions.loads(data, VERSION)
        return Lease(row["owner"], datetime.fromisoformat(row["until"]).astimezone(UTC))
    except versions.WrittenByNewer:
        raise
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
