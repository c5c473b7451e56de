"""Cross-Origin Resource Sharing (Fetch 3.2): lets pages of listed origins call the API.

Flask-CORS does not fit: it treats the origin `http://[::1]:3000` as a regular expression and so
allows others, omits `Vary` in responses to other origins, and lets authentication reject
preflights, which carry no credentials.
"""

from collections.abc import Collection, Iterable
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_VARY = ("Vary", "Origin")

_HEADERS = ("Accept", "Authorization", "Content-Type", "Idempotency-Key", "X-Correlation-ID")

_EXPOSED = (
    "Access-Control-Expose-Headers",
    "Accept-Encoding, Accept-Post, Allow, Idempotent-Replayed, Link, Location, Retry-After, "
    "WWW-Authenticate, "
    "X-Correlation-ID, X-Payload-ID",
)


class Cors:
    """Adds the CORS headers, and answers preflights.

    It wraps the application, so that a page can read every error response too. A preflight succeeds
    on every path, so that the page can read the 404 of the actual request. The browser never sends
    cookies or saved passwords, as `Access-Control-Allow-Credentials` is not set; a page sets
    `Authorization` itself.

    Args:
        origins: The allowed origins.
        headers: Request headers that a page may send in addition to those that the API reads.
    """

    def __init__(
        self, app: WSGIApplication, origins: Collection[str], headers: Collection[str] = ()
    ) -> None:
        self._app = app
        self._origins = origins
        self._preflight = [
            ("Access-Control-Allow-Methods", "DELETE, GET, POST, PUT"),
            ("Access-Control-Allow-Headers", ", ".join([*_HEADERS, *headers])),
            ("Access-Control-Max-Age", "600"),
        ]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        origin = environ.get("HTTP_ORIGIN", "")
        if origin not in self._origins:
            return self._app(environ, _adding(start_response, [_VARY]))
        allowed = [_VARY, ("Access-Control-Allow-Origin", origin)]
        is_preflight = (
            environ["REQUEST_METHOD"] == "OPTIONS"
            and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
        )
        if is_preflight:
            start_response("204 No Content", [*allowed, *self._preflight])
            return []
        return self._app(environ, _adding(start_response, [*allowed, _EXPOSED]))


def _adding(start_response: StartResponse, headers: list[tuple[str, str]]) -> StartResponse:
    def start(status: str, given: list[tuple[str, str]], exc_info: Any = None) -> Any:
        return start_response(status, [*given, *headers], exc_info)

    return start
