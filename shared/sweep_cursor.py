"""The position of the sweep, and the detection of lost records.

An upload without a record counts as crashed. After a restore of the state bucket from a backup, or
a failover to an outdated replica, that would be wrong: the record existed, and the upload was
acknowledged. So the cursor counts confirmations, and a witness in the payloads' bucket has the same
count. Soon after each new record both are incremented, the cursor first. A restored cursor is
behind the witness, and the sweep then restarts. docs/decisions/0007 has the proof.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import orjson
import structlog

from shared import versions
from shared.errors import ObjectMissing, Permanent, VersionConflict
from shared.ids import PayloadIds, minted_before
from shared.ports import ObjectStore, StoredObject
from shared.time import MAX_AHEAD, Clock, utc_now

_log = structlog.get_logger()

CURSOR = "sweep/cursor.json"

VERSION = 1

_JSON = "application/json"

# Payload ids come from the clocks of several machines. An S3 store rejects a clock that is off by
# more than 15 minutes, so two accepted clocks differ by less than this.
_CLOCKS_DIFFER = timedelta(minutes=30)


class CursorUnreadable(Permanent):
    """The position of the sweep is unreadable, or its witness is."""


@dataclass(frozen=True)
class Cursor:
    """The sweep has checked all payload ids up to `after`, and removes none up to `since`.

    The witness must not be ahead of `confirmations`.
    """

    after: str
    since: str
    confirmations: int
    unknown: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class _VersionedCursor:
    """Cursor and witness with their versions, which the next write must match.

    Without a witness nothing was ever confirmed.
    """

    cursor: Cursor
    version: str
    witness_version: str | None


class SweepCursor:
    """The cursor in the state bucket, with its witness in the payloads' bucket.

    Safe between threads and processes. Every call may raise what the object store raises, and
    `CursorUnreadable`.
    """

    def __init__(
        self,
        *,
        state: ObjectStore,
        instances: ObjectStore,
        payload_ids: PayloadIds,
        clock: Clock = utc_now,
    ) -> None:
        self._state = state
        self._instances = instances
        self._payload_ids = payload_ids
        self._clock = clock
        # Not in a payload's folder, and listed after all of them.
        self._witness = f"stowgate/{payload_ids.realm}.json"

    def read(self) -> Cursor:
        """Return the cursor, after a restart if records were lost."""
        return self._read().cursor

    def confirm(self) -> None:
        """Confirm the existing records, so that a later restore that loses one is detected."""
        while True:
            versioned = self._read()
            with suppress(VersionConflict):
                if versioned.witness_version is None:
                    self._create_witness(0)
                    continue
                count = versioned.cursor.confirmations + 1
                self._replace(versioned, confirmations=count)
                break
        version: str | None = versioned.witness_version
        while version is not None:
            try:
                self._instances.replace(self._witness, _encode_witness(count), version, _JSON)
                return
            except VersionConflict:
                # Another process confirms concurrently and may be ahead.
                witness = self._instances.get(self._witness)
                is_behind = self._decode_witness(witness.data) < count
                version = witness.version if is_behind else None

    def move(self, after: str) -> None:
        """Record that the sweep has checked all payload ids up to `after`."""
        while True:
            versioned = self._read()
            if versioned.cursor.after >= after:
                return
            with suppress(VersionConflict):
                self._replace(versioned, after=after)
                return

    def record_missing(self, payload_id: str, evidence: str) -> None:
        """Restart the sweep, as `evidence` shows that a payload has lost its record.

        Does nothing for payloads from before the latest restart, and for those of other producers.
        """
        if not self._payload_ids.minted(payload_id):
            return
        while True:
            versioned = self._read()
            if payload_id <= versioned.cursor.since:
                return
            with suppress(VersionConflict):
                self._restart(versioned, f"payload {payload_id} has no record, but {evidence}")
                return

    def _read(self) -> _VersionedCursor:
        while True:
            # The cursor is incremented first, so it must be read last: a confirmation between the
            # two reads does not put the witness ahead.
            witness = _found(self._instances, self._witness)
            found = _found(self._state, CURSOR)
            count = 0 if witness is None else self._decode_witness(witness.data)
            with suppress(VersionConflict):
                if found is None:
                    self._begin(count)
                    continue
                versioned = _VersionedCursor(
                    _decode(found.data), found.version, None if witness is None else witness.version
                )
                if witness is None and versioned.cursor.confirmations:
                    if _found(self._instances, self._witness) is not None:
                        # The first confirmation took place between the two reads.
                        continue
                    self._restart(versioned, f"{self._witness} is missing in the payloads' bucket")
                    self._create_witness(versioned.cursor.confirmations)
                elif count > versioned.cursor.confirmations:
                    why = f"the state bucket was restored: its {CURSOR} is older than some records"
                    self._restart(versioned, why, confirmations=count)
                elif versioned.cursor.after > minted_before(self._clock() + MAX_AHEAD):
                    self._restart(versioned, f"a clock was ahead when {CURSOR} was written")
                else:
                    return versioned

    def _begin(self, count: int) -> None:
        """Create the cursor; the sweep checks only later uploads.

        A new state bucket may replace a lost one, so earlier objects without a record are kept.
        """
        now = self._clock() + (_CLOCKS_DIFFER if count else timedelta(0))
        start = minted_before(now)
        self._state.create(CURSOR, _encode(Cursor(start, start, count)), _JSON)
        if count:
            self._log_restart(now, f"the state bucket was restored or is new: it has no {CURSOR}")

    def _restart(self, versioned: _VersionedCursor, why: str, **changes: Any) -> None:
        now = self._clock() + _CLOCKS_DIFFER
        start = minted_before(now)
        self._replace(versioned, after=start, since=start, **changes)
        self._log_restart(now, why)

    def _replace(self, versioned: _VersionedCursor, **changes: Any) -> None:
        data = _encode(replace(versioned.cursor, **changes))
        self._state.replace(CURSOR, data, versioned.version, _JSON)

    def _create_witness(self, count: int) -> None:
        self._instances.create(self._witness, _encode_witness(count), _JSON)

    def _decode_witness(self, data: bytes) -> int:
        try:
            count = versions.loads(data, VERSION)["confirmations"]
            if type(count) is not int:
                raise ValueError("the count is not a number")
        except (ValueError, KeyError) as error:
            raise _unreadable(self._witness, "the payloads' bucket", error) from error
        return count

    def _log_restart(self, until: datetime, why: str) -> None:
        _log.error(
            "the sweep restarts and keeps everything that was uploaded before",
            before=until.isoformat(timespec="seconds"),
            why=why,
        )


def _found(store: ObjectStore, key: str) -> StoredObject | None:
    try:
        return store.get(key)
    except ObjectMissing:
        return None


def _encode(cursor: Cursor) -> bytes:
    return orjson.dumps(
        {
            **cursor.unknown,
            "version": VERSION,
            "after": cursor.after,
            "since": cursor.since,
            "confirmations": cursor.confirmations,
        }
    )


def _decode(data: bytes) -> Cursor:
    try:
        row = versions.loads(data, VERSION)
        after, since, count = row.pop("after"), row.pop("since"), row.pop("confirmations")
        if not (isinstance(after, str) and isinstance(since, str) and type(count) is int):
            raise ValueError("a field has a value of the wrong type")
    except (ValueError, KeyError) as error:
        raise _unreadable(CURSOR, "the state bucket", error) from error
    return Cursor(after, since, count, row)


def _encode_witness(count: int) -> bytes:
    return orjson.dumps({"version": VERSION, "confirmations": count})


def _unreadable(key: str, place: str, error: Exception) -> CursorUnreadable:
    return CursorUnreadable(
        f"{key} in {place} {versions.why_unreadable(error)}; until then no upload is swept"
    )
