"""Who sent a request that proxies passed on."""

import re
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from api.http.client_address import address_of
from shared.settings.parsers import Network


class KnownProxies:
    """Puts the address of the sender in the place of that of the proxy that passed it on."""

    def __init__(
        self, app: Callable[[dict[str, Any], Any], Iterable[bytes]], known: Sequence[Network]
    ) -> None:
        self._app = app
        self._known = known

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["REMOTE_ADDR"] = sender_behind(
            environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", ""), self._known
        )
        return self._app(environ, start_response)


def sender_behind(peer: str, forwarded_for: str, known: Sequence[Network]) -> str:
    """Each proxy adds at the end whom it was asked by, so what the first that is not known claims
    of others, in front of that, is not believed."""
    sender = peer
    for hop in reversed(forwarded_for.split(",")):
        address = _address(sender)
        if address is None or not any(address in network for network in known):
            break
        further = _address(hop)
        if further is None:
            break
        sender = str(further)
    return sender


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Some proxies write the port as well: 192.0.2.1:4711, [2001:db8::1]:4711."""
    return address_of(re.sub(r"^\[(.*)\](:\d+)?$|^([^:]*):\d+$", r"\1\3", text.strip()))
