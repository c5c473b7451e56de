"""The address that a service listens on."""

import socket

from shared.config import Address, BadSetting


def bind(address: Address, variable: str) -> socket.socket:
    """The address `::` stands for those of IPv4 too.

    Raises `BadSetting`, naming `variable`, where the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    both = address.host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise BadSetting(
            f"{variable} is '{address}', but must be an address that is free here: "
            f"{error.strerror or error}"
        ) from error


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Where it really listens, which a port of 0 does not tell."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{Address(host, port)}"
