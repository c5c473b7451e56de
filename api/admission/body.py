"""The body of one request, with its limits of size and time."""

import socket
import time
from typing import NamedTuple, Protocol

from flask import Request
from gunicorn.http.errors import ParseException

from api.admission.arrivals import arrivals
from api.admission.watchdog import Receiving, Watchdog
from api.http.problems import IncompleteBody, SenderTooSlow, TooLarge

# A slower sender counts as stalled: it would need two minutes for an instance of half a megabyte.
_MIN_BYTES_PER_SECOND = 4096


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _PendingRead(NamedTuple):
    """A read that is under way, and the state of the connection when it began."""

    since: float
    received_bytes: int


class RequestBody:
    """Reads a request body, and ends the upload of a sender that is too slow.

    Args:
        stream: The body as the server provides it.
        content_length: In bytes; None for a chunked body (RFC 9112 7.1).
        limit_bytes: The maximum size of the body.
        sock: The connection; None where the server does not provide it.
        idle_seconds: The maximum time without data. A complete `read` may take four times as long.
        end: The deadline for the complete body, by the monotonic clock.
        watchdog: Enforces the deadlines.

    Raises:
        BadRequest: The body is truncated, or a chunk is malformed.
        TooLarge: The body exceeds the limit.
        SenderTooSlow: The sender missed a deadline.
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
        self._read_seconds = 4 * idle_seconds
        self._end = end
        self._watchdog = watchdog
        self._ended = False
        self._cut = False
        self.received_bytes = 0
        self._pending: _PendingRead | None = None
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
        """Return the body of `request`. Its time begins when the head is complete."""
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
    def is_complete(self) -> bool:
        """Whether the complete body was read."""
        return self._ended or self.received_bytes == self._content_length

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes; b"" at the end of a complete body."""
        if max(self._content_length or 0, self.received_bytes) > self._limit_bytes:
            raise TooLarge(f"the request body exceeds the limit of {self._limit_bytes} bytes")
        # One byte more than the limit, so that a chunked body fails as soon as it exceeds it.
        return self._receive(min(size, self._limit_bytes + 1 - self.received_bytes))

    def _receive(self, size: int) -> bytes:
        if self._content_length is not None:
            size = min(size, self._content_length - self.received_bytes)
        if size == 0:
            return b""
        now = time.monotonic()
        state = arrivals(self._sock) if self._sock is not None else None
        self._pending = _PendingRead(now, state.received_bytes) if state else None
        self._watchdog.watch(self, min(self._end, now + self._read_seconds))
        try:
            data = self._stream.read(size)
        except TimeoutError as error:
            raise self._too_slow(size) from error
        except (ParseException, OSError) as error:
            if self._cut:
                raise self._too_slow(size) from error
            raise IncompleteBody(
                f"the request body is truncated, or a chunk is malformed, {self._place(size)}; "
                "send it again"
            ) from error
        finally:
            self._watchdog.stop(self)
            self._pending = None
        if self._cut:
            raise self._too_slow(size)
        if not data and self._content_length is not None:
            raise IncompleteBody(
                f"the request body is truncated: {self.received_bytes} of {self._content_length} "
                "bytes arrived before the connection ended; send it again"
            )
        self._ended = not data
        self.received_bytes += len(data)
        return data

    def _too_slow(self, size: int) -> SenderTooSlow:
        return SenderTooSlow(f"the request body timed out {self._place(size)}; send it again")

    def _place(self, size: int) -> str:
        """A failed read does not report how many bytes it received."""
        return f"between bytes {self.received_bytes} and {self.received_bytes + size}"

    def stalled_seconds(self) -> float:
        """Return how long the current read has received nothing, or hardly anything.

        0 where that is unknown. Other threads may call this.
        """
        pending = self._pending
        state = arrivals(self._sock) if self._sock is not None else None
        if pending is None or state is None:
            return 0.0
        waited = time.monotonic() - pending.since
        if state.received_bytes - pending.received_bytes < waited * _MIN_BYTES_PER_SECOND:
            return waited
        return min(waited, state.silent_seconds)

    def cut(self) -> None:
        """Abort the current read. Other threads may call this."""
        if self._receiving is not None:
            self._cut = True
            self._receiving.cut()
