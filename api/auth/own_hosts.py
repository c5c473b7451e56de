"""Protection against DNS rebinding, without authentication.

Then the loopback address alone keeps others out. But a page in a browser on this machine can reach
it when the page's own host name resolves to 127.0.0.1. For the browser that is the same origin, so
CORS does not apply; but the request has that name in its Host.
"""

import re
from urllib.parse import urlsplit

from flask import Request

from api.http.client_address import address_of
from api.http.problems import Misdirected

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:@/?#]+)(?::[0-9]*)?")
_ABSOLUTE_FORM = re.compile(r"[a-zA-Z]+://([^/?#]*)")


class OwnHosts:
    """Accepts `localhost`, loopback addresses and the host of `public_url`, with any port."""

    def __init__(self, public_url: str | None) -> None:
        public_host = urlsplit(public_url or "").hostname
        self._names = {"localhost", _plain(public_host or "localhost")}

    def check(self, request: Request) -> None:
        """Check the host of a request. One without Host (HTTP/1.0) is not from a browser.

        Raises:
            Misdirected: The request names another host.
        """
        target = _ABSOLUTE_FORM.match(request.environ.get("RAW_URI", ""))
        named = [request.environ.get("HTTP_HOST"), target and target[1]]
        if not all(self._is_own(authority) for authority in named if authority is not None):
            raise Misdirected(
                "the host in the request is not accepted: STOWGATE_AUTH=none accepts only "
                "localhost, loopback addresses and the host of STOWGATE_PUBLIC_URL. Use one of "
                "these, set STOWGATE_AUTH, or, in a protected network, set "
                "STOWGATE_ALLOW_ANYONE=true"
            )

    def _is_own(self, authority: str) -> bool:
        """An authority is a host with an optional port (RFC 9110 7.2)."""
        found = _AUTHORITY.fullmatch(authority)
        if not found:
            return False
        host = _plain(found[1])
        address = address_of(host)
        return host in self._names or (address is not None and address.is_loopback)


def _plain(host: str) -> str:
    """A trailing dot does not change the host (RFC 1034 3.1)."""
    return host.lower().removesuffix(".").strip("[]")
