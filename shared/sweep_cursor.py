"""How far the sweep has looked, and whether the state bucket lost records since.

An upload without a record counts as one that died. Where the state bucket was restored from a
backup, or a replica that was behind took over, that is wrong: the record was there, and its upload
was acknowledged. So the cursor counts confirmations, and a witness in the payloads' bucket has the
same count. Soon after each record both count one more, the cursor first. A cursor that was restored
is behind the witness; then the sweep begins anew. docs/decisions/0007 has the proof.
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

# Payload ids come from the clocks of other machines. An S3 store refuses a clock that is off by a
# quarter of an hour, so two that it accepts differ by less than this.
_CLOCKS_DIFFER = timedelta(minutes=30)


class CursorUnreadable(Permanent):
    """The sweep cannot tell where to go on, or whether records were lost."""


@dataclass(frozen=True)
class Cursor:
    """The sweep has looked at all payload ids up to `after`, and removes none up to `since`.

    `confirmations` is the count that the witness must not be ahead of.
    """

    after: str
    since: str
    confirmations: int
    unknown: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class _VersionedCursor:
    """Cursor and witness as they were read, with the versions that the next write must find.

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
        # Outside any payload's folder, and behind all of them in a listing.
        self._witness = f"stowgate/{payload_ids.realm}.json"

    def read(self) -> Cursor:
        """Return the cursor, which begins anew where records were lost."""
        return self._read().cursor

    def confirm(self) -> None:
        """Confirm the records that are there: from now on a restore that loses one is noticed."""
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
                # Another process confirms at the same time, and may be ahead.
                witness = self._instances.get(self._witness)
                is_behind = self._decode_witness(witness.data) < count
                version = witness.version if is_behind else None

    def move(self, after: str) -> None:
        """Note that the sweep has looked at all payload ids up to `after`."""
        while True:
            versioned = self._read()
            if versioned.cursor.after >= after:
                return
            with suppress(VersionConflict):
                self._replace(versioned, after=after)
                return

    def record_missing(self, payload_id: str, evidence: str) -> None:
        """Begin anew, as `evidence` shows that a payload had a record and has none any more.

        Does nothing for payloads from before the last beginning, and for those of other producers.
        """
        if not self._payload_ids.minted(payload_id):
            return
        while True:
            versioned = self._read()
            if payload_id <= versioned.cursor.since:
                return
            with suppress(VersionConflict):
                self._begin_anew(versioned, f"payload {payload_id} has no record, but {evidence}")
                return

    def _read(self) -> _VersionedCursor:
        while True:
            # The cursor counts first, so a confirmation between these two does not put the witness
            # ahead.
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
                    self._begin_anew(
                        versioned, f"{self._witness} is missing in the payloads' bucket"
                    )
                    self._create_witness(versioned.cursor.confirmations)
                elif count > versioned.cursor.confirmations:
                    why = f"the state bucket was restored: its {CURSOR} is older than records were"
                    self._begin_anew(versioned, why, confirmations=count)
                elif versioned.cursor.after > minted_before(self._clock() + MAX_AHEAD):
                    self._begin_anew(versioned, f"a clock was ahead when {CURSOR} was written")
                else:
                    return versioned

    def _begin(self, count: int) -> None:
        """Create the cursor, for the sweep to look at what is uploaded from then on.

        Where the state bucket is new, that may be because the old one was lost, and what has no
        record then is data all the same.
        """
        now = self._clock() + (_CLOCKS_DIFFER if count else timedelta(0))
        start = minted_before(now)
        self._state.create(CURSOR, _encode(Cursor(start, start, count)), _JSON)
        if count:
            self._say(now, f"the state bucket was restored or is new: it has no {CURSOR}")

    def _begin_anew(self, versioned: _VersionedCursor, why: str, **changes: Any) -> None:
        now = self._clock() + _CLOCKS_DIFFER
        start = minted_before(now)
        self._replace(versioned, after=start, since=start, **changes)
        self._say(now, why)

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

    def _say(self, until: datetime, why: str) -> None:
        _log.error(
            "the sweep begins anew and removes nothing that was uploaded before",
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
            raise ValueError("a field has a value of another type")
    except (ValueError, KeyError) as error:
        raise _unreadable(CURSOR, "the state bucket", error) from error
    return Cursor(after, since, count, row)


def _encode_witness(count: int) -> bytes:
    return orjson.dumps({"version": VERSION, "confirmations": count})


def _unreadable(key: str, place: str, error: Exception) -> CursorUnreadable:
    return CursorUnreadable(
        f"{key} in {place} {versions.why_unreadable(error)}; until then no upload is swept"
    )
