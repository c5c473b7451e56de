"""The ingest record: the instances of one POST, and its progress."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import orjson
from marshmallow import Schema, ValidationError, fields

from shared import versions
from shared.errors import Permanent
from shared.ids import has_moment, is_guid
from shared.instances import StoredInstance, load_instance
from shared.time import UtcDateTime
from shared.trace_context import trace_context

# The claims of Idempotency-Keys lie in 256 folders, so that a sweep can check some at a time.
CLAIM_FOLDERS = 256
IDEMPOTENCY_TTL = timedelta(hours=24)

_TIME_BITS = 0xFFFF_FFFF_FFFF

_NAME = re.compile(
    r"([0-9a-f]{12})\.(([0-9a-f]{8})-([0-9a-f]{4})(-[0-9a-f]{4}){2}-[0-9a-f]{12})\.json"
)


class RecordUnreadable(Permanent):
    """The record is damaged, or was written by a newer Stowgate."""


class State(StrEnum):
    PENDING = "pending"
    OPENED = "opened"
    FAILED = "failed"


@dataclass(frozen=True)
class Lease:
    """The exclusive right of a worker to open the workflow request of a record, until `until`."""

    owner: str
    until: datetime

    def has_left(self, share: float, duration: timedelta, now: datetime) -> bool:
        """Whether that share of the lease's duration is left.

        A lease that lasts longer than its duration shows that the clock was set back; other workers
        ignore such a lease.
        """
        return duration * share < self.until - now <= duration


FIRST_DELIVERY = "first delivery"
"""Owner of the lease with which a record is created: the worker that receives its event first."""

_MAX_FIRST_LEASE = timedelta(seconds=30)


def first_lease(lease: timedelta) -> timedelta:
    """Return the duration of a new record's lease, if those of workers last for `lease`.

    It bounds how long a record waits for the relay if its event is lost.
    """
    return min(lease, _MAX_FIRST_LEASE)


@dataclass(frozen=True)
class FirstAnswer:
    """The answer to a POST with an Idempotency-Key, which is repeated when the POST is sent again.

    `fingerprint` identifies the request body. Without `body` the answer is an attachment.
    """

    fingerprint: str
    status: int
    content_type: str
    body: str | None


@dataclass(frozen=True)
class IngestRecord:
    """The ingest record.

    `instances` is None if they are an attachment; `Records.instances` returns them in both cases.
    `workflow` is the one in the URL. `vae_workflows` are those of the VAE on receipt, None without
    a VAE. `due_at` is when the relay may announce the record again. `size_bytes` is the size of all
    instances, None in a record of an earlier release. `caller` is the authenticated sender, None
    without authentication. `takeovers` counts the workers that crashed with the lease. `opened_at`
    is when the request was published, which may be set on a pending record. `workflow_request` is
    the request without its `payload`. `traceparent` is the context of the trace of the POST.
    `unknown` are fields of a newer service, which are kept for it."""

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
    size_bytes: int | None = None
    caller: str | None = None
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
    traceparent: str | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def total_bytes(self) -> int | None:
        """The size of all instances; None for the attached ones of an earlier release."""
        if self.size_bytes is not None or self.instances is None:
            return self.size_bytes
        return sum(instance.size_bytes for instance in self.instances)


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
    size_bytes = fields.Integer(load_default=None, strict=True, allow_none=True)
    caller = fields.String(load_default=None, allow_none=True)
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
    traceparent = fields.String(load_default=None, allow_none=True)


VERSION = 1
"""Version of a record and its attachments. A new top-level field that is optional here, and that
older services may ignore, needs no new version. A new field of an instance, a lease or a first
answer does."""

# Creating a schema takes longer than using it.
_SCHEMA = _RecordSchema()
_FIELDS = tuple(_SCHEMA.fields)


def encode(record: IngestRecord) -> bytes:
    row = {name: getattr(record, name) for name in _FIELDS}
    return orjson.dumps({"version": VERSION, **row, **record.unknown}, option=orjson.OPT_UTC_Z)


def decode(data: bytes) -> IngestRecord:
    """Decode a record. Raises `RecordUnreadable`, whose text continues a sentence after the key."""
    try:
        found = versions.loads(data, VERSION)
        unknown = {name: found.pop(name) for name in found.keys() - _SCHEMA.fields.keys()}
        row = _SCHEMA.load(found)
        if not (is_guid(row["payload_id"]) and is_guid(row["correlation_id"])):
            raise ValueError("the payload id or the correlation id is not a GUID")
        if row["instances"] is not None and len(row["instances"]) != row["file_count"]:
            raise ValueError("the number of instances differs from file_count")
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        raise RecordUnreadable(versions.why_unreadable(error)) from error
    lease, first_answer = row.pop("lease"), row.pop("first_answer")
    if trace_context(row["traceparent"]) is None:
        # Nothing else depends on it, and a header of any length would stop each announcement.
        row["traceparent"] = None
    return IngestRecord(
        lease=None if lease is None else Lease(**lease),
        first_answer=None if first_answer is None else FirstAnswer(**first_answer),
        unknown=unknown,
        **row,
    )


def newest_first(payload_id: str) -> str:
    """Return the name of a record's object, which sorts by time of receipt, newest first.

    The first 48 bits of a UUIDv7 are its time in milliseconds (RFC 9562 5.7). Object stores list in
    ascending order only, so the name begins with their complement.
    """
    return f"{_TIME_BITS - (UUID(payload_id).int >> 80):012x}.{payload_id}.json"


def is_record_name(name: str) -> bool:
    """Whether `newest_first` returns such a name for an id of a year up to 9999."""
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    complement, payload_id, high, low = found.group(1, 2, 3, 4)
    return int(complement, 16) ^ int(high + low, 16) == _TIME_BITS and has_moment(payload_id)


def claim_folder(number: int) -> str:
    """Return the folder of claims whose digest begins with that byte."""
    return f"idempotency/{number:02x}/"


def payload_id_of(key: str) -> str:
    return key.rpartition("/")[2].split(".")[1]
