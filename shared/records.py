"""The ingest record: what one POST brought in, and how far it has come."""

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

# The claims on Idempotency-Keys, beside the records that they lead to. A claim lies in one of 256
# folders, by its name, so that a sweep need not look at all of them.
CLAIM_FOLDERS = 256
IDEMPOTENCY_TTL = timedelta(hours=24)

_TIME_BITS = 0xFFFF_FFFF_FFFF

_NAME = re.compile(
    r"([0-9a-f]{12})\.(([0-9a-f]{8})-([0-9a-f]{4})(-[0-9a-f]{4}){2}-[0-9a-f]{12})\.json"
)


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


def is_record_name(name: str) -> bool:
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
    return key.rpartition("/")[2].split(".")[1]
