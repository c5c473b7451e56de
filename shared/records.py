"""The ingest record: what one POST brought in, and how far it has come.

A record is one object in the state bucket, written after all its instances: the commit point.
It lies in `pending/`, `opened/` or `failed/` and carries its own state, which is what counts:

- every change to a pending record is a conditional write over the version that was read, so of
  two workers, or a worker and a relay, one wins;
- a record whose request is out is created in opened/, which succeeds once, and some time later
  leaves pending/. While it lies in both, opened/ counts;
- one that failed says so by a conditional write first, and is moved to its place after. Whoever
  finds a record that was left behind clears it away;
- an upload that is given up has an empty object in its record's place, a fence: its API, should it
  only have stood still, cannot write the record any more.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from heapq import merge
from io import BytesIO
from itertools import groupby, islice
from typing import Any
from uuid import UUID

import orjson
import structlog
from marshmallow import Schema, ValidationError, fields

from shared import versions
from shared.attachments import Attachments
from shared.errors import ObjectMissing, Permanent, VersionConflict
from shared.ids import has_moment, is_guid
from shared.instances import StoredInstance, load_instance
from shared.ports import ListedObject, ObjectStore
from shared.time import UtcDateTime, has_ended

_log = structlog.get_logger()

# The claims on Idempotency-Keys, beside the records that they lead to. A claim lies in one of 256
# folders, by its name, so that a sweep need not look at all of them.
CLAIM_FOLDERS = 256
KEYS_KEPT = timedelta(hours=24)

# How long an upload that was given up is kept from coming to its record.
FENCES_KEPT = timedelta(hours=24)

_TIME_BITS = 0xFFFF_FFFF_FFFF

MOST_LISTED = 200
"""Payloads on one page of a list."""

_JSON = "application/json"

_NAME = re.compile(
    r"([0-9a-f]{12})\.(([0-9a-f]{8})-([0-9a-f]{4})(-[0-9a-f]{4}){2}-[0-9a-f]{12})\.json"
)

# What is no record by its name is named once; not more of it is remembered.
_MAX_NAMED = 1000


class UploadGivenUp(Permanent):
    """The upload took so long that it was taken for one whose API died."""


class RecordUnreadable(Permanent):
    """What lies in a record's place is damaged, or was written by a newer Stowgate."""


class State(StrEnum):
    PENDING = "pending"
    OPENED = "opened"
    FAILED = "failed"


@dataclass(frozen=True)
class Lease:
    """Until then, only this worker may open the workflow request of the record."""

    owner: str
    until: datetime


@dataclass(frozen=True)
class FirstAnswer:
    """What a POST with an Idempotency-Key was answered, for when it is sent again.

    `fingerprint` tells whether the body is the same one. An answer without `body` is an attachment.
    """

    fingerprint: str
    status: int
    content_type: str
    body: str | None


@dataclass(frozen=True)
class IngestRecord:
    """`instances` is None where they are an attachment; `Records.instances` has them in any case.
    `workflow` is the one in the URL; `vae_workflows` are those the VAE had on receipt, and
    None without a VAE. `due_at` is when the relay may announce the record again. `takeovers`
    counts the workers that held the lease and did not come to an end. `opened_at` is when the
    request was out, which the record may say while it is still pending. `workflow_request` is that
    request without its `payload`. `unknown` are fields that a newer service wrote, and that are
    kept for it."""

    payload_id: str
    correlation_id: str
    received_at: datetime
    source: str
    destination: str
    workflow: str | None
    vae_workflows: tuple[str, ...] | None
    file_count: int
    instances: tuple[StoredInstance, ...] | None
    due_at: datetime
    state: State = State.PENDING
    attempts: int = 0
    takeovers: int = 0
    last_error: str | None = None
    lease: Lease | None = None
    workflows: tuple[str, ...] | None = None
    route: str | None = None
    opened_at: datetime | None = None
    workflow_request: dict[str, Any] | None = field(default=None, repr=False)
    first_answer: FirstAnswer | None = field(default=None, repr=False)
    unknown: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class HeldRecord:
    """A record as it was read or written, with the version that the next write must find."""

    record: IngestRecord
    version: str
    key: str
    data: bytes = field(repr=False)


class _Instances(fields.Field[tuple[StoredInstance, ...]]):
    def _deserialize(self, value: Any, *_: Any, **__: Any) -> tuple[StoredInstance, ...]:
        return tuple(map(load_instance, value))


