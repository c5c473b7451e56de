"""The body of one request, as a stream that knows whether it is whole."""

import time
from contextlib import suppress
from typing import Protocol

from gunicorn.http.errors import ParseException

from api.problems import BadRequest, SenderTooSlow, TooLarge


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class RequestBody:
    """Reads at most `limit_bytes` of `stream`.

    `content_length` is None for a chunked body (RFC 9112 7.1), whose end the server tells.
    Raises `BadRequest` when the body ends early or its chunks are malformed, `TooLarge` beyond
    the limit, and `SenderTooSlow` when the socket's time-out strikes.
    """

    def __init__(self, stream: Readable, content_length: int | None, limit_bytes: int) -> None:
        self._stream = stream
        self._content_length = content_length
        self._limit_bytes = limit_bytes
        self._ended = False
        self.received_bytes = 0

    @property
    def chunked(self) -> bool:
        return self._content_length is None

    @property
    def is_through(self) -> bool:
        """Whether nothing of the body is still to come."""
        return self._ended or self.received_bytes == self._content_length

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end of a body that is whole."""
        if max(self._content_length or 0, self.received_bytes) > self._limit_bytes:
            raise TooLarge(f"the body is over the limit of {self._limit_bytes} bytes")
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        if self._content_length is not None:
            size = min(size, self._content_length - self.received_bytes)
        if size == 0:
            return b""
        try:
            data = self._stream.read(size)
        except TimeoutError as error:
            self._ended = True
            raise SenderTooSlow(
                f"no data for too long: {self.received_bytes} bytes arrived, then nothing; "
                "send it again"
            ) from error
        except (ParseException, OSError) as error:
            self._ended = True
            raise BadRequest(
                f"the body is truncated or its chunks are malformed after {self.received_bytes} "
                "bytes; send it again"
            ) from error
        self._ended = not data
        if self._ended and self._content_length is not None:
            raise BadRequest(
                f"the body is truncated: {self.received_bytes} of {self._content_length} bytes "
                "arrived before the connection ended; send it again"
            )
        self.received_bytes += len(data)
        return data

    def discard(self, most_bytes: int, most_seconds: float) -> None:
        """Read on and forget, so that a sender in the middle of sending gets to see the answer.

        A connection closed with unread data on it is reset, and the answer lost (RFC 9112 9.6).
        """
        deadline = time.monotonic() + most_seconds
        most_bytes += self.received_bytes
        with suppress(BadRequest, SenderTooSlow):
            while self.received_bytes < most_bytes and time.monotonic() < deadline:
                if not self._receive(1 << 16):
                    return
