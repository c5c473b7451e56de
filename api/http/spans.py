"""A span for each upload and each administrative act."""

import time
from contextlib import ExitStack
from http import HTTPStatus

from flask import Flask, Response, g, request

from api.http.client_address import address_of
from api.http.routes import ACTS, template
from shared.ids import is_ae_title
from shared.runtime.tracing import Attribute, Attributes, Kind, Tracer
from shared.trace_context import TRACEPARENT


def trace_requests(app: Flask, tracer: Tracer, *, with_senders: bool) -> None:
    """Begin a span before each such request, and end it after the response was made.

    It begins with the first byte of the request's head, so it has the wait for a slot too.
    `with_senders` adds the address of the sender, and the AE title in the URL. Install this before
    other hooks, so that their log lines have the id of the trace.
    """

    @app.before_request
    def begin() -> None:
        rule = request.url_rule
        if rule is None or request.endpoint not in ACTS or request.method == "OPTIONS":
            return
        route = template(rule.rule)
        attributes: Attributes = {
            Attribute.HTTP_REQUEST_METHOD: request.method,
            Attribute.HTTP_ROUTE: route,
            Attribute.URL_SCHEME: request.scheme,
            **(_sender() if with_senders else {}),
        }
        now = time.monotonic()
        g.span = ExitStack()
        g.span.enter_context(
            tracer.span(
                f"{request.method} {route}",
                Kind.SERVER,
                parent=request.headers.get(TRACEPARENT),
                began_at=time.time() - (now - request.environ.get("stowgate.head_at", now)),
                attributes=attributes,
            )
        )

    @app.after_request
    def end(response: Response) -> Response:
        if "span" in g:
            tracer.note({Attribute.HTTP_RESPONSE_STATUS_CODE: response.status_code, **_known_now()})
            if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                tracer.fail(str(response.status_code))
        return response

    @app.teardown_request
    def close(_: BaseException | None) -> None:
        span: ExitStack | None = g.pop("span", None)
        if span is not None:
            span.close()


def _sender() -> Attributes:
    found: dict[Attribute, str] = {}
    address = address_of(request.remote_addr)
    if address is not None:
        found[Attribute.CLIENT_ADDRESS] = str(address)
    aet = (request.view_args or {}).get("aet", "")
    if is_ae_title(aet):
        found[Attribute.AE_TITLE] = aet
    return found


def _known_now() -> Attributes:
    found: dict[Attribute, str] = {}
    if "correlation_id" in g:
        found[Attribute.CORRELATION_ID] = g.correlation_id
    payload_id = g.get("audited", {}).get("payload_id")
    if payload_id is not None:
        found[Attribute.PAYLOAD_ID] = payload_id
    return found
