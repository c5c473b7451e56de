"""The body of one request, as a stream that knows whether it is whole, and in time."""

import socket
import time
from typing import NamedTuple, Protocol

from flask import Request
from gunicorn.http.errors import ParseException

from api.admission.arrivals import arrivals
from api.admission.watchdog import Receiving, Watchdog
from api.http.problems import BadRequest, SenderTooSlow, TooLarge

# Less is next to nothing: an instance of half a megabyte would take two minutes.
_LEAST_BYTES_PER_SECOND = 4096


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Awaited(NamedTuple):
    """A piece that the sender was asked for: when, and how much had come by then."""

    since: float
    received_bytes: int


class RequestBody:
    """Reads at most `limit_bytes` of `stream`.

    `content_length` is None for a chunked body (RFC 9112 7.1), whose end the server tells.
    A sender that sends nothing for `idle_seconds`, less than a piece in four times that, or that is
    not through by `end`, by the monotonic clock, is cut off.

    Raises `BadRequest` when the body ends early or its chunks are malformed, `TooLarge` beyond
    the limit, and `SenderTooSlow`.
    """

    def __init__(
        self,
        stream: Readable,
        content_length: int | None,
        *,
        limit_bytes: int,
        sock: socket.socket | None,
        idle_seconds: float,
        end: float,
        watchdog: Watchdog,
    ) -> None:
        self._stream = stream
        self._content_length = content_length
        self._limit_bytes = limit_bytes
        self._sock = sock
        self._piece_seconds = 4 * idle_seconds
        self._end = end
        self._watchdog = watchdog
        self._ended = False
        self._cut = False
        self.received_bytes = 0
        self._awaited: _Awaited | None = None
        self._receiving: Receiving | None = None
        if sock is not None:
            self._receiving = Receiving(sock)
            sock.settimeout(idle_seconds)

    @classmethod
    def of(
        cls,
        request: Request,
        *,
        limit_bytes: int,
        idle_seconds: float,
        max_seconds: float,
        watchdog: Watchdog,
    ) -> "RequestBody":
        """The body of `request`, whose time begins when its head was complete."""
        chunked = "chunked" in request.headers.get("Transfer-Encoding", "").lower()
        return cls(
            request.environ["wsgi.input"],
            None if chunked else request.content_length or 0,
            limit_bytes=limit_bytes,
            sock=request.environ.get("gunicorn.socket"),
            idle_seconds=idle_seconds,
            end=request.environ.get("stowgate.head_at", time.monotonic()) + max_seconds,
            watchdog=watchdog,
        )

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
        # One more than may come, so that a body in chunks is refused as soon as it is too large.
        return self._receive(min(size, self._limit_bytes + 1 - self.received_bytes))

    def _receive(self, size: int) -> bytes:
        if self._content_length is not None:
            size = min(size, self._content_length - self.received_bytes)
        if size == 0:
            return b""
        now = time.monotonic()
        came = arrivals(self._sock) if self._sock is not None else None
        self._awaited = _Awaited(now, came.received_bytes) if came else None
        self._watchdog.watch(self, min(self._end, now + self._piece_seconds))
        try:
            data = self._stream.read(size)
        except TimeoutError as error:
            raise self._too_slow(size) from error
        except (ParseException, OSError) as error:
            if self._cut:
                raise self._too_slow(size) from error
            raise BadRequest(
                f"the body is truncated, or its chunks are malformed, {self._place(size)}; send it "
                "again"
            ) from error
        finally:
            self._watchdog.stop(self)
            self._awaited = None
        if self._cut:
            raise self._too_slow(size)
        if not data and self._content_length is not None:
            raise BadRequest(
                f"the body is truncated: {self.received_bytes} of {self._content_length} bytes "
                "arrived before the connection ended; send it again"
            )
        self._ended = not data
        self.received_bytes += len(data)
        return data

    def _too_slow(self, size: int) -> SenderTooSlow:
        return SenderTooSlow(f"the body came too slowly {self._place(size)}; send it again")

    def _place(self, size: int) -> str:
        """Of a piece that did not come whole it is not known how much did."""
        return f"between its bytes {self.received_bytes} and {self.received_bytes + size}"

    def stalled_seconds(self) -> float:
        """For how long nothing came of the piece that is awaited, or next to nothing; for another
        thread. 0 where that cannot be told."""
        awaited, came = self._awaited, arrivals(self._sock) if self._sock is not None else None
        if awaited is None or came is None:
            return 0.0
        waited = time.monotonic() - awaited.since
        if came.received_bytes - awaited.received_bytes < waited * _LEAST_BYTES_PER_SECOND:
            return waited
        return min(waited, came.silent_seconds)

    def cut(self) -> None:
        """End a read that is under way; for another thread."""
        if self._receiving is not None:
            self._cut = True
            self._receiving.cut()
