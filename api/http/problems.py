"""Problem details (RFC 9457): the body of every error response that is not a DICOM dataset.

Views, and what they call, raise a `Problem`; `install` registers the handlers that render it.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar, NamedTuple

import orjson
import structlog
from flask import Flask, Response, g, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import HTTPException

from shared.errors import Permanent, StoreFull, Transient

_log = structlog.get_logger()

RETRY_AFTER_SECONDS = 5

_NO_ROUTE = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
_STORES_ONLY = (
    "Stowgate only stores (STOW-RS): POST instances to /dicomweb/studies. It does not support "
    "search (QIDO-RS) or retrieve (WADO-RS)"
)


class Problem(Exception):
    """A request that fails as a whole.

    Args:
        detail: The reason, which the response shows to the client.
        headers: Further headers of the response.
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    reason: ClassVar[str] = "malformed"
    """The label of the request in `stowgate_posts_refused_total` and in its log line."""
    may_retry: ClassVar[bool] = False
    retry_after_seconds: int = RETRY_AFTER_SECONDS

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(headers or {})


class BadRequest(Problem):
    """The request is malformed."""


class IncompleteBody(BadRequest):
    """The connection ended before the body, or its framing is broken."""

    reason = "incomplete"


class UnknownVae(BadRequest):
    """No Virtual Application Entity has the AE title in the URL."""

    reason = "unknown_vae"


class Unauthorized(Problem):
    """The credentials are missing or invalid; `headers` has the challenge (RFC 9110 11.6.1)."""

    status = HTTPStatus.UNAUTHORIZED
    reason = "unauthenticated"


class Forbidden(Problem):
    status = HTTPStatus.FORBIDDEN
    reason = "forbidden"


class NotFound(Problem):
    status = HTTPStatus.NOT_FOUND
    reason = "not_found"


class Conflict(Problem):
    status = HTTPStatus.CONFLICT
    reason = "conflict"


class Misdirected(Problem):
    """The request names a host that this service does not serve (RFC 9110 15.5.20)."""

    status = HTTPStatus.MISDIRECTED_REQUEST
    reason = "wrong_host"


class Unprocessable(Problem):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    reason = "idempotency_key"


class SenderTooSlow(Problem):
    status = HTTPStatus.REQUEST_TIMEOUT
    reason = "too_slow"


class TooLarge(Problem):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    reason = "too_large"


class UnsupportedMediaType(Problem):
    """Sends a response without a body; `detail` goes to the log only."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    reason = "media_type"


class Unavailable(Problem):
    """A service on which the response depends does not respond."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    reason = "unavailable"
    may_retry = True


class TooBusy(Problem):
    """A limit of concurrency is reached; raised before the body is read."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    reason = "busy"
    may_retry = True

    def __init__(self, detail: str, retry_after_seconds: int = RETRY_AFTER_SECONDS) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class RateLimited(TooBusy):
    """A limit of requests per minute is reached."""

    reason = "rate_limit"


class Refusal(NamedTuple):
    """Why a request was answered with an error."""

    reason: str
    detail: str | None


def problem_response(status: int, detail: str) -> Response:
    """Render problem details, with the correlation id of the request if it has one."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": int(status),
        "detail": detail,
    }
    if "correlation_id" in g:
        body["correlation_id"] = g.correlation_id
    return Response(orjson.dumps(body), status, content_type="application/problem+json")


def bare(status: HTTPStatus) -> Response:
    """Return a response without a body, and so without a Content-Type."""
    response = Response(status=status)
    del response.headers["Content-Type"]
    return response


def _render(problem: Problem) -> Response:
    _note(problem.reason, problem.detail)
    if isinstance(problem, UnsupportedMediaType):
        response = bare(problem.status)
    else:
        response = problem_response(problem.status, problem.detail)
    response.headers.update(problem.headers)
    if problem.may_retry:
        response.headers["Retry-After"] = str(problem.retry_after_seconds)
    return response


def _render_store_full(error: StoreFull) -> Response:
    _note("full")
    _log.error("object store full", error=str(error))
    return problem_response(
        HTTPStatus.INSUFFICIENT_STORAGE,
        f"{_unacknowledged()}{error}; send again when there is room",
    )


def _render_transient(error: Transient) -> Response:
    _note("unavailable")
    _log.error("backend unavailable", error=str(error))
    response = problem_response(
        HTTPStatus.SERVICE_UNAVAILABLE, f"{_unacknowledged()}{error}; send again later"
    )
    response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return response


def _render_permanent(error: Permanent) -> Response:
    _note("backend")
    _log.error("backend failed permanently", error=str(error))
    return problem_response(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        f"{_unacknowledged()}{error}; contact the operator of this service",
    )


def _render_malformed_framing(_: ParseException) -> Response:
    # The exception's text repeats what the client sent.
    detail = "the request body is truncated, or a chunk is malformed"
    _note("incomplete", detail)
    return problem_response(HTTPStatus.BAD_REQUEST, detail)


def _render_http_exception(error: HTTPException) -> Response:
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _note("internal")
        return problem_response(
            status, f"{_unacknowledged()}internal server error; see the log of this service"
        )
    allow = dict(error.get_headers()).get("Allow")
    detail = error.description or ""
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"the allowed methods are {allow}"
    elif status == HTTPStatus.NOT_FOUND:
        detail = "the path does not exist; GET /openapi.json lists all paths"
    if request.path.startswith("/dicomweb") and status in _NO_ROUTE:
        detail = f"{_STORES_ONLY}; {detail}"
    response = problem_response(status, detail)
    if allow:
        response.headers["Allow"] = allow
    return response


def _note(reason: str, detail: str | None = None) -> None:
    """Keep the reason for the metrics and the log line of the request. What has a line of its own
    needs no `detail` there."""
    g.refusal = Refusal(reason, detail)


def _unacknowledged() -> str:
    """A sender has to know this first; other clients sent no instances."""
    return "nothing was acknowledged: " if request.path.startswith("/dicomweb") else ""


def install(app: Flask) -> None:
    """Register the handlers that turn errors into problem details."""
    app.register_error_handler(Problem, _render)
    app.register_error_handler(StoreFull, _render_store_full)
    app.register_error_handler(Transient, _render_transient)
    app.register_error_handler(Permanent, _render_permanent)
    app.register_error_handler(ParseException, _render_malformed_framing)
    app.register_error_handler(HTTPException, _render_http_exception)
