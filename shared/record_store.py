"""The ingest records in the state bucket.

A record is one object, written after all instances of its payload: the commit point. It lies in
`pending/`, `opened/` or `failed/` and carries its own state, which is authoritative:

- Every change to a pending record is a conditional write over the version that was read. Of two
  workers, or a worker and a relay, one wins.
- A record whose workflow request was published is created in `opened/`, which succeeds once, and
  leaves `pending/` some time later. While it lies in both, `opened/` counts.
- A failed record is first marked by a conditional write, then moved to `failed/`. Any process that
  finds a leftover record removes it.
- An upload that was given up has a tombstone in its record's place: an empty object, which keeps a
  paused API from writing the record later.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from heapq import merge
from io import BytesIO
from itertools import groupby, islice
from typing import Any

import structlog

from shared.attachments import Attachments
from shared.errors import ObjectMissing, Permanent, VersionConflict
from shared.instances import StoredInstance
from shared.ports import ListedObject, ObjectStore
from shared.records import (
    IngestRecord,
    RecordUnreadable,
    State,
    decode,
    encode,
    is_record_name,
    newest_first,
    payload_id_of,
)
from shared.time import has_ended

_log = structlog.get_logger()

# How long a tombstone keeps an upload that was given up from writing its record.
TOMBSTONE_TTL = timedelta(hours=24)

MAX_LISTED = 200
"""Maximum payloads on one page of a list."""

_JSON = "application/json"

# Each object that is not a record is logged once; the memory for that is bounded.
_MAX_NAMED = 1000


class UploadGivenUp(Permanent):
    """The upload exceeded its time and was considered crashed."""


@dataclass(frozen=True)
class VersionedRecord:
    """A record with its version, which the next write must match."""

    record: IngestRecord
    version: str
    key: str
    data: bytes = field(repr=False)


def _key(state: State, payload_id: str) -> str:
    return f"{state}/{newest_first(payload_id)}"


def new_record(data: bytes, version: str) -> VersionedRecord:
    """Return a record as `Records.add` returned it, from its bytes. Raises `RecordUnreadable`."""
    record = decode(data)
    return VersionedRecord(record, version, _key(State.PENDING, record.payload_id), data)


def _other_places(record: IngestRecord) -> list[str]:
    """Return the places of leftovers of a settled record; a replay leaves one in failed/ too."""
    others = {State.PENDING, State.FAILED} - {record.state}
    return [_key(state, record.payload_id) for state in sorted(others)]


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _is_tombstone(listed: ListedObject) -> bool:
    return listed.size_bytes == 0


class Records:
    """The records in the state bucket. Every call may raise what the object store raises."""

    def __init__(
        self, store: ObjectStore, clean_up: Callable[[Sequence[str]], None] | None = None
    ) -> None:
        """`clean_up` removes the leftovers of an opened record, possibly later; by default they are
        removed at once."""
        self.attachments = Attachments(store)
        self._store = store
        self._clean_up = clean_up or store.delete
        self._named: set[str] = set()

    def add(self, record: IngestRecord) -> VersionedRecord:
        """The commit point of a POST. Raises `UploadGivenUp`."""
        key, data = _key(State.PENDING, record.payload_id), encode(record)
        try:
            return VersionedRecord(record, self._store.create(key, data, _JSON), key, data)
        except VersionConflict as error:
            # An earlier try may have succeeded, and its answer was lost.
            found = self.find(record.payload_id)
            if found is None:
                raise UploadGivenUp(
                    f"the upload of payload {record.payload_id} paused for too long and was given "
                    "up; send it again"
                ) from error
            return found

    def give_up(self, payload_id: str) -> bool:
        """Prevent an upload from writing its record; return False if it has written one."""
        if self.find(payload_id) is not None:
            return False
        tombstone = _key(State.PENDING, payload_id)
        try:
            self._store.create(tombstone, b"", _JSON)
        except VersionConflict:
            # A record that was just written, or the tombstone of an earlier call.
            return self.find(payload_id) is None
        if self.find(payload_id) is None:
            return True
        # The record was written and moved to another place just before.
        self._store.delete([tombstone])
        return False

    def tombstones(self) -> Iterator[ListedObject]:
        """Yield the tombstones of uploads that were given up."""
        return filter(_is_tombstone, self._list(State.PENDING))

    def find(self, payload_id: str) -> VersionedRecord | None:
        """Return the record, in any state. Raises `RecordUnreadable`."""
        # A record is written to its new place before it leaves the old one, and never leaves
        # opened/, so one pass in this order finds it. A replay leaves a copy in failed/, which
        # counts only while there is no other.
        for state in (State.OPENED, State.PENDING, State.FAILED, State.OPENED):
            versioned = self.read(_key(state, payload_id))
            if versioned is not None:
                return versioned
        return None

    def read(self, key: str) -> VersionedRecord | None:
        """Return the record under that key; None if it is missing or a tombstone.

        Raises `RecordUnreadable`, which names the key.
        """
        try:
            found = self._store.get(key)
        except ObjectMissing:
            return None
        if not found.data:
            return None
        try:
            record = decode(found.data)
            if record.payload_id != payload_id_of(key):
                raise RecordUnreadable(
                    "is the record of another payload; move it out of the bucket"
                )
        except RecordUnreadable as error:
            raise RecordUnreadable(f"{key} in the state bucket {error}") from error
        return VersionedRecord(record, found.version, key, found.data)

    def instances(self, record: IngestRecord) -> Iterator[StoredInstance]:
        """Yield the record's instances, in the order of the request.

        Raises `AttachmentUnreadable`, also during the iteration.
        """
        if record.instances is not None:
            return iter(record.instances)
        return self.attachments.instances(record.payload_id, record.file_count)

    def change(self, versioned: VersionedRecord, **changes: Any) -> VersionedRecord:
        """Change fields. Raises `VersionConflict` if another process changed or moved it."""
        record = replace(versioned.record, **changes)
        data = encode(record)
        version = self._store.replace(versioned.key, data, versioned.version, _JSON)
        return VersionedRecord(record, version, versioned.key, data)

    def settle(self, versioned: VersionedRecord, state: State, **changes: Any) -> VersionedRecord:
        """Give a pending record its final state.

        Raises `VersionConflict` if it was opened already, and for a failed one also if another
        process changed or moved it.
        """
        if state is State.OPENED:
            # Unconditional: the request was published, even if another worker has taken over.
            record = replace(versioned.record, state=state, lease=None, **changes)
            key, data = _key(state, record.payload_id), encode(record)
            settled = VersionedRecord(record, self._store.create(key, data, _JSON), key, data)
            self._clean_up(_other_places(record))
        else:
            settled = self.change(versioned, state=state, lease=None, **changes)
            self.move(settled)
        return settled

    def move(self, versioned: VersionedRecord) -> None:
        """Move a settled record to its place, and remove leftovers. Idempotent."""
        payload_id, target = (
            versioned.record.payload_id,
            _key(versioned.record.state, versioned.record.payload_id),
        )
        if versioned.key != target:
            self._store.put(target, BytesIO(versioned.data), len(versioned.data), _JSON)
        self._store.delete(_other_places(versioned.record))
        if versioned.record.state is State.FAILED and self.read(_key(State.OPENED, payload_id)):
            # Opened by a worker whose lease had expired.
            self._store.delete([target])

    def remove_leftover(self, opened: VersionedRecord, now: datetime) -> None:
        """Remove the leftover of an opened record, which a crashed worker left in pending/.

        While its lease runs, that worker may still undo a write to opened/ that its disk did not
        confirm; the leftover would then be the only record.
        """
        left = self.read(_key(State.PENDING, opened.record.payload_id))
        lease = left.record.lease if left else None
        if lease is None or has_ended(lease.until, now):
            self.move(opened)

    def replay(self, versioned: VersionedRecord, due_at: datetime) -> VersionedRecord:
        """Return a failed record to pending, under the same payload id.

        The copy in failed/ stays until the record settles again, as it may become the only one.
        Raises `VersionConflict` if the record is not in failed/, or another process replays it.
        """
        failed = _key(State.FAILED, versioned.record.payload_id)
        if versioned.key != failed:
            # A settled record that is still in pending/ would be moved over the new one.
            raise VersionConflict(f"payload {versioned.record.payload_id} is not in failed/")
        record = replace(
            versioned.record,
            state=State.PENDING,
            attempts=0,
            takeovers=0,
            lease=None,
            due_at=due_at,
        )
        key = _key(State.PENDING, record.payload_id)
        data = encode(record)
        try:
            version = self._store.create(key, data, _JSON)
        except VersionConflict:
            version = self._replace_tombstone(key, data)
        if self.read(_key(State.OPENED, record.payload_id)) is not None:
            raise VersionConflict(f"payload {record.payload_id} was already replayed and opened")
        return VersionedRecord(record, version, key, data)

    def _replace_tombstone(self, key: str, data: bytes) -> str:
        """Replace a tombstone beside a record, left by an interrupted `give_up`.

        Raises `VersionConflict` if there is no tombstone.
        """
        try:
            found = self._store.get(key)
        except ObjectMissing as error:
            raise VersionConflict(f"{key} no longer exists") from error
        if found.data:
            raise VersionConflict(f"{key} already exists")
        return self._store.replace(key, data, found.version, _JSON)

    def ping(self) -> None:
        """Return if the store is reachable; an earlier error then concerns one record only."""
        self._store.ping()

    def pending(self) -> list[ListedObject]:
        """Return the objects in pending/, oldest first; the cost grows only with their number."""
        return [o for o in self._list(State.PENDING) if not _is_tombstone(o)][::-1]

    def opened(self, payload_id: str) -> IngestRecord | None:
        """Return the record if it lies in opened/. Raises `RecordUnreadable`."""
        versioned = self.read(_key(State.OPENED, payload_id))
        return None if versioned is None else versioned.record

    def listed(self, state: State, limit: int) -> list[ListedObject]:
        """Return up to `limit` objects of records in that place, newest first, without a read.

        Up to 1000 take one listing, and another for each 1000 tombstones.
        """
        return list(islice((o for o in self._list(state) if not _is_tombstone(o)), limit))

    def newest(
        self, state: State | None, limit: int, cursor: str = ""
    ) -> tuple[Iterator[IngestRecord], str | None]:
        """Return up to `limit` records after `cursor`, newest first, and the next cursor.

        Records are read one by one during the iteration. An unreadable one is skipped and logged.
        Takes one listing of up to 1000 names per state, another for each 1000 tombstones, and per
        record one read if it is opened, two if pending, three if failed.
        """
        states = list(State) if state is None else [state]
        after = newest_first(cursor) if cursor else ""
        places = [self._list(s, f"{s}/{after}" if after else "") for s in states]
        keys = merge(
            *((o.key for o in place if not _is_tombstone(o)) for place in places), key=_name
        )
        # A record that is being moved is listed twice, in succession.
        names = (name for name, _ in groupby(keys, _name))
        ids = [payload_id_of(name) for name in islice(names, limit + 1)]
        found = filter(None, map(self._find_readable, ids[:limit]))
        page = (versioned.record for versioned in found if state in (None, versioned.record.state))
        return page, ids[limit - 1] if len(ids) > limit else None

    def _find_readable(self, payload_id: str) -> VersionedRecord | None:
        try:
            return self.find(payload_id)
        except RecordUnreadable as error:
            _log.error("record missing from a list", error=str(error))
            return None

    def failed(self, pending: Iterable[ListedObject]) -> list[str]:
        """Return the payload ids of failed records, newest first, without replayed ones, which have
        a copy in failed/.

        The cost grows with their number.
        """
        names = {_name(listed.key) for listed in pending}
        listed = (o.key for o in self._list(State.FAILED) if _name(o.key) not in names)
        return [payload_id_of(key) for key in listed]

    def _list(self, state: State, after: str = "") -> Iterator[ListedObject]:
        """Yield records and tombstones; skip and log anything else, such as a manual copy."""
        prefix = f"{state}/"
        for listed in self._store.list(prefix, after):
            if is_record_name(listed.key.removeprefix(prefix)):
                yield listed
            elif listed.key not in self._named and len(self._named) < _MAX_NAMED:
                self._named.add(listed.key)
                _log.warning(
                    "skipped an object of the state bucket whose name is not that of a record; "
                    "move it out of the bucket",
                    key=listed.key,
                )
