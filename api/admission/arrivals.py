"""What the kernel knows of a sender (Linux, tcp(7)): whether anything comes."""

import socket
import struct
from typing import NamedTuple

# `struct tcp_info`: tcpi_last_data_recv in milliseconds, and tcpi_bytes_received.
_LAST_DATA_RECEIVED = struct.Struct("=52xI")
_BYTES_RECEIVED = struct.Struct("=128xQ")


class Arrivals(NamedTuple):
    """Of a connection: since when nothing came, and how much has come in all."""

    silent_seconds: float
    received_bytes: int


def arrivals(sock: socket.socket) -> Arrivals | None:
    """None where the system does not tell, or the connection is gone."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        (silent_milliseconds,) = _LAST_DATA_RECEIVED.unpack_from(info)
        (received_bytes,) = _BYTES_RECEIVED.unpack_from(info)
    except (AttributeError, OSError, struct.error):
        return None
    return Arrivals(silent_milliseconds / 1000, received_bytes)
