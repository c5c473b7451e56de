"""The OpenAPI 3.1 document: `openapi.yaml`, completed from the table of routes."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import orjson
import yaml

from api.http.routes import ROUTES, STORE_PATHS, Scope, template


def openapi_document(
    public_url: str | None, scheme: str, scopes: Mapping[str, Scope | None]
) -> bytes:
    """Render the document as JSON.

    Args:
        public_url: The URL of the server; None for a relative one.
        scheme: The scheme of the Authorization header; empty without authentication.
        scopes: The scope by endpoint; None for a public one.
    """
    # The round trip turns shared YAML anchors into copies, which are changed separately below.
    document = yaml.safe_load(files("api.http").joinpath("openapi.yaml").read_text("utf-8"))
    document = orjson.loads(orjson.dumps(document))
    document["info"]["version"] = version("stowgate")
    document["servers"] = [{"url": public_url or "/"}]
    store = orjson.dumps(document["components"].pop("pathItems")["Store"])
    for rule in STORE_PATHS:
        names = re.findall(r"<(?:path:)?(\w+)>", rule)
        parameters = [{"$ref": f"#/components/parameters/{name}"} for name in names]
        document["paths"][template(rule)] = {"parameters": parameters, **orjson.loads(store)}
    if scheme:
        document["components"]["securitySchemes"] = {scheme: {"type": "http", "scheme": scheme}}
    for route in ROUTES:
        scope = scopes[route.endpoint]
        if scope is not None:
            operation = document["paths"][template(route.path)][route.method.lower()]
            _guard(operation, scheme, scope)
    return orjson.dumps(document)


def _guard(operation: dict[str, Any], scheme: str, scope: Scope) -> None:
    """Add the scope (RFC 7617, RFC 6750) and the responses of every operation with a scope."""
    responses = {"500": "InternalServerError", "503": "Unavailable"}
    if scheme:
        operation["security"] = [{scheme: [scope]}]
        responses |= {"401": "Unauthorized", "403": "Forbidden", "429": "TooBusy"}
    else:
        responses["421"] = "MisdirectedRequest"
        if scope is Scope.ADMIN:
            responses["403"] = "Forbidden"
    for status, name in responses.items():
        operation["responses"].setdefault(status, {"$ref": f"#/components/responses/{name}"})
