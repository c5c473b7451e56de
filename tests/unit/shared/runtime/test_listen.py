"""The address that a service listens on."""

import socket

import pytest

from shared.runtime.listen import bind
from shared.settings.parsers import Address


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
def test_the_ipv6_wildcard_address_includes_ipv4() -> None:
    with bind(Address("::", 0), "STOWGATE_LISTEN") as listener:
        port = listener.getsockname()[1]

        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=30).close()
