"""Cross-Origin Resource Sharing (Fetch 3.2): lets pages of listed origins call the API.

Not by Flask-CORS: it takes the origin `http://[::1]:3000` for a regular expression and lets others
in, leaves `Vary` out of what other origins get, and has preflights asked who they are, which they
cannot say.
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
    """Around the whole application, so that a page can read every refusal too.

    A preflight is answered whatever its path: where there is nothing, the page gets to read the
    404. Cookies and the browser's own passwords stay out, as `Access-Control-Allow-Credentials` is
    never sent; a page gives its `Authorization` itself. It may send `headers` beside those that the
    API reads.
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
