"""The address that a service listens on."""

import socket

from shared.config import Address
from shared.listen import bind


def test_the_address_for_all_of_ipv6_takes_ipv4_too() -> None:
    with bind(Address("::", 0), "STOWGATE_LISTEN") as listener:
        port = listener.getsockname()[1]

        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=30).close()
