"""The hosts that requests may name where nobody is asked who they are.

There all that keeps strangers out is that they cannot reach a loopback address. A page in a browser
on this machine can: by the name of its own site, which then resolves to 127.0.0.1 (DNS rebinding).
For the browser that is the page's own origin, so no rule of CORS applies; but the request names the
site in its Host.
"""

import re
from urllib.parse import urlsplit

from flask import Request

from api.http.client_address import address_of
from api.http.problems import Misdirected

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:@/?#]+)(?::[0-9]*)?")
_ABSOLUTE_FORM = re.compile(r"[a-zA-Z]+://([^/?#]*)")


class OwnHosts:
    """`localhost`, the loopback addresses, and the host of `public_url`, with any port."""

    def __init__(self, public_url: str | None) -> None:
        public_host = urlsplit(public_url or "").hostname
        self._names = {"localhost", _plain(public_host or "localhost")}

    def check(self, request: Request) -> None:
        """Raises `Misdirected`. What has no Host, as HTTP/1.0 allows, comes from no browser."""
        target = _ABSOLUTE_FORM.match(request.environ.get("RAW_URI", ""))
        named = [request.environ.get("HTTP_HOST"), target and target[1]]
        if not all(self._is_own(authority) for authority in named if authority is not None):
            raise Misdirected(
                "the request names a host that is not this Stowgate's: with STOWGATE_AUTH=none, "
                "only localhost, loopback addresses and the host of STOWGATE_PUBLIC_URL are. Use "
                "one of these, set STOWGATE_AUTH, or set STOWGATE_ALLOW_ANYONE=true where "
                "something else keeps strangers out"
            )

    def _is_own(self, authority: str) -> bool:
        """RFC 9110 7.2: a host, and maybe a port."""
        found = _AUTHORITY.fullmatch(authority)
        if not found:
            return False
        host = _plain(found[1])
        address = address_of(host)
        return host in self._names or (address is not None and address.is_loopback)


def _plain(host: str) -> str:
    """A dot at the end makes it no other host (RFC 1034 3.1)."""
    return host.lower().removesuffix(".").strip("[]")
