"""The table of all routes of the API.

It defines the routing, the scopes, the audit trail, the OpenAPI document, the paths that a public
URL cannot have, and which requests the server treats as uploads.
"""

import re
from enum import StrEnum
from typing import NamedTuple

from shared.runtime.health_paths import HEALTH_PATHS


class Scope(StrEnum):
    """A permission of a caller."""

    STORE = "store"
    READ = "read"
    ADMIN = "admin"


class Route(NamedTuple):
    """One route.

    `path` is a rule of werkzeug. `scope` is None for a public route. `act` is the name in the audit
    trail, and None for a request that changes nothing.
    """

    method: str
    path: str
    endpoint: str
    scope: Scope | None = None
    act: str | None = None


STORE_SERVICE = "/dicomweb"

STORE_PATHS = tuple(
    f"{STORE_SERVICE}{form}/studies{study}"
    for form in ("", "/<path:workflow>", "/vae/<aet>", "/vae/<aet>/<path:workflow>")
    for study in ("", "/<path:study>")
)

ROUTES = (
    *(Route("POST", path, "stow.store", Scope.STORE, "store") for path in STORE_PATHS),
    *(Route("OPTIONS", path, "stow.allowed") for path in STORE_PATHS),
    Route("OPTIONS", STORE_SERVICE, "stow.describe"),
    Route("GET", "/payloads", "payloads.newest", Scope.READ),
    Route("GET", "/payloads/<payload_id>", "payloads.show", Scope.READ),
    Route(
        "POST", "/payloads/<payload_id>/replay", "payloads.replay", Scope.ADMIN, "replay payload"
    ),
    Route("GET", "/config/vae", "vae.list_all", Scope.READ),
    Route("POST", "/config/vae", "vae.add", Scope.ADMIN, "create VAE"),
    Route("PUT", "/config/vae", "vae.update", Scope.ADMIN, "change VAE"),
    Route("GET", "/config/vae/plug-ins", "vae.plug_ins", Scope.READ),
    Route("GET", "/config/vae/<name>", "vae.show", Scope.READ),
    Route("DELETE", "/config/vae/<name>", "vae.remove", Scope.ADMIN, "remove VAE"),
    *(Route("GET", path, endpoint) for endpoint, path in HEALTH_PATHS.items()),
    Route("GET", "/openapi.json", "openapi"),
)

PAGE_ROUTES = (
    Route("GET", "/", "page.overview", Scope.READ),
    Route("GET", "/ui", "page.overview", Scope.READ),
    Route("GET", "/ui/", "page.overview", Scope.READ),
    Route("GET", "/ui/payloads", "page.payloads", Scope.READ),
    Route("GET", "/ui/payloads/<payload_id>", "page.payload", Scope.READ),
    Route("POST", "/ui/payloads/<payload_id>/replay", "page.replay", Scope.ADMIN, "replay payload"),
    Route("POST", "/ui/replay/<state>", "page.replay_all", Scope.ADMIN, "replay payloads"),
    Route("GET", "/ui/vaes", "page.vaes", Scope.READ),
    Route("GET", "/ui/new-vae", "page.new_vae", Scope.ADMIN),
    Route("POST", "/ui/new-vae", "page.add_vae", Scope.ADMIN, "create VAE"),
    Route("GET", "/ui/vaes/<name>", "page.vae", Scope.READ),
    Route("POST", "/ui/vaes/<name>", "page.change_vae", Scope.ADMIN, "change VAE"),
    Route("POST", "/ui/vaes/<name>/remove", "page.remove_vae", Scope.ADMIN, "remove VAE"),
    Route("GET", "/ui/send", "page.send", Scope.READ),
    Route("GET", "/ui/help", "page.help", Scope.READ),
    Route("GET", "/ui/static/<name>", "page.static"),
)
"""The operator's page, which answers in HTML and is not part of the OpenAPI document."""

_ALL = (*ROUTES, *PAGE_ROUTES)

RESERVED = frozenset(route.path.split("/")[1] for route in _ALL) - {""}
"""The first segments of all paths."""

SCOPES = {route.endpoint: route.scope for route in _ALL}

ACTS = {route.endpoint: route.act for route in _ALL if route.act}


def template(rule: str) -> str:
    """Convert a rule of werkzeug to a path of OpenAPI."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def is_page(path: str) -> bool:
    """Check whether a request is for the operator's page, by its normalized path."""
    return path in ("/", "/ui") or path.startswith("/ui/")


def is_store(method: str, path: str) -> bool:
    """Check whether a request is an upload, by its normalized path (`api/http/paths.py`)."""
    return method == "POST" and path.startswith(f"{STORE_SERVICE}/")
