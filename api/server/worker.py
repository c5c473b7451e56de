"""gunicorn's worker, hardened against slow and hostile clients."""

import errno
import select
import selectors
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any

import orjson
from gunicorn.http import errors, message
from gunicorn.http.body import LengthReader
from gunicorn.util import split_request_uri, unquote_to_wsgi_str
from gunicorn.workers.gthread import TConn, ThreadWorker

from api.admission.watchdog import Receiving
from api.http.paths import own_path
from api.routes import is_store
from api.server.bodies import ChunkedBody, ExpectedBody, LengthBody
from shared.runtime.logs import where

_HEAD_SECONDS = 5.0
_HANDSHAKE_SECONDS = 10.0

# For one read of data that has already arrived.
_READ_SECONDS = 1.0

# For a client to receive its response. The body of an upload has its own limits.
_SOCKET_SECONDS = 10.0

# After the last response, a client must keep sending at this rate, or the connection is closed.
_LINGER_BYTES = 64 << 10
_LINGER_SECONDS = 10.0

_PIECE_BYTES = 64 << 10

# Errors of accept(2): no file descriptor, or no memory for a connection.
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class _PlainHttp(errors.ParseException):  # type: ignore[misc]
    """A plain HTTP request to a port with TLS."""


_REFUSALS: tuple[tuple[type[Exception], HTTPStatus, str], ...] = (
    (errors.LimitRequestLine, HTTPStatus.REQUEST_URI_TOO_LONG, "the request line is too long"),
    (
        errors.LimitRequestHeaders,
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        "there are too many header fields, or they are too long",
    ),
    (
        errors.ExpectationFailed,
        HTTPStatus.EXPECTATION_FAILED,
        "the Expect header has a value other than 100-continue",
    ),
    (
        errors.UnsupportedTransferCoding,
        HTTPStatus.NOT_IMPLEMENTED,
        "the Transfer-Encoding is not supported",
    ),
    (errors.InvalidRequestMethod, HTTPStatus.BAD_REQUEST, "the request method is malformed"),
    (errors.InvalidHTTPVersion, HTTPStatus.BAD_REQUEST, "the HTTP version is not supported"),
    (errors.InvalidRequestLine, HTTPStatus.BAD_REQUEST, "the request line is malformed"),
    (errors.InvalidHeaderName, HTTPStatus.BAD_REQUEST, "a header field name is malformed"),
    (
        errors.InvalidHeader,
        HTTPStatus.BAD_REQUEST,
        "a header field is malformed or contradicts another",
    ),
    (errors.ObsoleteFolding, HTTPStatus.BAD_REQUEST, "a header field is folded over several lines"),
    (_PlainHttp, HTTPStatus.BAD_REQUEST, "this port uses HTTPS: use an https URL"),
    (errors.ParseException, HTTPStatus.BAD_REQUEST, "the request is not valid HTTP/1.1"),
)


def _is_writable(sock: socket.socket) -> bool:
    """Whether the send buffer has space, as the client has received earlier responses."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


def _send_close_notify(sock: ssl.SSLSocket) -> None:
    """Without close_notify a client may treat the response as truncated (RFC 8446 6.1)."""
    # `unwrap` raises an error, as it cannot wait for the client's close_notify.
    with suppress(OSError, ValueError):
        sock.unwrap()


def _has_decrypted(sock: socket.socket) -> bool:
    """Whether OpenSSL has decrypted data, which the poller does not report."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


