"""What is served, as an OpenAPI 3.1 document. The STOW-RS body and answer are described by hand."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import orjson
from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from marshmallow import Schema, fields

from api.auth.guard import Scope
from api.capabilities import CONTENT_TYPE as WADL_TYPE
from api.status import LISTED, PayloadSchema
from api.store_response import JSON_TYPE, XML_TYPE
from api.vae import CHANGE_SCHEMA
from shared.records import MOST_LISTED, State
from shared.time import UtcDateTime
from shared.vae import AE_TITLE_SHAPE, UID_SHAPE, WORKFLOW_ID_SHAPE, VaeSchema

_TEXT = {"type": "string"}
_GUID = {"type": "string", "format": "uuid"}

_FORMS = (
    ("/dicomweb/studies", "no workflow: the Workflow Manager routes it"),
    ("/dicomweb/{workflow}/studies", "the workflow named in the URL"),
    ("/dicomweb/vae/{aet}/studies", "the workflows of a Virtual Application Entity"),
    ("/dicomweb/vae/{aet}/{workflow}/studies", "the workflow named, for an AE title"),
)


class PayloadPageSchema(Schema):
    payloads = fields.List(fields.Nested(LISTED), required=True)
    next = fields.UUID(required=True, allow_none=True)


def openapi_document(
    public_url: str | None, scheme: str, scopes: Mapping[tuple[str, str], Scope]
) -> bytes:
    """`scheme` is that of the Authorization header; `scopes` are by path and method."""
    shapes = MarshmallowPlugin()
    spec = APISpec(
        title="Stowgate",
        version=version("stowgate"),
        openapi_version="3.1.0",
        plugins=[shapes],
        info={"description": "STOW-RS in front of the MONAI Deploy Workflow Manager"},
        servers=[{"url": public_url or "/"}],
    )
    if shapes.converter is None:
        raise AssertionError("apispec gives its plug-ins the document they are for")
    shapes.converter.map_to_openapi_type(  # type: ignore[no-untyped-call]
        UtcDateTime, "string", "date-time"
    )
    spec.components.schema("Vae", schema=VaeSchema)
    spec.components.schema("VaeChange", schema=CHANGE_SCHEMA)
    spec.components.schema("Payload", schema=PayloadSchema)
    spec.components.schema("ListedPayload", schema=LISTED)
    spec.components.schema("PayloadPage", schema=PayloadPageSchema)
    spec.components.schema("Problem", _problem_schema())
    spec.components.schema("StoreResponse", _dataset_schema())
    for form, words in _FORMS:
        for path in (form, f"{form}/{{study}}"):
            spec.path(
                path,
                parameters=_parameters(path),
                operations={"post": _store(words), "options": _allowed()},
            )
    spec.path("/dicomweb", operations={"options": _described()})
    _vae_paths(spec)
    _status_paths(spec)
    document = spec.to_dict()
    if scheme:
        document["components"]["securitySchemes"] = {scheme: {"type": "http", "scheme": scheme}}
    for (path, method), scope in scopes.items():
        operation = document["paths"][path][method]
        if scope is not Scope.STORE and path != "/metrics":
            operation["responses"] |= _ANSWERS_OF_THE_STORE
        if scope is Scope.ADMIN:
            operation["responses"]["403"] = _problem("a page of another origin may not administer")
        if scheme:
            _guard(operation, scheme, scope)
    return orjson.dumps(document)


def _guard(operation: dict[str, Any], scheme: str, scope: Scope) -> None:
    """Say what it needs (RFC 7617, RFC 6750), and how it is refused."""
    operation["security"] = [{scheme: [scope]}]
    answers = operation["responses"]
    answers["401"] = _problem("it is not known who asks; see WWW-Authenticate")
    answers["403"] = _problem(
        f"the caller lacks the scope {scope}, or may not store to this VAE, or is a page of "
        "another origin"
    )
    if scheme == "basic":
        answers.setdefault("429", _problem("too many passwords are being checked"))
    else:
        answers.setdefault("503", _problem("the keys of the tokens' issuer cannot be had"))


def _problem_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "RFC 9457",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": _TEXT,
            "title": _TEXT,
            "status": {"type": "integer"},
            "detail": _TEXT,
            "correlation_id": _GUID,
        },
    }


def _dataset_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "description": (
            "Store Instances Response Module (PS3.18 Annex I) in the DICOM JSON Model: 00081190 "
            "RetrieveURL, 00081198 FailedSOPSequence, 00081199 ReferencedSOPSequence, 0008119A "
            "OtherFailuresSequence. Each failed item says why in words in the private element "
            "00091001 of the block STOWGATE."
        ),
        "additionalProperties": {
            "type": "object",
            "required": ["vr"],
            "properties": {"vr": {"type": "string"}, "Value": {"type": "array"}},
        },
    }


def _parameters(path: str) -> list[dict[str, Any]]:
    schemas = {
        "study": _TEXT | UID_SHAPE,
        "workflow": _TEXT | WORKFLOW_ID_SHAPE,
        "aet": _TEXT | AE_TITLE_SHAPE,
        "name": _TEXT | AE_TITLE_SHAPE,
        "payload_id": _GUID,
    }
    return [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in schemas.items()
        if f"{{{name}}}" in path
    ]


def _json(words: str, schema: Any) -> dict[str, Any]:
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def _problem(words: str) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": words, "content": content}


_ANSWERS_OF_THE_STORE = {
    "500": _problem("what the object store has cannot be read; the words say what to do"),
    "503": _problem("the object store does not answer; see Retry-After"),
}


def _header(words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": words, "schema": schema}


_CORRELATED = {"X-Correlation-ID": _header("of this request, also in the logs", _GUID)}
_ALLOW = {"Allow": _header("the methods that are taken", _TEXT)}
_ACCEPT_POST = {"Accept-Post": _header("the media types that are taken", _TEXT)}


def _store(words: str) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    stored = {
        "X-Payload-ID": _header("of what was stored", _GUID),
        "Link": _header('with rel="status": where to follow it', _TEXT),
        "Idempotent-Replayed": _header("true: the first answer to this Idempotency-Key", _TEXT),
    }
    dataset = {
        JSON_TYPE: {"schema": {"$ref": "#/components/schemas/StoreResponse"}},
        XML_TYPE: {"schema": _TEXT},
    }
    answers: dict[str, Any] = {
        "200": {"description": "all stored", "headers": stored, "content": dataset},
        "202": {
            "description": "stored with warnings, or stored in part",
            "headers": stored,
            "content": dataset,
        },
        "204": {"description": "the request carries no data"},
        "400": _problem("malformed request, or a body that did not arrive whole"),
        "408": _problem("the sender stalled"),
        "409": {
            "description": (
                "no instance could be stored; or, as a problem and with Retry-After, another "
                "request with this Idempotency-Key is still running"
            ),
            "content": dataset | _problem("")["content"],
        },
        "413": _problem("over a limit, or the VAE's"),
        "422": _problem("this Idempotency-Key was used for another body"),
        "415": {
            "description": (
                "unsupported media type, or Content-Encoding; then Accept-Encoding says identity"
            ),
            "headers": _ACCEPT_POST,
        },
        "500": _problem("an error of this service; nothing was acknowledged"),
        "429": _problem("too many at a time, or too often"),
        "503": _problem("the object store does not answer"),
        "507": _problem("the object store or the spool is full"),
    }
    for answer in answers.values():
        answer["headers"] = _CORRELATED | answer.get("headers", {})
    for status in ("409", "429", "503"):
        answers[status]["headers"]["Retry-After"] = _header("in seconds", {"type": "integer"})
    return {
        "summary": f"Store instances and open a workflow request: {words}",
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": (
                    "sent again within 24 h by the same caller to the same path, it gets the first "
                    "answer and opens nothing new. A caller is known by its name, or by its "
                    "address where nobody is asked for one"
                ),
                "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
            },
            {"name": "X-Correlation-ID", "in": "header", "schema": _GUID},
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/dicom": {"schema": binary},
                "multipart/related": {
                    "schema": {"type": "object", "additionalProperties": binary},
                },
            },
        },
        "responses": answers,
    }


def _allowed() -> dict[str, Any]:
    headers = _ALLOW | _ACCEPT_POST | _CORRELATED
    return {
        "summary": "Ask what may be sent here",
        "responses": {"204": {"description": "the headers say it", "headers": headers}},
    }


def _described() -> dict[str, Any]:
    return {
        "summary": "Retrieve the Capabilities Description (PS3.18 8.9)",
        "responses": {
            "200": {
                "description": "in WADL",
                "headers": _ALLOW | _CORRELATED,
                "content": {WADL_TYPE: {"schema": _TEXT}},
            }
        },
    }


def _vae_paths(spec: APISpec) -> None:
    vae = {"$ref": "#/components/schemas/Vae"}
    body = {"required": True, "content": {"application/json": {"schema": vae}}}
    spec.path(
        "/config/vae",
        operations={
            "get": {
                "summary": "List Virtual Application Entities",
                "responses": {"200": _json("all of them", {"type": "array", "items": vae})},
            },
            "post": {
                "summary": "Create one",
                "requestBody": body,
                "responses": {
                    "201": {
                        **_json("created", vae),
                        "headers": {"Location": _header("of the new one", _TEXT)},
                    },
                    "400": _problem("it breaks a rule"),
                    "409": _problem("name or AE title is taken"),
                    "413": _problem("the body is too large for a VAE"),
                    "429": _problem("other bodies are being received, and are slow"),
                },
            },
            "put": {
                "summary": "Change workflows, plug-ins and policy of the one named in the body",
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {
                            "schema": {
                                "$ref": "#/components/schemas/VaeChange",
                                "required": ["name"],
                            }
                        }
                    },
                },
                "responses": {
                    "200": _json("changed", vae),
                    "400": _problem("it breaks a rule"),
                    "404": _problem("no such VAE"),
                    "413": _problem("the body is too large for a VAE"),
                    "429": _problem("other bodies are being received, and are slow"),
                },
            },
        },
    )
    spec.path(
        "/config/vae/{name}",
        parameters=_parameters("{name}"),
        operations={
            "get": {
                "summary": "Show one",
                "responses": {"200": _json("found", vae), "404": _problem("no such VAE")},
            },
            "delete": {
                "summary": "Remove one",
                "responses": {"200": _json("what it was", vae), "404": _problem("no such VAE")},
            },
        },
    )
    spec.path(
        "/config/vae/plug-ins",
        operations={
            "get": {
                "summary": "Input plug-ins, by name",
                "responses": {"200": _json("none are built in", {"type": "object"})},
            }
        },
    )


_READINESS = {
    "type": "object",
    "required": ["status", "dependencies"],
    "properties": {
        "status": {"type": "string", "enum": ["ready", "degraded", "down", "unknown", "stopping"]},
        "dependencies": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["status"],
                "properties": {
                    "status": {"type": "string", "enum": ["ready", "down"]},
                    "detail": {
                        "type": "string",
                        "description": "why it is down, for callers with the scope read only",
                    },
                },
            },
        },
    },
}


def _status_paths(spec: APISpec) -> None:
    query = [
        {"name": "state", "schema": {"type": "string", "enum": [str(state) for state in State]}},
        {"name": "limit", "schema": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED}},
        {"name": "cursor", "schema": _GUID},
    ]
    spec.path(
        "/payloads",
        operations={
            "get": {
                "summary": "What came in, the newest first",
                "parameters": [{**parameter, "in": "query"} for parameter in query],
                "responses": {
                    "200": _json("a page", {"$ref": "#/components/schemas/PayloadPage"}),
                    "400": _problem("a parameter breaks its rule"),
                },
            }
        },
    )
    spec.path(
        "/payloads/{payload_id}",
        parameters=_parameters("{payload_id}"),
        operations={
            "get": {
                "summary": "Where a payload stands",
                "responses": {
                    "200": _json("found", {"$ref": "#/components/schemas/Payload"}),
                    "404": _problem("no such payload"),
                },
            }
        },
    )
    spec.path(
        "/payloads/{payload_id}/replay",
        parameters=_parameters("{payload_id}"),
        operations={
            "post": {
                "summary": "Open the workflow request of a failed payload once more",
                "responses": {
                    "202": _json("pending again", {"$ref": "#/components/schemas/Payload"}),
                    "404": _problem("no such payload"),
                    "409": _problem("it is not failed"),
                },
            }
        },
    )
    state = {"type": "object"}
    spec.path(
        "/openapi.json",
        operations={"get": {"responses": {"200": _json("this document", state)}}},
    )
    spec.path(
        "/health/live",
        operations={"get": {"responses": {"200": _json("the process serves", state)}}},
    )
    spec.path(
        "/health/startup",
        operations={"get": {"responses": {"200": _json("the process has started", state)}}},
    )
    spec.path(
        "/health/ready",
        operations={
            "get": {
                "responses": {
                    "200": _json(
                        "this replica answers; the body says how uploads fare", _READINESS
                    ),
                    "503": _json("stopping", _READINESS),
                }
            }
        },
    )
    spec.path(
        "/metrics",
        operations={
            "get": {
                "responses": {
                    "200": {
                        "description": "Prometheus text format",
                        "content": {"text/plain": {"schema": _TEXT}},
                    }
                }
            }
        },
    )
