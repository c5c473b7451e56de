"""Problem details (RFC 9457): every refusal that has a body and is no dataset says why in words.

`Problem` and its kin are raised anywhere below a view, with headers for the answer where it needs
them; `install` renders them.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar

import orjson
import structlog
from flask import Flask, Response, g, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import HTTPException

from shared.errors import Permanent, StoreFull, Transient

_log = structlog.get_logger()

RETRY_AFTER_SECONDS = 5

_WRONG_PLACE = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
_STORES_ONLY = (
    "Stowgate only stores (STOW-RS): POST instances to /dicomweb/studies. It has no search "
    "(QIDO-RS) and no retrieve (WADO-RS)"
)


class Problem(Exception):
    """A request that is refused as a whole. `detail` is shown to the sender."""

    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    may_retry: ClassVar[bool] = False
    retry_after_seconds: int = RETRY_AFTER_SECONDS

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(headers or {})


class BadRequest(Problem):
    """The request is malformed, or its body did not arrive whole."""


class Unauthorized(Problem):
    """`headers` has the challenge (RFC 9110 11.6.1)."""

    status = HTTPStatus.UNAUTHORIZED


class Forbidden(Problem):
    status = HTTPStatus.FORBIDDEN


class NoSuchThing(Problem):
    status = HTTPStatus.NOT_FOUND


class Conflict(Problem):
    status = HTTPStatus.CONFLICT


class Misdirected(Problem):
    """The request names a host that this service does not answer for (RFC 9110 15.5.20)."""

    status = HTTPStatus.MISDIRECTED_REQUEST


class Unprocessable(Problem):
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class SenderTooSlow(Problem):
    status = HTTPStatus.REQUEST_TIMEOUT


class TooLarge(Problem):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnsupportedMediaType(Problem):
    """Answered without a body; `detail` goes to the log only."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class Unavailable(Problem):
    """Something that this service needs for an answer does not answer."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    may_retry = True


class TooBusy(Problem):
    """As many requests as are taken; said before the body is read."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    may_retry = True

    def __init__(self, detail: str, retry_after_seconds: int = RETRY_AFTER_SECONDS) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


def problem_response(status: int, detail: str) -> Response:
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
    """An answer without a body, and so without a type of one."""
    response = Response(status=status)
    del response.headers["Content-Type"]
    return response


def _render(problem: Problem) -> Response:
    _log.info("request refused", status=int(problem.status), detail=problem.detail)
    if isinstance(problem, UnsupportedMediaType):
        response = bare(problem.status)
    else:
        response = problem_response(problem.status, problem.detail)
    response.headers.update(problem.headers)
    if problem.may_retry:
        response.headers["Retry-After"] = str(problem.retry_after_seconds)
    return response


def _render_store_full(error: StoreFull) -> Response:
    _log.error("object store full", error=str(error))
    return problem_response(
        HTTPStatus.INSUFFICIENT_STORAGE,
        f"{_unacknowledged()}{error}; send again when there is room",
    )


def _render_transient(error: Transient) -> Response:
    _log.error("engine unavailable", error=str(error))
    response = problem_response(
        HTTPStatus.SERVICE_UNAVAILABLE, f"{_unacknowledged()}{error}; send again later"
    )
    response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return response


def _render_permanent(error: Permanent) -> Response:
    _log.error("engine refused", error=str(error))
    return problem_response(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        f"{_unacknowledged()}{error}; this needs the operator of this service",
    )


def _render_malformed_framing(_: ParseException) -> Response:
    # Its text has what was sent in it.
    return problem_response(
        HTTPStatus.BAD_REQUEST, "the body is truncated, or its chunks are malformed"
    )


def _render_http_exception(error: HTTPException) -> Response:
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return problem_response(
            status, f"{_unacknowledged()}an error of this service, which its log describes"
        )
    allow = dict(error.get_headers()).get("Allow")
    detail = error.description or ""
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"what is allowed here is {allow}"
    elif status == HTTPStatus.NOT_FOUND:
        detail = "there is nothing at this path; GET /openapi.json lists what there is"
    if request.path.startswith("/dicomweb") and status in _WRONG_PLACE:
        detail = f"{_STORES_ONLY}; {detail}"
    response = problem_response(status, detail)
    if allow:
        response.headers["Allow"] = allow
    return response


def _unacknowledged() -> str:
    """What a sender has to know first; who only asks has sent nothing."""
    return "nothing was acknowledged: " if request.path.startswith("/dicomweb") else ""


def install(app: Flask) -> None:
    app.register_error_handler(Problem, _render)
    app.register_error_handler(StoreFull, _render_store_full)
    app.register_error_handler(Transient, _render_transient)
    app.register_error_handler(Permanent, _render_permanent)
    app.register_error_handler(ParseException, _render_malformed_framing)
    app.register_error_handler(HTTPException, _render_http_exception)