class SlowClientWorker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's worker, in which a connection uses a thread only while its request is served.

    gunicorn's own worker assigns a thread at the first byte, even if the rest of the head never
    arrives, and its main loop blocks on clients that do not close. So a few connections can block
    all others. Here, connections wait in the poller of the main loop, which costs one file
    descriptor each: during the TLS handshake, until the head is complete, and after the last
    response until the client closes. An upload waits for a slot without a thread too, and no more
    of it is read then. All methods except `handle`, and what it calls, run on the main loop and
    never block.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The monotonic time until which each connection may stay in the poller.
        self._ends: dict[TConn, float] = {}
        # The connections with a thread.
        self._served: set[TConn] = set()
        # Uploads without a slot, in order of arrival, and the time until which each may wait.
        # The other half of the connections is for other requests.
        self._waiting: dict[TConn, float] = {}
        self._max_waiting = self.worker_connections // 2

    def run(self) -> None:
        try:
            super().run()
        finally:
            # The thread of an unfinished request would keep the process alive after the stop.
            for conn in list(self._served):
                Receiving(conn.sock, grace_seconds=0).cut()

    def init_signals(self) -> None:
        """Ignore the SIGHUP of a closing terminal: the parent stops this process gracefully."""
        super().init_signals()
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection; at the maximum, close the one that has waited longest."""
        has_room = True
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno not in _NO_RESOURCES:
                raise
            has_room = False
        if has_room and self.nr_conns < self.worker_connections:
            return
        # The connection accepted just now is the last of these.
        if len(self._ends) > has_room:
            self._close(next(iter(self._ends)))
        elif self.keepalived_conns:
            # `murder_keepalived` closes it in this round.
            self.keepalived_conns[0].timeout = 0.0

    def enqueue_req(self, conn: TConn) -> None:
        """Wait for the next head; gunicorn would assign a thread here."""
        conn.sock.setblocking(False)
        self._ends[conn] = time.monotonic() + self.cfg.keepalive
        if self.app.tls is not None and conn.parser is None:
            self._begin_tls(conn, self.app.tls.context())
        else:
            self._await_head(conn)

    def _begin_tls(self, conn: TConn, tls: ssl.SSLContext) -> None:
        self._ends[conn] = time.monotonic() + _HANDSHAKE_SECONDS
        try:
            conn.sock = tls.wrap_socket(conn.sock, server_side=True, do_handshake_on_connect=False)
        except OSError:
            # The client has already disconnected.
            self._close(conn)
            return
        self.poller.register(
            conn.sock, selectors.EVENT_READ, lambda _: self._continue_handshake(conn)
        )

    def _continue_handshake(self, conn: TConn) -> None:
        if conn not in self._ends:
            return
        awaited = selectors.EVENT_READ
        try:
            conn.sock.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            awaited = selectors.EVENT_WRITE
        except OSError as error:
            self._refuse_handshake(conn, error)
            return
        else:
            self.poller.unregister(conn.sock)
            self._ends[conn] = time.monotonic() + self.cfg.keepalive
            self._await_head(conn)
            return
        self.poller.modify(conn.sock, awaited, lambda _: self._continue_handshake(conn))

    def _refuse_handshake(self, conn: TConn, error: OSError) -> None:
        reason = error.reason if isinstance(error, ssl.SSLError) else None
        if reason == "HTTP_REQUEST":
            self.poller.unregister(conn.sock)
            # Respond without TLS, which the client does not use.
            conn.sock = socket.socket(fileno=conn.sock.detach())
            self.handle_error(None, conn.sock, conn.client, _PlainHttp())
            self._linger(conn)
            return
        if reason is not None and not isinstance(error, ssl.SSLEOFError):
            # The reason is one of OpenSSL's names, and has no data of the client.
            self.log.warning("TLS handshake with %s failed: %s", conn.client[0], reason)
        self._close(conn)

    def _await_head(self, conn: TConn) -> None:
        """Serve the next request when its head is complete.

        The head has often arrived already: on the connection, in the parser's buffer (pipelining),
        or decrypted with the previous request.
        """
        conn.init()
        conn.sock.setblocking(False)
        if conn.parser.unreader.buf.getvalue():
            self._ends[conn] = time.monotonic() + _HEAD_SECONDS
        if self._is_complete(conn):
            self._serve(conn)
            return
        self.poller.register(conn.sock, selectors.EVENT_READ, lambda _: self._receive_head(conn))
        self._receive_head(conn)

    def _receive_head(self, conn: TConn) -> None:
        try:
            with self._bounded(conn.sock):
                # More than a TLS record, so that no decrypted data is left, which no poller sees.
                data = conn.sock.recv(_PIECE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:
            data = b""
        if not data:
            self._close(conn)
            return
        unreader = conn.parser.unreader
        before = unreader.take_buffered()
        if not before:
            self._ends[conn] = time.monotonic() + _HEAD_SECONDS
        unreader.unread(before + data)
        if self._is_complete(conn):
            self.poller.unregister(conn.sock)
            self._serve(conn)

    @contextmanager
    def _bounded(self, sock: socket.socket) -> Iterator[None]:
        """End a non-blocking read that does not return, which OpenSSL may cause."""
        receiving = Receiving(sock, grace_seconds=0)
        watchdog = self.app.admission.watchdog
        watchdog.watch(receiving, time.monotonic() + _READ_SECONDS)
        try:
            yield
        finally:
            watchdog.stop(receiving)

    def _is_complete(self, conn: TConn) -> bool:
        """Whether the head is complete, or exceeds a limit, so that a response is possible."""
        head = conn.parser.unreader.buf.getvalue()
        return b"\r\n\r\n" in head or b"\n\n" in head or self._excess(head) is not None

    def _excess(self, received: bytes) -> errors.ParseException | None:
        """Return the error of a head that exceeds a limit, as early as possible.

        gunicorn's own limits would allow 800 kB for each connection.
        """
        settings = self.app.settings
        line_bytes, head_bytes = settings.max_request_line_bytes, settings.max_head_bytes
        if b"\n" not in received[: line_bytes + 2] and len(received) > line_bytes + 1:
            return errors.LimitRequestLine(len(received), line_bytes)
        if b"\r\n\r\n" not in received[: head_bytes + 4] and len(received) > head_bytes + 3:
            return errors.LimitRequestHeaders("too long")
        return None

    def _serve(self, conn: TConn) -> None:
        if not _is_writable(conn.sock):
            # The client sends requests but does not receive the responses.
            self._close(conn)
            return
        del self._ends[conn]
        conn.head_at = time.monotonic()
        if self._is_upload(conn) and len(self._waiting) < self._max_waiting:
            self._waiting[conn] = conn.head_at + self.app.settings.upload_wait_seconds
            self._begin_uploads()
        else:
            super().enqueue_req(conn)

    def _is_upload(self, conn: TConn) -> bool:
        """Check the request line. A malformed one is not an upload, and gets an error later."""
        head: bytes = conn.parser.unreader.buf.getvalue()[
            : self.app.settings.max_request_line_bytes
        ]
        method, _, rest = head.decode("latin-1").partition(" ")
        try:
            path = split_request_uri(rest.partition(" ")[0]).path
        except ValueError:
            return False
        prefix = self.app.settings.path_prefix
        return is_store(method, own_path(unquote_to_wsgi_str(path), prefix))

    def _begin_uploads(self) -> None:
        """Serve waiting uploads that get a slot, and those that have waited too long.

        The application rejects an upload without a slot.
        """
        limiter, now = self.app.admission.limiter, time.monotonic()
        for conn, end in list(self._waiting.items()):
            if not limiter.acquire(conn.sock) and end > now:
                break
            del self._waiting[conn]
            super().enqueue_req(conn)
        limiter.waiting(len(self._waiting))

    def handle(self, conn: TConn) -> bool:
        """Reject a head that is too long, which gunicorn would continue to read."""
        self._served.add(conn)
        try:
            excess = self._excess(conn.parser.unreader.buf.getvalue())
            if excess is not None:
                conn.sock.settimeout(_SOCKET_SECONDS)
                self.handle_error(None, conn.sock, conn.client, excess)
                return False
            return bool(super().handle(conn))
        finally:
            self._served.discard(conn)

    def handle_request(self, req: message.Request, conn: TConn) -> bool:
        """Limit the time for the response, and replace gunicorn's body.

        The application limits the time for the body. That time begins when the head is complete,
        not when a thread is free, so that senders that stall together are cut together.
        """
        conn.sock.settimeout(_SOCKET_SECONDS)
        if self.app.tls is not None:
            req.scheme = "https"
        if isinstance(req.body.reader, LengthReader):
            req.body = LengthBody(req.body.reader)
        else:
            req.body = ChunkedBody(req.body, self.app.settings.max_head_bytes)
        if req._expected_100_continue:
            req._expected_100_continue = False
            req.body = ExpectedBody(req.body, conn.sock)
        req.body.head_at = conn.head_at
        try:
            return bool(super().handle_request(req, conn))
        except (TimeoutError, ssl.SSLError):
            # The client did not receive its response, or its encryption is broken. gunicorn would
            # log this as a server error.
            return False

    def _keepalive_after(self, conn: TConn, keepalive: bool) -> bool:
        """Skip an unread body for 0.1 s; gunicorn would wait 5 s."""
        try:
            with self._bounded(conn.sock):
                return keepalive and conn.parser.finish_body(deadline=time.monotonic() + 0.1)
        except (errors.ParseException, ssl.SSLError):
            # The response was sent; gunicorn would send an error after it.
            return False

    def handle_error(
        self,
        req: message.Request | None,  # noqa: ARG002
        client: socket.socket,
        addr: Any,  # noqa: ARG002
        exc: Exception,
    ) -> None:
        """Respond with a fixed text: gunicorn's texts repeat the client's data, also in the log."""
        for kind, kind_status, words in _REFUSALS:
            # A malformed header in the response is a server error.
            server_errors = (errors.InvalidResponseHeader, errors.InvalidResponseHeaderName)
            if isinstance(exc, kind) and not isinstance(exc, server_errors):
                status, detail = kind_status, words
                self.log.warning("request refused with %d: %s", status, detail)
                break
        else:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            detail = "internal server error; see the log of this service"
            self.log.error("request failed: %s at %s", type(exc).__name__, where(exc))
        body = orjson.dumps(
            {
                "type": "about:blank",
                "title": status.phrase,
                "status": int(status),
                "detail": detail,
            }
        )
        head = (
            f"HTTP/1.1 {status:d} {status.phrase}\r\n"
            "Connection: close\r\n"
            "Content-Type: application/problem+json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with suppress(OSError):
            client.sendall(head.encode() + body)

    def finish_request(self, conn: TConn, fs: "Future[bool]") -> None:
        self.app.admission.limiter.release(conn.sock)
        if fs.cancelled() or fs.exception() or not fs.result():
            self._linger(conn)
        elif _has_decrypted(conn.sock):
            self.enqueue_req(conn)
        else:
            super().finish_request(conn, fs)
        self._begin_uploads()

    def _linger(self, conn: TConn) -> None:
        """Discard further data, so that a client that is still sending can read its response.

        Closing a connection with unread data resets it, and the response is lost (RFC 9112 9.6).
        Some clients, such as Java's `HttpURLConnection`, read the response only when they have sent
        everything. So the connection stays open as long as an upload may take, while the client
        keeps sending; if it pauses or trickles, the connection is closed.
        """
        conn.linger_end = time.monotonic() + self.app.settings.max_upload_seconds
        self._extend_linger(conn)
        try:
            conn.sock.setblocking(False)
            if isinstance(conn.sock, ssl.SSLSocket):
                with self._bounded(conn.sock):
                    _send_close_notify(conn.sock)
            # Further data is discarded without decryption.
            conn.sock.shutdown(socket.SHUT_WR)
            self.poller.register(conn.sock, selectors.EVENT_READ, lambda _: self._discard(conn))
        except (OSError, ValueError):
            self._close(conn)

    def _discard(self, conn: TConn) -> None:
        try:
            received = len(conn.sock.recv(_PIECE_BYTES))
        except BlockingIOError:
            return
        except OSError:
            received = 0
        conn.linger_bytes -= received
        if not received:
            self._close(conn)
        elif conn.linger_bytes <= 0:
            self._extend_linger(conn)

    def _extend_linger(self, conn: TConn) -> None:
        conn.linger_bytes = _LINGER_BYTES
        self._ends[conn] = min(time.monotonic() + _LINGER_SECONDS, conn.linger_end)

    def _close(self, conn: TConn) -> None:
        """Close a connection in the poller, which may still have an event for it."""
        if self._ends.pop(conn, None) is None:
            return
        with suppress(OSError, KeyError, ValueError):
            self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """gunicorn calls this at least once a second."""
        now = time.monotonic()
        for conn in [conn for conn, end in self._ends.items() if end < now]:
            self._close(conn)
        self._begin_uploads()

    def _cap_keepalive(self, deadline: float) -> None:
        """gunicorn calls this when it stops, for connections without a request."""
        self.app.on_stop()
        super()._cap_keepalive(deadline)
        for ends in (self._ends, self._waiting):
            for conn, end in ends.items():
                ends[conn] = min(end, deadline)
