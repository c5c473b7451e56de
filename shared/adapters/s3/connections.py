"""HTTP connections to the object store whose deadlines apply to progress, not to total time.

A slow line may be healthy: a request that makes progress continues, and a stalled one is aborted.
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

# After this time without a byte in either direction, the store or the line counts as dead.
_SILENT_SECONDS = 8.0
# Interval of the checks whether the peer has acknowledged more of the sent bytes.
_TICK_SECONDS = 1.0

# A slow request is aborted after this time, plus the time of its bytes at the minimum rate. (While
# it joins many parts, an S3 store sends spaces.)
_TRICKLE_SECONDS = 60.0
_MIN_BYTES_PER_SECOND = 64 * 1024

# MinIO closes connections that idle for 30 s; firewalls silently drop them after a minute or more.
_MAX_IDLE_SECONDS = 25.0
# Keepalive probes hold an idle connection open in firewalls, and detect a dead one: after 10 s, and
# 3 times 5 s without an answer.
_SOCKET_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class NoProgress(HTTPError):
    """The request stalled or was too slow. It is not tried again."""


class _Progress:
    """The progress of a request."""

    def __init__(self) -> None:
        self._began = self.last = time.monotonic()
        self._bytes = 0
        self._unacknowledged_bytes = 0

    def made(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        self.last = time.monotonic()
        self._check()

    def waited(self, connection: socket.socket) -> None:
        """Raise `NoProgress` after too long without progress."""
        left = _unacknowledged_bytes(connection)
        if left != self._unacknowledged_bytes:
            self._unacknowledged_bytes = left
            self.last = time.monotonic()
        self._check()

    def _check(self) -> None:
        now = time.monotonic()
        if now - self.last >= _SILENT_SECONDS:
            raise NoProgress(f"no bytes in either direction for {now - self.last:.0f} s")
        if now - self._began > _TRICKLE_SECONDS + self._bytes / _MIN_BYTES_PER_SECOND:
            raise NoProgress(f"too slow: {self._bytes} bytes in {now - self._began:.0f} s")


def _unacknowledged_bytes(connection: socket.socket) -> int:
    """Return the bytes in the send buffer that the peer has not acknowledged (tcp(7), SIOCOUTQ)."""
    size: int = struct.unpack("i", ioctl(connection, TIOCOUTQ, bytes(4)))[0]
    return size


class _Received(io.RawIOBase):
    """The received bytes of a socket, which `file` keeps open."""

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
        """Return False to make the pool reconnect."""
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
    """A pool of connections that count progress. Its requests raise `NoProgress`.

    `tls` returns the TLS context of each new connection.
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
