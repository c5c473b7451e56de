"""Creation of the Flask application from its parts."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import structlog
from flask import Flask, Request, Response
from flask.typing import ResponseReturnValue
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import MapAdapter, PathConverter

from api.auth import audit, guard
from api.auth.guard import Authenticator
from api.auth.own_hosts import OwnHosts
from api.http import problems
from api.http.client_address import TrustedProxies
from api.http.correlation import correlate
from api.http.cors import Cors
from api.http.openapi import openapi_document
from api.http.paths import routed_path
from api.http.routes import PAGE_ROUTES, ROUTES, SCOPES, Scope
from api.http.spans import trace_requests
from api.page.rendering import Pages
from api.settings import ApiSettings
from shared.runtime.logs import where
from shared.runtime.metrics import ApiMetrics
from shared.runtime.tracing import NO_SPANS, Tracer

_log = structlog.get_logger()

Environ = dict[str, Any]
WsgiApp = Callable[[Environ, Any], Iterable[bytes]]


def create_app(
    settings: ApiSettings,
    *,
    views: Mapping[str, Callable[..., ResponseReturnValue]],
    pages: Pages,
    authenticator: Authenticator,
    metrics: ApiMetrics,
    tracer: Tracer = NO_SPANS,
) -> Flask:
    """Create the application: routes, error handlers, authentication, audit and WSGI middleware.

    Args:
        views: The views of the endpoints in the tables of routes, except `openapi`.
        pages: Renders the errors of the operator's page.
    """
    app = _App(__name__, static_folder=None)
    app.url_map.converters["path"] = _AnyPath
    app.url_map.merge_slashes = False  # werkzeug would redirect
    problems.install(app)
    scopes = SCOPES if settings.metrics_open else {**SCOPES, "health.metrics": Scope.READ}
    document = openapi_document(settings.public_url, authenticator.scheme, scopes)
    views = {**views, "openapi": lambda: Response(document, content_type="application/json")}
    for route in (*ROUTES, *(PAGE_ROUTES if settings.page else ())):
        app.add_url_rule(
            route.path,
            endpoint=route.endpoint,
            view_func=views[route.endpoint],
            methods=[route.method],
            # The table has its own OPTIONS routes for these paths.
            provide_automatic_options=False if route.endpoint.startswith("stow.") else None,
        )
    trace_requests(app, tracer, with_senders=settings.trace_senders)
    correlate(app, metrics)
    own_hosts = OwnHosts(settings.public_url) if settings.is_for_this_machine else None
    origins = settings.cors_origins or ()
    guard.install(app, authenticator, scopes, origins, own_hosts, settings.own_origin)
    audit.install(app)
    if settings.page:
        pages.install(app)
    # mypy takes the attribute for the method that it is at first.
    setattr(app, "wsgi_app", _middleware(app.wsgi_app, settings, origins))  # noqa: B010
    return app


def _middleware(app: WsgiApp, settings: ApiSettings, origins: Collection[str]) -> WsgiApp:
    app = _NormalizedPath(app, settings.public_url)
    if origins:
        app = Cors(app, origins, settings.cors_headers or ())
    proxies = settings.trusted_proxies
    if not isinstance(proxies, int):
        return TrustedProxies(app, proxies)
    return ProxyFix(app, x_for=proxies, x_proto=0, x_host=0) if proxies else app


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
