"""The body of a request, as gunicorn passes it to the application.

Each class has `read(size)`, which returns `size` bytes, or fewer at the end; `unread`, true while
more is to come; and `failed`, after which the connection cannot carry another request.
"""

import socket
from typing import Any

from gunicorn.http.body import LengthReader


class LengthBody:
    """A body of known length. gunicorn's own class copies all data twice more."""

    def __init__(self, reader: LengthReader) -> None:
        self._unreader = reader.unreader
        self._missing_bytes = reader.length
        self.failed = False

    @property
    def unread(self) -> bool:
        return bool(self._missing_bytes)

    def read(self, size: int) -> bytes:
        """Read `size` bytes; fewer at the end of the body or of the connection."""
        pieces: list[bytes] = []
        missing_bytes = size = min(size, self._missing_bytes)
        try:
            while missing_bytes and (piece := self._receive(missing_bytes)):
                pieces.append(piece)
                missing_bytes -= len(piece)
        except BaseException:
            self.failed = True
            raise
        self._missing_bytes -= size - missing_bytes
        # The connection ended or was cut, so that later data on it is not a request.
        self.failed = missing_bytes > 0
        return b"".join(pieces)

    def _receive(self, size: int) -> bytes:
        data: bytes = self._unreader.take_buffered() or self._unreader.sock.recv(size)
        if len(data) > size:
            self._unreader.unread(data[size:])
        return data[:size]


class ChunkedBody:
    """A chunked body (RFC 9112 7.1).

    Its trailers have the size limit of the head; gunicorn's own limit is a hundred times larger.
    """

    def __init__(self, body: Any, head_bytes: int) -> None:
        body.reader.limit_trailer_section = head_bytes
        self._body = body
        self.unread = True

    def read(self, size: int) -> bytes:
        data = bytes(self._body.read(size))
        self.unread = len(data) == size
        return data

    @property
    def failed(self) -> bool:
        return bool(self._body.failed)


class ExpectedBody:
    """A body that the client sends after 100 Continue (RFC 9110 10.1.1).

    The first read sends 100 Continue, so the client never sends a body whose head is rejected.
    """

    def __init__(self, body: LengthBody | ChunkedBody, sock: socket.socket) -> None:
        self._body = body
        self._sock = sock
        self._continued = False

    @property
    def unread(self) -> bool:
        return self._body.unread

    @property
    def failed(self) -> bool:
        return self._body.failed

    def read(self, size: int) -> bytes:
        if not self._continued:
            self._continued = True
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._body.read(size)
