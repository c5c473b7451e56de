"""Where a payload stands: the ingest records, as operators and senders see them."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import orjson
from flask import Response, jsonify, request
from flask.typing import ResponseReturnValue
from marshmallow import Schema, fields

from api.http.problems import BadRequest, Conflict, NotFound
from shared.errors import Transient, VersionConflict
from shared.events import InstancesStored
from shared.ids import is_guid
from shared.instances import StoredInstance, workflow_request_json
from shared.records import MOST_LISTED, HeldRecord, IngestRecord, Records, State
from shared.time import UtcDateTime, utc_now


class PayloadSchema(Schema):
    payload_id = fields.UUID(required=True)
    correlation_id = fields.UUID(required=True)
    state = fields.Enum(State, by_value=True, required=True)
    received_at = UtcDateTime(required=True)
    opened_at = UtcDateTime(required=True, allow_none=True)
    source = fields.String(required=True)
    destination = fields.String(required=True)
    workflows = fields.List(fields.String(), required=True, allow_none=True)
    route = fields.String(required=True, allow_none=True)
    file_count = fields.Integer(required=True)
    attempts = fields.Integer(required=True)
    last_error = fields.String(required=True, allow_none=True)
    workflow_request = fields.Raw(required=True, allow_none=True)


# A request names every instance: a page of them would be megabytes.
LISTED = PayloadSchema(exclude=["workflow_request"])


def payload_views(
    records: Records, announce: Callable[[InstancesStored], None]
) -> dict[str, Callable[..., ResponseReturnValue]]:
    """By their endpoints."""

    def show(payload_id: str) -> ResponseReturnValue:
        return shown(find(payload_id).record)

    def shown(record: IngestRecord, status: HTTPStatus = HTTPStatus.OK) -> Response:
        pieces = _shown(record, records.instances(record))
        # One whose instances are attached is sent as it is read.
        body = pieces if record.instances is None else b"".join(pieces)
        return Response(body, status, content_type="application/json")

    def find(payload_id: str) -> HeldRecord:
        held = records.find(payload_id.lower()) if is_guid(payload_id) else None
        if held is None:
            raise NotFound(
                "there is no payload of that id: either the id is mistyped, or the upload was "
                "never acknowledged"
            )
        return held

    def replay(payload_id: str) -> ResponseReturnValue:
        held = find(payload_id)
        if held.record.state is not State.FAILED:
            raise Conflict(f"the payload is {held.record.state}; only a failed one can be replayed")
        try:
            record = records.replay(held, due_at=utc_now()).record
        except VersionConflict as error:
            raise Conflict("the payload is being moved or replayed already") from error
        # Where the broker does not take it, the relay will announce it: it is due.
        with suppress(Transient):
            announce(InstancesStored(record.payload_id, record.correlation_id))
        return shown(record, HTTPStatus.ACCEPTED)

    def newest() -> ResponseReturnValue:
        page, cursor = records.newest(_state(), _limit(), _cursor())
        return jsonify({"payloads": list(map(_dump_listed, page)), "next": cursor})

    return {"payloads.show": show, "payloads.replay": replay, "payloads.newest": newest}


def _shown(record: IngestRecord, instances: Iterator[StoredInstance]) -> Iterator[bytes]:
    """As `PayloadSchema` has it, in pieces."""
    yield orjson.dumps(LISTED.dump(record))[:-1] + b',"workflow_request":'
    if record.workflow_request is None:
        yield b"null"
    else:
        yield from workflow_request_json(record.workflow_request, instances)
    yield b"}\n"


def _dump_listed(record: IngestRecord) -> Any:
    return LISTED.dump(record)


def _state() -> State | None:
    given = request.args.get("state")
    if given is None:
        return None
    if given not in list(State):
        raise BadRequest(f"state must be one of {', '.join(State)}")
    return State(given)


def _limit() -> int:
    given = request.args.get("limit", "50")
    if not (re.fullmatch("[0-9]{1,3}", given) and 1 <= int(given) <= MOST_LISTED):
        raise BadRequest(f"limit must be a whole number from 1 to {MOST_LISTED}")
    return int(given)


def _cursor() -> str:
    given = request.args.get("cursor", "")
    if given and not is_guid(given):
        raise BadRequest("cursor must be what an earlier answer gave as next")
    return given.lower()
