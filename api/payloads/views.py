"""The payloads for operators and senders: show, list, replay."""

import re
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

import orjson
from flask import Response, jsonify, request
from flask.typing import ResponseReturnValue
from marshmallow import Schema, fields

from api.http.problems import BadRequest, NotFound
from api.payloads.states import Payload, Payloads
from api.payloads.workflow_manager_api import WorkflowManagerApi, WorkflowManagerSilent
from shared.ids import is_guid
from shared.instances import StoredInstance, workflow_request_json
from shared.record_store import MAX_LISTED
from shared.refusals import PayloadState
from shared.time import UtcDateTime, iso_utc
from shared.trace_context import shown_trace_id


class PayloadSchema(Schema):
    """A payload in a list. `_shown` adds the request, which names every instance and may have
    megabytes, and the progress in the Workflow Manager."""

    payload_id = fields.UUID(required=True)
    correlation_id = fields.UUID(required=True)
    state = fields.Enum(PayloadState, by_value=True, required=True)
    received_at = UtcDateTime(required=True)
    opened_at = UtcDateTime(required=True, allow_none=True)
    refused_at = UtcDateTime(required=True, allow_none=True)
    refusals = fields.Integer(required=True)
    source = fields.String(required=True)
    caller = fields.String(required=True, allow_none=True)
    destination = fields.String(required=True)
    workflows = fields.List(fields.String(), required=True, allow_none=True)
    route = fields.String(required=True, allow_none=True)
    file_count = fields.Integer(required=True)
    attempts = fields.Integer(required=True)
    last_error = fields.String(required=True, allow_none=True)
    trace_id = fields.String(required=True, allow_none=True)


_LISTED = PayloadSchema()


def payload_views(
    payloads: Payloads,
    workflow_manager: WorkflowManagerApi | None,
) -> dict[str, Callable[..., ResponseReturnValue]]:
    """Return the views by endpoint."""

    def show(payload_id: str) -> ResponseReturnValue:
        found = find(payloads, payload_id)
        return shown(found, progress(found))

    def shown(
        payload: Payload, progress: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK
    ) -> Response:
        pieces = _shown(payload, progress, payloads.instances(payload))
        # Attached instances are sent while they are read.
        body = pieces if payload.record.instances is None else b"".join(pieces)
        return Response(body, status, content_type="application/json")

    def progress(payload: Payload) -> dict[str, Any]:
        """Return the progress in the Workflow Manager, if its API is configured."""
        if workflow_manager is None:
            return {}
        instances, why = None, None
        if payload.record.opened_at is not None:
            try:
                instances = workflow_manager.workflow_instances(payload.record.payload_id)
            except WorkflowManagerSilent as error:
                why = str(error)
        return {"workflow_instances": instances, "workflow_instances_error": why}

    def replay(payload_id: str) -> ResponseReturnValue:
        return shown(payloads.replay(find(payloads, payload_id)), {}, HTTPStatus.ACCEPTED)

    def newest() -> ResponseReturnValue:
        page, cursor = payloads.newest(_state(), _limit(), _cursor())
        return jsonify({"payloads": [_dump(found) for found in page], "next": cursor})

    return {"payloads.show": show, "payloads.replay": replay, "payloads.newest": newest}


def find(payloads: Payloads, payload_id: str) -> Payload:
    """Return the payload with the id in the URL. Raises `NotFound`."""
    found = payloads.find(payload_id.lower()) if is_guid(payload_id) else None
    if found is None:
        raise NotFound(
            "there is no payload with that id: the id is wrong, or the upload was not acknowledged"
        )
    return found


def _shown(
    payload: Payload, progress: Mapping[str, Any], instances: Iterator[StoredInstance]
) -> Iterator[bytes]:
    """Yield a payload with its request and its progress as JSON, in pieces."""
    request = payload.record.workflow_request
    yield orjson.dumps({**_dump(payload), **progress})[:-1] + b',"workflow_request":'
    if request is None:
        yield b"null"
    else:
        yield from workflow_request_json(request, instances)
    yield b"}\n"


def _dump(payload: Payload) -> dict[str, Any]:
    refusal = payload.refusal
    refused_at = None if refusal is None else iso_utc(refusal.refused_at)
    row: dict[str, Any] = _LISTED.dump(payload.record)
    return row | {
        "state": payload.state,
        "refused_at": refused_at,
        "refusals": payload.outcome.refusals,
        "last_error": payload.last_error,
        "trace_id": shown_trace_id(payload.record.traceparent),
    }


def _state() -> PayloadState | None:
    given = request.args.get("state")
    return None if given is None else payload_state(given)


def payload_state(given: str) -> PayloadState:
    """Return the state of that name. Raises `BadRequest`, which lists all names."""
    if given not in list(PayloadState):
        raise BadRequest(f"state must be one of {', '.join(PayloadState)}")
    return PayloadState(given)


def _limit() -> int:
    given = request.args.get("limit", "50")
    if not (re.fullmatch("[0-9]{1,3}", given) and 1 <= int(given) <= MAX_LISTED):
        raise BadRequest(f"limit must be a whole number from 1 to {MAX_LISTED}")
    return int(given)


def _cursor() -> str:
    given = request.args.get("cursor", "")
    if given and not is_guid(given):
        raise BadRequest("cursor must be the value of next in an earlier answer")
    return given.lower()
