"""The event between the two services, which only names a payload whose record should be read."""

from dataclasses import dataclass

import orjson
from marshmallow import EXCLUDE, Schema, ValidationError, fields

from shared import versions
from shared.errors import MalformedEvent, Permanent
from shared.ids import is_guid
from shared.ports import Message
from shared.time import utc_now

VERSION = 1


class NewerEvent(Permanent):
    """A newer Stowgate wrote the event."""


@dataclass(frozen=True)
class InstancesStored:
    """The instances of one POST are stored, and their ingest record is written.

    `traceparent` is the context of the trace of the POST. It is not in the body, as the context
    travels in a header.
    """

    payload_id: str
    correlation_id: str
    traceparent: str | None = None


class _InstancesStoredSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    payload_id = fields.String(required=True)
    correlation_id = fields.String(required=True)


_SCHEMA = _InstancesStoredSchema()


def encode(event: InstancesStored, exchange: str, routing_key: str) -> Message:
    return Message(
        exchange=exchange,
        routing_key=routing_key,
        body=orjson.dumps(
            {
                "version": VERSION,
                "payload_id": event.payload_id,
                "correlation_id": event.correlation_id,
            }
        ),
        message_id=event.payload_id,
        correlation_id=event.correlation_id,
        type="InstancesStored",
        app_id="stowgate",
        timestamp=int(utc_now().timestamp()),
    )


def decode(body: bytes) -> InstancesStored:
    """Decode an event. Raises `NewerEvent` and `MalformedEvent`, which never quote the body."""
    try:
        event = InstancesStored(**_SCHEMA.load(versions.loads(body, VERSION)))
    except versions.WrittenByNewer as error:
        raise NewerEvent(f"the event {error}") from error
    except (ValueError, ValidationError) as error:
        raise MalformedEvent("the body is not a valid InstancesStored event") from error
    if not (is_guid(event.payload_id) and is_guid(event.correlation_id)):
        raise MalformedEvent("payload_id and correlation_id of an event must be GUIDs")
    return event
