"""HTTP connections to the object store whose deadlines count progress, and not total time.

A line may be slow and healthy: a request that goes on is waited for, one that stands still is not.
"""

import io
import socket
import ssl
import struct
import time
from collections.abc import Callable
from fcntl import ioctl
from http.client import HTTPResponse
from termios import TIOCOUTQ
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

CONNECT_SECONDS = 4.0

# No byte goes or comes for this long: the store, or the line to it, is taken for dead.
_SILENT_SECONDS = 8.0
# As often as is looked whether the far end has taken more of what this system still has to send.
_TICK_SECONDS = 1.0

# However slowly bytes go or come, a request ends: so long after its first byte, and the time that
# all its bytes take at this rate. An S3 store that joins many parts sends spaces meanwhile.
_TRICKLE_SECONDS = 60.0
_MIN_BYTES_PER_SECOND = 64 * 1024

# MinIO closes what idles for 30 s, and firewalls forget it after a minute or more, without a word.
_MAX_IDLE_SECONDS = 25.0
# A firewall sees that a connection lives, and the system drops one of which the far end knows
# nothing any more, while it idles: after 10 s, and 3 times 5 s without an answer.
_SOCKET_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class NoProgress(HTTPError):
    """The request stands still, or goes on so slowly that it would not end. Not tried again."""


class _Progress:
    """How far the request has come."""

    def __init__(self) -> None:
        self._began = self.last = time.monotonic()
        self._bytes = 0
        self._unacknowledged_bytes = 0

    def made(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        self.last = time.monotonic()
        self._check()

    def waited(self, connection: socket.socket) -> None:
        """Raises `NoProgress` where nothing has gone on for too long."""
        left = _unacknowledged_bytes(connection)
        if left != self._unacknowledged_bytes:
            self._unacknowledged_bytes = left
            self.last = time.monotonic()
        self._check()

    def _check(self) -> None:
        now = time.monotonic()
        if now - self.last >= _SILENT_SECONDS:
            raise NoProgress(f"nothing went or came for {now - self.last:.0f} s")
        if now - self._began > _TRICKLE_SECONDS + self._bytes / _MIN_BYTES_PER_SECOND:
            raise NoProgress(
                f"too slow: {self._bytes} bytes went and came in {now - self._began:.0f} s"
            )


def _unacknowledged_bytes(connection: socket.socket) -> int:
    """What the system has taken to send and the far end has not confirmed (tcp(7), SIOCOUTQ)."""
    size: int = struct.unpack("i", ioctl(connection, TIOCOUTQ, bytes(4)))[0]
    return size


class _Received(io.RawIOBase):
    """What comes on a socket. The file that it had keeps it open meanwhile."""

    def __init__(self, connection: socket.socket, file: io.RawIOBase, progress: _Progress) -> None:
        super().__init__()
        self._connection = connection
        self._file = file
        self._progress = progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                size_bytes = self._connection.recv_into(buffer)
            except TimeoutError:
                self._progress.waited(self._connection)
            else:
                self._progress.made(size_bytes)
                return size_bytes

    def close(self) -> None:
        self._file.close()
        super().close()


class _HttpConnection(HTTPConnection):
    _progress = _Progress()

    @property
    def is_connected(self) -> bool:
        """False has the pool make the connection anew."""
        idle_seconds = time.monotonic() - self._progress.last
        return idle_seconds < _MAX_IDLE_SECONDS and super().is_connected

    def connect(self) -> None:
        super().connect()
        self._progress = _Progress()

    def request(self, *given: Any, **named: Any) -> None:
        self._progress = _Progress()
        super().request(*given, **named)

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        connection: socket.socket = self.sock
        rest = memoryview(data)
        while rest:
            try:
                sent_bytes = connection.send(rest)
            except TimeoutError:
                self._progress.waited(connection)
            else:
                self._progress.made(sent_bytes)
                rest = rest[sent_bytes:]

    def response_class(self, connection: socket.socket, *given: Any, **named: Any) -> HTTPResponse:  # type: ignore[override]  # called as the class would be
        response = HTTPResponse(connection, *given, **named)
        received = _Received(connection, response.fp.detach(), self._progress)
        response.fp = io.BufferedReader(received)
        return response


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class ProgressPool(urllib3.PoolManager):
    """A pool of connections that count progress, whose TLS is that of `tls` when they are made.

    Raises `NoProgress`.
    """

    def __init__(
        self, tls: Callable[[], ssl.SSLContext] = ssl.create_default_context, **named: Any
    ) -> None:
        class HttpsConnection(_HttpConnection, HTTPSConnection):
            def connect(self) -> None:
                self.ssl_context = tls()
                super().connect()

        class HttpsPool(urllib3.HTTPSConnectionPool):
            ConnectionCls = HttpsConnection

        super().__init__(
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=_TICK_SECONDS),
            socket_options=_SOCKET_OPTIONS,
            **named,
        )
        self.pool_classes_by_scheme = {"http": _HttpPool, "https": HttpsPool}
