"""The address that a service listens on."""

import errno
import socket

from shared.settings.loader import BadSetting
from shared.settings.parsers import Address


def bind(address: Address, variable: str) -> socket.socket:
    """A listening socket on the address, of which `::` stands for all of IPv4 too.

    Raises `BadSetting`, naming `variable`, where the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    both = address.host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "something listens there; stop that, or give another port, or 0 for a free one"
        else:
            # What socket adds to the system's words is Python's.
            why = (error.strerror or str(error)).partition(" (while ")[0]
        raise BadSetting(
            f"{variable} is '{address}', but must be an address that is free here: {why}"
        ) from error


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Where it really listens, which a port of 0 does not tell."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{Address(host, port)}"
