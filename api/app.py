"""The Flask application, put together from parts that are handed in."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import structlog
from flask import Flask, Request, Response
from prometheus_client import CollectorRegistry
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import MapAdapter, PathConverter

from api import audit, problems
from api.auth import guard
from api.auth.guard import Authenticator, Scope
from api.auth.own_hosts import OwnHosts
from api.cors import Cors
from api.openapi import openapi_document
from api.paths import routed_path
from api.proxies import KnownProxies
from api.status import status_blueprint
from api.stow import StoreTransaction, stow_blueprint
from api.vae import vae_blueprint
from shared.config import Network
from shared.engines import Dependency
from shared.events import InstancesStored
from shared.health import Readiness, health_blueprint
from shared.logs import where
from shared.metrics import ApiMetrics, HealthMetrics
from shared.records import Records
from shared.vae import VaeRegistry

_log = structlog.get_logger()

Environ = dict[str, Any]
WsgiApp = Callable[[Environ, Any], Iterable[bytes]]

READINESS = "stowgate.readiness"
"""Key of the application's extension that is told when a stop begins."""

# By endpoint; None is for everybody, and one that is missing here is for nobody.
SCOPES: Mapping[str, Scope | None] = {
    "stow.store": Scope.STORE,
    "stow.allowed": None,
    "stow.describe": None,
    "status.newest": Scope.READ,
    "status.show": Scope.READ,
    "status.replay": Scope.ADMIN,
    "vae.list_all": Scope.READ,
    "vae.show": Scope.READ,
    "vae.plug_ins": Scope.READ,
    "vae.add": Scope.ADMIN,
    "vae.update": Scope.ADMIN,
    "vae.remove": Scope.ADMIN,
    "health.live": None,
    "health.ready": None,
    "health.startup": None,
    "health.metrics": None,
    "openapi": None,
}


def create_app(
    *,
    store: StoreTransaction,
    authenticator: Authenticator,
    own_hosts: OwnHosts | None,
    metrics_open: bool,
    vaes: VaeRegistry,
    records: Records,
    announce: Callable[[InstancesStored], None],
    dependencies: Mapping[str, Dependency],
    registry: CollectorRegistry,
    metrics: ApiMetrics,
    public_url: str | None,
    trusted_proxies: int | Sequence[Network] = 0,
    cors_origins: Collection[str] = (),
    cors_headers: Collection[str] = (),
) -> Flask:
    app = _App(__name__, static_folder=None)
    app.url_map.converters["path"] = _AnyPath
    app.url_map.merge_slashes = False  # werkzeug would redirect
    problems.install(app)
    app.register_blueprint(stow_blueprint(store, public_url, metrics))
    app.register_blueprint(vae_blueprint(vaes, public_url))
    app.register_blueprint(status_blueprint(records, announce))
    readiness = Readiness(dependencies, HealthMetrics(registry))
    app.extensions[READINESS] = readiness
    app.register_blueprint(
        health_blueprint(readiness, registry, lambda: guard.may(authenticator, Scope.READ))
    )
    scopes = SCOPES if metrics_open else {**SCOPES, "health.metrics": Scope.READ}

    document = openapi_document(
        public_url, authenticator.scheme, _scopes_of_operations(app, scopes)
    )

    @app.get("/openapi.json")
    def openapi() -> Response:
        return Response(document, content_type="application/json")

    # Behind the blueprints, whose own before_app_request comes first.
    guard.install(app, authenticator, scopes, cors_origins, own_hosts)
    audit.install(app)

    app.wsgi_app = _OwnPath(app.wsgi_app, public_url)  # type: ignore[method-assign]
    if cors_origins:
        app.wsgi_app = Cors(  # type: ignore[method-assign]
            app.wsgi_app, cors_origins, cors_headers
        )
    if not isinstance(trusted_proxies, int):
        app.wsgi_app = KnownProxies(app.wsgi_app, trusted_proxies)  # type: ignore[method-assign]
    elif trusted_proxies:
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=trusted_proxies, x_proto=0, x_host=0
        )
    return app


def _scopes_of_operations(
    app: Flask, scopes: Mapping[str, Scope | None]
) -> dict[tuple[str, str], Scope]:
    """By path and method, as OpenAPI writes them."""
    return {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower()): scope
        for rule in app.url_map.iter_rules()
        if (scope := scopes.get(rule.endpoint)) is not None
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }


class _App(Flask):
    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """By the path alone: werkzeug refuses a Host that is no name, which is nothing to us."""
        if request is None:
            return None
        return self.url_map.bind("", default_method=request.method, path_info=request.path)

    def log_exception(self, exc_info: Any) -> None:
        """Of an error that nobody foresaw, without its text."""
        error = exc_info[1]
        _log.error("request failed", error=type(error).__name__, place=where(error))


class _AnyPath(PathConverter):
    """Also takes a line feed, so that an id with one is refused in words and not just not found."""

    regex = r"[^/][\s\S]*?"


class _OwnPath:
    def __init__(self, app: WsgiApp, public_url: str | None) -> None:
        self._app = app
        self._public_url = public_url

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        path: str = environ["PATH_INFO"]
        environ["PATH_INFO"] = routed_path(path, environ.get("RAW_URI", path), self._public_url)
        return self._app(environ, start_response)
