"""The address that a service listens on."""

import errno
import socket

from shared.settings.loader import BadSetting
from shared.settings.parsers import Address


def bind(address: Address, variable: str) -> socket.socket:
    """Return a listening socket; `::` includes IPv4.

    Raises `BadSetting`, which names `variable`, if the address is not available.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    both = address.host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "it is in use; stop the other process, or set another port, or 0 for a free one"
        else:
            # Python's socket module adds to the system's message.
            why = (error.strerror or str(error)).partition(" (while ")[0]
        raise BadSetting(
            f"{variable} is '{address}', but must be a free address of this machine: {why}"
        ) from error


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return the URL of the socket's actual address, also after a bind to port 0."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{Address(host, port)}"
