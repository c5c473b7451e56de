"""Creation of the Flask application from its parts."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import structlog
from flask import Flask, Request, Response
from prometheus_client import CollectorRegistry
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import MapAdapter, PathConverter

from api.admission.watchdog import Watchdog
from api.auth import audit, guard
from api.auth.guard import Authenticator
from api.auth.own_hosts import OwnHosts
from api.http import problems
from api.http.client_address import TrustedProxies
from api.http.cors import Cors
from api.http.paths import routed_path
from api.openapi import openapi_document
from api.payloads.states import Payloads
from api.payloads.views import payload_views
from api.payloads.workflow_manager_api import WorkflowManagerApi
from api.routes import ROUTES, SCOPES, Scope
from api.stow.view import StoreTransaction, correlate, stow_views
from api.vae.registry import VaeRegistry
from api.vae.views import vae_views
from shared.events import InstancesStored
from shared.runtime.backends import Dependency
from shared.runtime.health import Readiness, health_views
from shared.runtime.logs import where
from shared.runtime.metrics import ApiMetrics, HealthMetrics
from shared.settings.parsers import Network

_log = structlog.get_logger()

Environ = dict[str, Any]
WsgiApp = Callable[[Environ, Any], Iterable[bytes]]

READINESS = "stowgate.readiness"
"""Key of the application's extension that is told when a stop begins."""


def create_app(
    *,
    store: StoreTransaction,
    authenticator: Authenticator,
    watchdog: Watchdog,
    own_hosts: OwnHosts | None,
    metrics_open: bool,
    vaes: VaeRegistry,
    payloads: Payloads,
    announce: Callable[[InstancesStored], None],
    workflow_manager: WorkflowManagerApi | None,
    dependencies: Mapping[str, Dependency],
    registry: CollectorRegistry,
    metrics: ApiMetrics,
    public_url: str | None,
    trusted_proxies: int | Sequence[Network] = 0,
    cors_origins: Collection[str] = (),
    cors_headers: Collection[str] = (),
) -> Flask:
    """Create the application: routes, error handlers, authentication, audit and WSGI middleware.

    Args:
        own_hosts: Rejects requests to other hosts; None accepts every host.
        metrics_open: Whether `/metrics` is public; else it requires the scope `read`.
        announce: Publishes the event of a replayed payload.
        dependencies: The dependencies that readiness reports, by name.
        registry: The metrics that `/metrics` shows.
        public_url: The base of links; None makes them relative.
        trusted_proxies: The networks of trusted proxies, or their number.
        cors_origins: The origins whose pages may call the API.
        cors_headers: Further request headers that such a page may send.
    """
    app = _App(__name__, static_folder=None)
    app.url_map.converters["path"] = _AnyPath
    app.url_map.merge_slashes = False  # werkzeug would redirect
    problems.install(app)
    readiness = Readiness(dependencies, HealthMetrics(registry))
    app.extensions[READINESS] = readiness
    scopes = SCOPES if metrics_open else {**SCOPES, "health.metrics": Scope.READ}
    document = openapi_document(public_url, authenticator.scheme, scopes)
    views = {
        **stow_views(store, public_url),
        **vae_views(vaes, public_url, watchdog),
        **payload_views(payloads, announce, workflow_manager),
        **health_views(readiness, registry, lambda: guard.may(authenticator, Scope.READ)),
        "openapi": lambda: Response(document, content_type="application/json"),
    }
    for route in ROUTES:
        app.add_url_rule(
            route.path,
            endpoint=route.endpoint,
            view_func=views[route.endpoint],
            methods=[route.method],
            # The table has its own OPTIONS routes for these paths.
            provide_automatic_options=False if route.endpoint.startswith("stow.") else None,
        )
    correlate(app, metrics)
    guard.install(app, authenticator, scopes, cors_origins, own_hosts)
    audit.install(app)

    app.wsgi_app = _NormalizedPath(app.wsgi_app, public_url)  # type: ignore[method-assign]
    if cors_origins:
        app.wsgi_app = Cors(  # type: ignore[method-assign]
            app.wsgi_app, cors_origins, cors_headers
        )
    if not isinstance(trusted_proxies, int):
        app.wsgi_app = TrustedProxies(app.wsgi_app, trusted_proxies)  # type: ignore[method-assign]
    elif trusted_proxies:
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=trusted_proxies, x_proto=0, x_host=0
        )
    return app


class _App(Flask):
    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Route by the path alone, as werkzeug would reject a Host that is not a valid name."""
        if request is None:
            return None
        return self.url_map.bind("", default_method=request.method, path_info=request.path)

    def log_exception(self, exc_info: Any) -> None:
        """Log an unexpected error without its text, which may have patient data."""
        error = exc_info[1]
        _log.error("request failed", error=type(error).__name__, place=where(error))


class _AnyPath(PathConverter):
    """Matches a line feed too, so that an id with one gets an error text, not 404."""

    regex = r"[^/][\s\S]*?"


class _NormalizedPath:
    def __init__(self, app: WsgiApp, public_url: str | None) -> None:
        self._app = app
        self._public_url = public_url

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        path: str = environ["PATH_INFO"]
        environ["PATH_INFO"] = routed_path(path, environ.get("RAW_URI", path), self._public_url)
        return self._app(environ, start_response)
