"""The address of a client, also when trusted proxies forwarded its request."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any

from shared.settings.parsers import Network


class TrustedProxies:
    """Replaces the address of a trusted proxy with the address of the client behind it."""

    def __init__(
        self, app: Callable[[dict[str, Any], Any], Iterable[bytes]], trusted: Sequence[Network]
    ) -> None:
        self._app = app
        self._trusted = trusted

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["REMOTE_ADDR"] = client_behind(
            environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", ""), self._trusted
        )
        return self._app(environ, start_response)


def client_behind(peer: str, forwarded_for: str, trusted: Sequence[Network]) -> str:
    """Return the first untrusted address, or the outermost, from the peer back to the client.

    Each proxy appends the address of its own peer. So entries before the first untrusted address
    may be forged, and are ignored.
    """
    client = peer
    for hop in reversed(forwarded_for.split(",")):
        address = _without_port(client)
        if address is None or not any(address in network for network in trusted):
            break
        previous = _without_port(hop)
        if previous is None:
            break
        client = str(previous)
    return client


# Each request asks several times.
@lru_cache(maxsize=256)
def address_of(text: str | None) -> IPv4Address | IPv6Address | None:
    """Parse an IP address, without the zone of an IPv6 address.

    Returns:
        The address, with an IPv4-mapped one (RFC 4291 2.5.5.2) as IPv4; None if it is not valid.
    """
    try:
        address = ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _without_port(text: str) -> IPv4Address | IPv6Address | None:
    """Some proxies append the port: 192.0.2.1:4711, [2001:db8::1]:4711."""
    return address_of(re.sub(r"^\[(.*)\](:\d+)?$|^([^:]*):\d+$", r"\1\3", text.strip()))


def sender_of(address: str | None) -> str:
    """Return the name under which a rate limit counts a client address.

    That is an IPv4 address, or the /64 network of an IPv6 address, as one host may use all
    addresses of it (RFC 4291 2.5.4); empty for an address that is not valid.
    """
    ip = address_of(address)
    if ip is None:
        return ""
    return str(ip) if ip.version == 4 else str(IPv6Network((ip, 64), strict=False))
