"""The body of a request as gunicorn hands it to the application.

Each has `read(size)`, which returns `size` bytes and fewer at its end; `unread`, whether some of it
is still to come; and `failed`, after which the next request on the connection cannot be found.
"""

import socket
from typing import Any

from gunicorn.http.body import LengthReader


class LengthBody:
    """A body of known length. gunicorn's own copies all of it twice more on its way.

    Once reading `failed`, nobody knows where the next request on the connection begins.
    """

    def __init__(self, reader: LengthReader) -> None:
        self._unreader = reader.unreader
        self._missing_bytes = reader.length
        self.failed = False

    @property
    def unread(self) -> bool:
        return bool(self._missing_bytes)

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end of the body and where the connection ended before it."""
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
        # The connection ended, or was ended, and what still comes on it is no request.
        self.failed = missing_bytes > 0
        return b"".join(pieces)

    def _receive(self, size: int) -> bytes:
        data: bytes = self._unreader.take_buffered() or self._unreader.sock.recv(size)
        if len(data) > size:
            self._unreader.unread(data[size:])
        return data[:size]


class ChunkedBody:
    """A body that tells its end itself (RFC 9112 7.1), as gunicorn reads it.

    Its trailers are held to the limit of a head: gunicorn's own would let them grow to a hundred
    times that.
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
    """A body that is sent once the sender was told to go on (RFC 9110 10.1.1).

    It is told when the body is read, so one that is refused on its head alone never comes.
    """

    def __init__(self, body: LengthBody | ChunkedBody, sock: socket.socket) -> None:
        self._body = body
        self._sock = sock
        self._asked_for = False

    @property
    def unread(self) -> bool:
        return self._body.unread

    @property
    def failed(self) -> bool:
        return self._body.failed

    def read(self, size: int) -> bytes:
        if not self._asked_for:
            self._asked_for = True
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._body.read(size)
