"""Receive statistics of a TCP connection, from the kernel (Linux, tcp(7))."""

import socket
import struct
from typing import NamedTuple

# `struct tcp_info`: tcpi_last_data_recv in milliseconds, and tcpi_bytes_received.
_LAST_DATA_RECEIVED = struct.Struct("=52xI")
_BYTES_RECEIVED = struct.Struct("=128xQ")


class Arrivals(NamedTuple):
    """The time since a connection last received data, and the bytes that it received in total."""

    silent_seconds: float
    received_bytes: int


def arrivals(sock: socket.socket) -> Arrivals | None:
    """Read the statistics; None where the system has none, or the connection is closed."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        (silent_milliseconds,) = _LAST_DATA_RECEIVED.unpack_from(info)
        (received_bytes,) = _BYTES_RECEIVED.unpack_from(info)
    except (AttributeError, OSError, struct.error):
        return None
    return Arrivals(silent_milliseconds / 1000, received_bytes)
