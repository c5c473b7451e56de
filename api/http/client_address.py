"""The address of a sender, as the server or a proxy tells it."""

from ipaddress import IPv4Address, IPv6Address, ip_address


def address_of(text: str | None) -> IPv4Address | IPv6Address | None:
    """None for what is none. An IPv6 address comes without its zone, and an IPv4 sender as one
    although a socket of both tells its address otherwise (RFC 4291 2.5.5.2)."""
    try:
        address = ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
