"""Refusals of workflow requests by the Workflow Manager, and their replays.

The requests of a payload are numbered: 0 for the first, n for the nth replay. Each event in the
life of a request is a small object in the state bucket; the ingest record does not change:

- `refused/…/{number}.json`: the Workflow Manager refused the request.
- `replays/…/{number}.json`: the replay must be published; it holds a worker's lease.
- `replayed/…/{number}.json`: the replay was published.

Each is created once, by a conditional write, so the same fact noted twice counts once, and the
order in which the facts arrive does not matter. `docs/decisions/0010` has the table of states.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from heapq import merge
from itertools import groupby, islice
from typing import Any

import orjson
from marshmallow import EXCLUDE, Schema, ValidationError, fields

from shared import versions
from shared.errors import ObjectMissing, Permanent, VersionConflict
from shared.ports import ObjectStore
from shared.records import IngestRecord, Lease, State, newest_first
from shared.time import UtcDateTime

VERSION = 1
"""Version of these objects. A new field that older services may ignore needs no new version."""

_JSON = "application/json"

_PLACES = _REFUSED, _REPLAYS, _REPLAYED = "refused", "replays", "replayed"

_DIGITS = 6
MAX_NUMBER = 10**_DIGITS - 1
_KEY = re.compile(
    rf"(?P<place>[a-z]+)/(?P<name>[0-9a-f]{{12}}\.(?P<payload_id>[0-9a-f-]{{36}}))"
    rf"/(?P<number>[0-9]{{{_DIGITS}}})\.json"
)


class RefusalReason(StrEnum):
    """The first two are reasons in the `x-death` header of dead letters."""

    REJECTED = "rejected"
    DELIVERY_LIMIT = "delivery_limit"
    NOT_SENT = "not_sent"
    """The replay was not published: the broker refused it, or the objects were gone."""
    OTHER = "other"
    """A policy of the broker removed the request from the queue: `expired`, `maxlen`."""


class PayloadState(StrEnum):
    """The state of a payload as reported: the states of its record, and `refused`."""

    PENDING = "pending"
    OPENED = "opened"
    FAILED = "failed"
    REFUSED = "refused"


class OutcomeUnreadable(Permanent):
    """A refusal or replay is damaged, or was written by a newer Stowgate."""


class ObjectsGone(Permanent):
    """The payload has no objects any more, so its request would be refused again."""


OBJECTS_GONE = (
    "the payload's objects are gone from the object store: the Workflow Manager deletes them after "
    "its retention time, or by its API; have the study sent again"
)


@dataclass(frozen=True)
class Refusal:
    """A refused request. `detail` says why a replay could not be published, else None."""

    payload_id: str
    number: int
    reason: RefusalReason
    refused_at: datetime
    detail: str | None = None


@dataclass(frozen=True)
class Replay:
    """A replay that must be published. `due_at` is when the next attempt may start. `unknown` are
    fields of a newer service."""

    payload_id: str
    number: int
    due_at: datetime
    attempts: int = 0
    last_error: str | None = None
    lease: Lease | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class VersionedReplay:
    """A replay with its version, which the next write must match."""

    replay: Replay
    version: str


@dataclass(frozen=True)
class Outcome:
    """The state of a payload's requests, by their numbers.

    `refused` is the latest refused request, `refusals` the number of refused ones, `replayed` the
    latest published replay, and `replay` the latest replay that must be published.
    """

    refused: int | None = None
    refusals: int = 0
    replayed: int = 0
    replay: int | None = None

    def state(self, record: IngestRecord) -> PayloadState:
        """Return the payload's state; unless the record is opened, that is the record's state."""
        if record.state is not State.OPENED:
            return PayloadState(record.state)
        return self.state_when_opened

    @property
    def state_when_opened(self) -> PayloadState:
        if self.refused is not None and self.replay == self.refused + 1 > self.replayed:
            return PayloadState.PENDING
        if self.refused is not None and self.refused >= self.replayed:
            return PayloadState.REFUSED
        return PayloadState.OPENED

    @property
    def next_replay(self) -> int:
        return (0 if self.refused is None else self.refused) + 1


NOTHING_KNOWN = Outcome()


class _LeaseSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    owner = fields.String(required=True)
    until = UtcDateTime(required=True)


class _RefusalSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    payload_id = fields.String(required=True)
    number = fields.Integer(required=True, strict=True)
    reason = fields.Enum(RefusalReason, by_value=True, required=True)
    refused_at = UtcDateTime(required=True)
    detail = fields.String(load_default=None, allow_none=True)


class _ReplaySchema(Schema):
    payload_id = fields.String(required=True)
    number = fields.Integer(required=True, strict=True)
    due_at = UtcDateTime(required=True)
    attempts = fields.Integer(required=True, strict=True)
    last_error = fields.String(required=True, allow_none=True)
    lease = fields.Nested(_LeaseSchema, required=True, allow_none=True)


_REFUSAL, _REPLAY = _RefusalSchema(), _ReplaySchema()


class Refusals:
    """The refusals and replays in the state bucket. Every call may raise what the object store
    raises; calls that read an object also raise `OutcomeUnreadable`."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def note(self, refusal: Refusal) -> bool:
        """Record a refusal; return False if it was recorded before."""
        row = {"version": VERSION, **asdict(refusal)}
        return self._create(_key(_REFUSED, refusal.payload_id, refusal.number), row)

    def refusal(self, payload_id: str, number: int) -> Refusal:
        """Return a refusal. Raises `ObjectMissing`."""
        key = _key(_REFUSED, payload_id, number)
        row, _ = _decode(key, self._store.get(key).data, _REFUSAL)
        return Refusal(**row)

    def outcome(self, payload_id: str) -> Outcome:
        """Return the state of the payload's requests. Takes one listing if none was refused."""
        refused = self._numbers(_REFUSED, payload_id)
        if not refused:
            return NOTHING_KNOWN
        return _outcome(
            refused, self._numbers(_REPLAYED, payload_id), self._numbers(_REPLAYS, payload_id)
        )

    def outcomes(self, after: str = "") -> Iterator[tuple[str, Outcome]]:
        """Yield the payloads after that id with a refused or replayed request, newest first.

        Lists each kind of object once, lazily, and reads none.
        """
        return _outcomes(self._list(place, after) for place in _PLACES)

    def outcomes_page(
        self, max_names: int, after: str = ""
    ) -> tuple[dict[str, Outcome], str | None]:
        """Return the newest payloads after that id with a refused or replayed request, and the last
        of them if there may be more.

        Lists up to `max_names` names of each kind of object; 1000 take three listings.
        """
        listings = [list(islice(self._list(place, after), max_names)) for place in _PLACES]
        # Behind the end of a listing, a replay of the payload might be missing.
        ends = [listing[-1][0] for listing in listings if len(listing) == max_names]
        if not ends:
            return dict(_outcomes(listings)), None
        end = min(ends)
        page = dict(_outcomes([i for i in one if i[0] < end] for one in listings))
        if not page:
            # One payload was replayed that often.
            payload_id = _payload_id(end)
            page = {payload_id: self.outcome(payload_id)}
        return page, next(reversed(page))

    def replays(self, after: str = "") -> Iterator[str]:
        """Yield the payloads after that id with a replay that must be published, newest first.

        A crashed worker may have left the replay of one that was published. Lists lazily.
        """
        for name, _ in groupby(self._list(_REPLAYS, after), key=lambda item: item[0]):
            yield _payload_id(name)

    def request_replay(self, payload_id: str, number: int, due_at: datetime) -> Replay:
        """Request a replay with this number.

        Raises `VersionConflict` if it was requested before.
        """
        replay = Replay(payload_id, number, due_at)
        self._store.create(_key(_REPLAYS, payload_id, number), _encode_replay(replay), _JSON)
        return replay

    def last_replay(self, payload_id: str) -> int | None:
        """Return the number of the payload's replay that must be published, if there is one."""
        return max(self._numbers(_REPLAYS, payload_id), default=None)

    def replay(self, payload_id: str, number: int) -> VersionedReplay | None:
        """Return a replay that must be published, else None."""
        key = _key(_REPLAYS, payload_id, number)
        try:
            found = self._store.get(key)
        except ObjectMissing:
            return None
        row, unknown = _decode(key, found.data, _REPLAY)
        lease = row.pop("lease")
        return VersionedReplay(
            Replay(lease=None if lease is None else Lease(**lease), unknown=unknown, **row),
            found.version,
        )

    def change(self, versioned: VersionedReplay, **changes: Any) -> VersionedReplay:
        """Change a replay. Raises `VersionConflict` if another worker changed or finished it."""
        replay = replace(versioned.replay, **changes)
        key = _key(_REPLAYS, replay.payload_id, replay.number)
        version = self._store.replace(key, _encode_replay(replay), versioned.version, _JSON)
        return VersionedReplay(replay, version)

    def note_replayed(self, payload_id: str, number: int, moment: datetime) -> None:
        """Record that the replay was published. Idempotent."""
        row = {"version": VERSION, "payload_id": payload_id, "number": number, "sent_at": moment}
        self._create(_key(_REPLAYED, payload_id, number), row)
        self.forget_replay(payload_id, number)

    def forget_replay(self, payload_id: str, number: int) -> None:
        """Remove a replay that must not be published any more."""
        self._store.delete([_key(_REPLAYS, payload_id, number)])

    def _create(self, key: str, row: Mapping[str, Any]) -> bool:
        try:
            self._store.create(key, orjson.dumps(row, option=orjson.OPT_UTC_Z), _JSON)
        except VersionConflict:
            return False
        return True

    def _numbers(self, place: str, payload_id: str) -> list[int]:
        prefix = f"{place}/{ordered_name(payload_id)}/"
        return [int(f["number"]) for o in self._store.list(prefix) if (f := _KEY.fullmatch(o.key))]

    def _list(self, place: str, after: str = "") -> Iterator[tuple[str, str, int]]:
        """Yield name, place and number; skip anything else, such as a manual copy."""
        behind = _key(place, after, MAX_NUMBER) if after else ""
        for listed in self._store.list(f"{place}/", behind):
            found = _KEY.fullmatch(listed.key)
            if found:
                yield found["name"], place, int(found["number"])