class _Strings(fields.List[str]):
    """A tuple of strings here, a list on the wire."""

    def _deserialize(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(super()._deserialize(*args, **kwargs))


class _LeaseSchema(Schema):
    owner = fields.String(required=True)
    until = UtcDateTime(required=True)


class _FirstAnswerSchema(Schema):
    fingerprint = fields.String(required=True)
    status = fields.Integer(required=True, strict=True)
    content_type = fields.String(required=True)
    body = fields.String(required=True, allow_none=True)


class _RecordSchema(Schema):
    payload_id = fields.String(required=True)
    correlation_id = fields.String(required=True)
    received_at = UtcDateTime(required=True)
    source = fields.String(required=True)
    destination = fields.String(required=True)
    workflow = fields.String(required=True, allow_none=True)
    vae_workflows = _Strings(fields.String(), required=True, allow_none=True)
    file_count = fields.Integer(required=True, strict=True)
    instances = _Instances(required=True, allow_none=True)
    due_at = UtcDateTime(required=True)
    state = fields.Enum(State, by_value=True, required=True)
    attempts = fields.Integer(required=True, strict=True)
    takeovers = fields.Integer(required=True, strict=True)
    last_error = fields.String(required=True, allow_none=True)
    lease = fields.Nested(_LeaseSchema, required=True, allow_none=True)
    workflows = _Strings(fields.String(), required=True, allow_none=True)
    route = fields.String(required=True, allow_none=True)
    opened_at = UtcDateTime(required=True, allow_none=True)
    workflow_request = fields.Raw(required=True, allow_none=True)
    first_answer = fields.Nested(_FirstAnswerSchema, required=True, allow_none=True)


VERSION = 1
"""Of the shape of a record and its attachments. A field of its own that older services may ignore
needs no new one, if it is not required here; one within an instance, a lease or a first answer
does."""

# Making one copies all its fields, which takes longer than what it is used for.
_SCHEMA = _RecordSchema()
_FIELDS = tuple(_SCHEMA.fields)


def encode(record: IngestRecord) -> bytes:
    row = {name: getattr(record, name) for name in _FIELDS}
    return orjson.dumps({"version": VERSION, **row, **record.unknown}, option=orjson.OPT_UTC_Z)


def decode(data: bytes) -> IngestRecord:
    """Raises `RecordUnreadable`, whose text follows the key in a sentence."""
    try:
        found = versions.loads(data, VERSION)
        unknown = {name: found.pop(name) for name in found.keys() - _SCHEMA.fields.keys()}
        row = _SCHEMA.load(found)
        if not is_guid(row["payload_id"]):
            raise ValueError("the payload id is no GUID")
        if row["instances"] is not None and len(row["instances"]) != row["file_count"]:
            raise ValueError("the instances are not as many as they were")
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        raise RecordUnreadable(versions.why_unreadable(error)) from error
    lease, first_answer = row.pop("lease"), row.pop("first_answer")
    return IngestRecord(
        lease=None if lease is None else Lease(**lease),
        first_answer=None if first_answer is None else FirstAnswer(**first_answer),
        unknown=unknown,
        **row,
    )


def newest_first(payload_id: str) -> str:
    """The name of a record's object: what was received last, to the millisecond, sorts first.

    The first 48 bits of a UUIDv7 are its time (RFC 9562 5.7); an object store lists in ascending
    order only, so the name begins with their complement.
    """
    return f"{_TIME_BITS - (UUID(payload_id).int >> 80):012x}.{payload_id}.json"


def _key(state: State, payload_id: str) -> str:
    return f"{state}/{newest_first(payload_id)}"


def _other_places(record: IngestRecord) -> list[str]:
    """Where a settled record may lie beside its own place; a replay leaves it in failed/ too."""
    others = {State.PENDING, State.FAILED} - {record.state}
    return [_key(state, record.payload_id) for state in sorted(others)]


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _is_fence(listed: ListedObject) -> bool:
    return listed.size_bytes == 0


def _is_name(name: str) -> bool:
    """Whether it is what `newest_first` makes of an id whose moment is in the years up to 9999."""
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    complement, payload_id, high, low = found.group(1, 2, 3, 4)
    return int(complement, 16) ^ int(high + low, 16) == _TIME_BITS and has_moment(payload_id)


def claim_folder(number: int) -> str:
    """Where claims lie whose digest begins with that byte."""
    return f"idempotency/{number:02x}/"


def payload_id_of(key: str) -> str:
    return _name(key).split(".")[1]


class Records:
    """The records in the state bucket. Every call may raise what the object store raises."""

    def __init__(
        self, store: ObjectStore, clear: Callable[[Sequence[str]], None] | None = None
    ) -> None:
        """`clear` removes what an opened record leaves behind, which may be later; without it that
        is done at once."""
        self.attachments = Attachments(store)
        self._store = store
        self._clear = clear or store.delete
        self._named: set[str] = set()

    def add(self, record: IngestRecord) -> None:
        """The commit point of a POST. Raises `UploadGivenUp`."""
        key, data = _key(State.PENDING, record.payload_id), encode(record)
        try:
            self._store.create(key, data, _JSON)
        except VersionConflict as error:
            if self.find(record.payload_id) is None:
                raise UploadGivenUp(
                    f"the upload of payload {record.payload_id} stood still for so long that it "
                    "was given up"
                ) from error

    def give_up(self, payload_id: str) -> bool:
        """Keep the record of an upload from being written; False where it has been."""
        if self.find(payload_id) is not None:
            return False
        fence = _key(State.PENDING, payload_id)
        try:
            self._store.create(fence, b"", _JSON)
        except VersionConflict:
            # A record that was written meanwhile, or the fence of an earlier call.
            return self.find(payload_id) is None
        if self.find(payload_id) is None:
            return True
        # It was written and moved on meanwhile.
        self._store.delete([fence])
        return False

    def fences(self) -> Iterator[ListedObject]:
        """What stands in the records' places of the uploads that were given up, until their APIs
        cannot come back."""
        return filter(_is_fence, self._list(State.PENDING))

    def untouched(self, payload_id: str) -> HeldRecord | None:
        """The record as its upload left it; None once a worker has tried it, or there is none.

        One read instead of two. It cannot lie anywhere else: what is replayed was touched.
        Raises `RecordUnreadable`.
        """
        held = self.read(_key(State.PENDING, payload_id))
        return (
            held
            if held is not None and held.record.attempts == 0 and not held.record.last_error
            else None
        )

    def find(self, payload_id: str) -> HeldRecord | None:
        """The record wherever it is. Raises `RecordUnreadable`."""
        # A record is written to its new place before it leaves the old one, and never leaves
        # opened/, so one pass in this order finds it. A replay leaves it in failed/ as well, which
        # counts only while it is nowhere else.
        for state in (State.OPENED, State.PENDING, State.FAILED, State.OPENED):
            held = self.read(_key(state, payload_id))
            if held is not None:
                return held
        return None

    def read(self, key: str) -> HeldRecord | None:
        """The record under that key; None where there is none, or a fence.

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
                raise RecordUnreadable("is the record of another payload; move it away")
        except RecordUnreadable as error:
            raise RecordUnreadable(f"{key} in the state bucket {error}") from error
        return HeldRecord(record, found.version, key, found.data)

    def instances(self, record: IngestRecord) -> Iterator[StoredInstance]:
        """The record's instances, in the order of the request, one at a time.

        Raises `AttachmentUnreadable`, also while they are iterated.
        """
        if record.instances is not None:
            return iter(record.instances)
        return self.attachments.instances(record.payload_id, record.file_count)

    def change(self, held: HeldRecord, **changes: Any) -> HeldRecord:
        """Raises `VersionConflict` where somebody changed or moved the record meanwhile."""
        record = replace(held.record, **changes)
        data = encode(record)
        version = self._store.replace(held.key, data, held.version, _JSON)
        return HeldRecord(record, version, held.key, data)

    def settle(self, held: HeldRecord, state: State, **changes: Any) -> HeldRecord:
        """Give a pending record its end, for all to see.

        Raises `VersionConflict` where it was opened already and, of one that failed, where somebody
        changed or moved it meanwhile.
        """
        if state is State.OPENED:
            # Whoever took over from a worker that stood still: the request is out.
            record = replace(held.record, state=state, lease=None, **changes)
            key, data = _key(state, record.payload_id), encode(record)
            settled = HeldRecord(record, self._store.create(key, data, _JSON), key, data)
            self._clear(_other_places(record))
        else:
            settled = self.change(held, state=state, lease=None, **changes)
            self.move(settled)
        return settled

    def move(self, held: HeldRecord) -> None:
        """Bring a settled record to its place, and to no other; harmless when several do it."""
        payload_id, target = held.record.payload_id, _key(held.record.state, held.record.payload_id)
        if held.key != target:
            self._store.put(target, BytesIO(held.data), len(held.data), _JSON)
        self._store.delete(_other_places(held.record))
        if held.record.state is State.FAILED and self.read(_key(State.OPENED, payload_id)):
            # By a worker that was taken for dead.
            self._store.delete([target])

    def clear_left(self, opened: HeldRecord, now: datetime) -> None:
        """Remove what a worker that died left of an opened record.

        While its lease runs it may be alive, and take back a write that the disk did not confirm:
        then what lies in pending/ is the only record there is.
        """
        left = self.read(_key(State.PENDING, opened.record.payload_id))
        lease = left.record.lease if left else None
        if lease is None or has_ended(lease.until, now):
            self.move(opened)

    def replay(self, held: HeldRecord, due_at: datetime) -> HeldRecord:
        """Put a failed record back to pending, under the same payload id.

        What lies in failed/ stays until the record settles again: by the time that it could be
        removed it may be the only one there is. Raises `VersionConflict` where the record is not in
        failed/, or somebody else replays it.
        """
        failed = _key(State.FAILED, held.record.payload_id)
        if held.key != failed:
            # A record that is settled and not moved yet would be moved over the new one.
            raise VersionConflict(f"payload {held.record.payload_id} is not in failed/")
        record = replace(
            held.record, state=State.PENDING, attempts=0, takeovers=0, lease=None, due_at=due_at
        )
        key = _key(State.PENDING, record.payload_id)
        data = encode(record)
        try:
            version = self._store.create(key, data, _JSON)
        except VersionConflict:
            version = self._replace_fence(key, data)
        if self.read(_key(State.OPENED, record.payload_id)) is not None:
            raise VersionConflict(f"payload {record.payload_id} was replayed and opened meanwhile")
        return HeldRecord(record, version, key, data)

    def _replace_fence(self, key: str, data: bytes) -> str:
        """A fence that stands beside a record was left by a `give_up` that did not come to its end.

        Raises `VersionConflict` where there is none.
        """
        try:
            found = self._store.get(key)
        except ObjectMissing as error:
            raise VersionConflict(f"{key} was there and is not any more") from error
        if found.data:
            raise VersionConflict(f"{key} exists already")
        return self._store.replace(key, data, found.version, _JSON)

    def ping(self) -> None:
        """Return when the store can be reached: what kept a record from us is about that one."""
        self._store.ping()

    def pending(self) -> list[ListedObject]:
        """What lies in pending/, the oldest first; the cost grows with these alone."""
        return [o for o in self._list(State.PENDING) if not _is_fence(o)][::-1]

    def newest(
        self, state: State | None, limit: int, cursor: str = ""
    ) -> tuple[Iterator[IngestRecord], str | None]:
        """Up to `limit` records behind `cursor`, the newest first, and the next cursor.

        Each is read when it is asked for, so that one at a time is in memory. One that cannot be
        read is left out and logged. Takes one listing of up to 1000 names for each state, another
        where that many tombstones are passed over, and for each record one read, two if it is
        pending, and three if it has failed.
        """
        states = list(State) if state is None else [state]
        after = newest_first(cursor) if cursor else ""
        places = [self._list(s, f"{s}/{after}" if after else "") for s in states]
        keys = merge(*((o.key for o in place if not _is_fence(o)) for place in places), key=_name)
        # A record in the middle of its move shows in two places, one after the other here.
        names = (name for name, _ in groupby(keys, _name))
        ids = [payload_id_of(name) for name in islice(names, limit + 1)]
        found = filter(None, map(self._find_readable, ids[:limit]))
        page = (held.record for held in found if state in (None, held.record.state))
        return page, ids[limit - 1] if len(ids) > limit else None

    def _find_readable(self, payload_id: str) -> HeldRecord | None:
        try:
            return self.find(payload_id)
        except RecordUnreadable as error:
            _log.error("record left out of a list", error=str(error))
            return None

    def failed(self, pending: Iterable[ListedObject]) -> int:
        """How many failed and were not replayed, which leaves a record in failed/ as well.

        The cost grows with the number of these.
        """
        replayed = {_name(listed.key) for listed in pending}
        return sum(_name(o.key) not in replayed for o in self._list(State.FAILED))

    def _list(self, state: State, after: str = "") -> Iterator[ListedObject]:
        """Records and fences; what else lies there, such as a copy by hand, is passed over."""
        prefix = f"{state}/"
        for listed in self._store.list(prefix, after):
            if _is_name(listed.key.removeprefix(prefix)):
                yield listed
            elif listed.key not in self._named and len(self._named) < _MAX_NAMED:
                self._named.add(listed.key)
                _log.warning(
                    "passed over in the state bucket: this is no record by its name; move it away",
                    key=listed.key,
                )
