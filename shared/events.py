"""The event between the two services, which names a payload whose record should be read."""

from dataclasses import dataclass
from typing import Any

import orjson
from marshmallow import EXCLUDE, Schema, ValidationError, fields

from shared import versions
from shared.errors import MalformedEvent, Permanent
from shared.ids import is_guid
from shared.ports import Message
from shared.record_store import VersionedRecord, new_record
from shared.records import RecordUnreadable
from shared.time import utc_now

VERSION = 1

_MAX_COPY_BYTES = 16 << 10


class NewerEvent(Permanent):
    """A newer Stowgate wrote the event."""


@dataclass(frozen=True)
class InstancesStored:
    """The instances of one POST are stored, and their ingest record is written.

    `new_version` is the version of that record, if the event is published right after it. Who
    receives such an event first holds the record's first lease. `new_record` is the record itself,
    if it is small, and need not be read.
    `traceparent` is the context of the trace of the POST. It is not in the body, as the context
    travels in a header.
    """

    payload_id: str
    correlation_id: str
    traceparent: str | None = None
    new_record: VersionedRecord | None = None
    new_version: str | None = None


class _InstancesStoredSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    payload_id = fields.String(required=True)
    correlation_id = fields.String(required=True)
    record = fields.String(load_default=None)
    record_version = fields.String(load_default=None)


_SCHEMA = _InstancesStoredSchema()


def of_new_record(added: VersionedRecord) -> InstancesStored:
    """Return the event that announces a record which was just added."""
    record = added.record
    return InstancesStored(
        record.payload_id,
        record.correlation_id,
        record.traceparent,
        new_record=added if len(added.data) <= _MAX_COPY_BYTES else None,
        new_version=added.version,
    )


def encode(event: InstancesStored, exchange: str, routing_key: str) -> Message:
    body: dict[str, Any] = {
        "version": VERSION,
        "payload_id": event.payload_id,
        "correlation_id": event.correlation_id,
    }
    if event.new_version is not None:
        body["record_version"] = event.new_version
    if event.new_record is not None:
        body["record"] = event.new_record.data.decode()
    return Message(
        exchange=exchange,
        routing_key=routing_key,
        body=orjson.dumps(body),
        message_id=event.payload_id,
        correlation_id=event.correlation_id,
        type="InstancesStored",
        app_id="stowgate",
        timestamp=int(utc_now().timestamp()),
    )


def decode(body: bytes) -> InstancesStored:
    """Decode an event. Raises `NewerEvent` and `MalformedEvent`, which never quote the body."""
    try:
        row = _SCHEMA.load(versions.loads(body, VERSION))
    except versions.WrittenByNewer as error:
        raise NewerEvent(f"the event {error}") from error
    except (ValueError, ValidationError) as error:
        raise MalformedEvent("the body is not a valid InstancesStored event") from error
    payload_id, correlation_id = row["payload_id"], row["correlation_id"]
    if not (is_guid(payload_id) and is_guid(correlation_id)):
        raise MalformedEvent("payload_id and correlation_id of an event must be GUIDs")
    return InstancesStored(
        payload_id,
        correlation_id,
        new_record=_new_record(row),
        new_version=row["record_version"],
    )


def _new_record(row: dict[str, Any]) -> VersionedRecord | None:
    """Return the copy of the record; None if there is none, or the store must be read for it."""
    if row["record"] is None or row["record_version"] is None:
        return None
    try:
        found = new_record(row["record"].encode(), row["record_version"])
    except RecordUnreadable:
        return None
    return found if found.record.payload_id == row["payload_id"] else None