def _outcomes(
    listings: Iterable[Iterable[tuple[str, str, int]]],
) -> Iterator[tuple[str, Outcome]]:
    for name, found in groupby(merge(*listings), key=lambda item: item[0]):
        numbers: dict[str, list[int]] = {place: [] for place in _PLACES}
        for _, place, number in found:
            numbers[place].append(number)
        yield _payload_id(name), _outcome(numbers[_REFUSED], numbers[_REPLAYED], numbers[_REPLAYS])


def _payload_id(name: str) -> str:
    return name.partition(".")[2]


def ordered_name(payload_id: str) -> str:
    """Return a payload's name in these listings, which sort like the names of records."""
    return newest_first(payload_id).removesuffix(".json")


def _key(place: str, payload_id: str, number: int) -> str:
    return f"{place}/{ordered_name(payload_id)}/{number:0{_DIGITS}d}.json"


def _outcome(refused: list[int], replayed: list[int], replays: list[int]) -> Outcome:
    return Outcome(
        refused=max(refused, default=None),
        refusals=len(refused),
        replayed=max(replayed, default=0),
        replay=max(replays, default=None),
    )


def _encode_replay(replay: Replay) -> bytes:
    row = asdict(replay)
    unknown = row.pop("unknown")
    return orjson.dumps({**unknown, "version": VERSION, **row}, option=orjson.OPT_UTC_Z)


def _decode(key: str, data: bytes, schema: Schema) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        found = versions.loads(data, VERSION)
        unknown = {name: found.pop(name) for name in found.keys() - schema.fields.keys()}
        return schema.load(found), unknown
    except (ValueError, ValidationError) as error:
        raise OutcomeUnreadable(
            f"{key} in the state bucket {versions.why_unreadable(error)}"
        ) from error


def has_objects(instances: ObjectStore, payload_id: str) -> bool:
    """Whether the payload still has objects. The Workflow Manager deletes all or none."""
    return next(iter(instances.list(f"{payload_id}/dcm/")), None) is not None
