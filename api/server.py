"""gunicorn, started from here rather than from its command line."""

import errno
import logging
import resource
import select
import selectors
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any

import orjson
from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.http import errors, message
from gunicorn.http.body import LengthReader
from gunicorn.util import split_request_uri, unquote_to_wsgi_str
from gunicorn.workers.gthread import TConn, ThreadWorker

from api.hourglass import Hourglass, Receiving
from api.paths import own_path
from api.slots import EXTENSION, Slots
from shared.logs import where
from shared.tls_files import TlsFiles

_HEAD_SECONDS = 5.0
_HANDSHAKE_SECONDS = 10.0

# Of one read that does not wait for anything.
_READ_SECONDS = 1.0

# Of a request that is no upload; an upload has limits of its own.
_SMALL_BODY_SECONDS = 5.0
_UPLOADS = "/dicomweb/"

# Of a peer that takes its answer; the body of an upload has limits of its own.
_SOCKET_SECONDS = 10.0

# Behind the last answer on a connection a peer has to send so much in so long, or it is hung up on.
_LINGER_BYTES = 64 << 10
_LINGER_SECONDS = 10.0

_PIECE_BYTES = 64 << 10

# Of accept(2): no file descriptor is left, or no memory for a connection.
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class _PlainHttp(errors.ParseException):  # type: ignore[misc]
    """A request without TLS where TLS is spoken."""


_REFUSALS: tuple[tuple[type[Exception], HTTPStatus, str], ...] = (
    (errors.LimitRequestLine, HTTPStatus.REQUEST_URI_TOO_LONG, "the request line is too long"),
    (
        errors.LimitRequestHeaders,
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        "the header fields are too many or too long",
    ),
    (
        errors.ExpectationFailed,
        HTTPStatus.EXPECTATION_FAILED,
        "the Expect header asks for something other than 100-continue",
    ),
    (
        errors.UnsupportedTransferCoding,
        HTTPStatus.NOT_IMPLEMENTED,
        "the Transfer-Encoding is none that is known here",
    ),
    (errors.InvalidRequestMethod, HTTPStatus.BAD_REQUEST, "the request method is malformed"),
    (errors.InvalidHTTPVersion, HTTPStatus.BAD_REQUEST, "the HTTP version is none spoken here"),
    (errors.InvalidRequestLine, HTTPStatus.BAD_REQUEST, "the request line is malformed"),
    (errors.InvalidHeaderName, HTTPStatus.BAD_REQUEST, "the name of a header field is malformed"),
    (
        errors.InvalidHeader,
        HTTPStatus.BAD_REQUEST,
        "a header field is malformed or contradicts another",
    ),
    (errors.ObsoleteFolding, HTTPStatus.BAD_REQUEST, "a header field is folded over lines"),
    (_PlainHttp, HTTPStatus.BAD_REQUEST, "HTTPS is spoken here: the URL has to begin with https"),
    (errors.ParseException, HTTPStatus.BAD_REQUEST, "the request is no HTTP/1.1"),
)


class Server(BaseApplication):  # type: ignore[misc]
    """Serves what `make_app` returns, which is called in each worker process after its fork.

    A request line of more than `request_line_bytes` is answered with 414, and a head, that line
    included, of more than `head_bytes` with 431. A connection that idles for `keep_alive_seconds`
    is closed. An upload waits for one of the application's slots for at most
    `upload_wait_seconds`, and may take `upload_seconds`. With `tls` it speaks HTTPS and nothing
    else. `path_prefix` may stand in front of every path.

    A stop takes `stop_seconds` at most, of which requests under way have `requests_end_seconds`.
    `on_stop` is called in a worker process when a stop begins, and must not wait; `on_exit` when
    its requests have ended; and `on_child_exit` with its process id in the parent after that.
    """

    slots: Slots

    def __init__(
        self,
        listener: socket.socket,
        make_app: Callable[[], Flask],
        *,
        processes: int,
        threads: int,
        request_line_bytes: int,
        head_bytes: int,
        keep_alive_seconds: int,
        upload_wait_seconds: float,
        upload_seconds: float,
        tls: TlsFiles | None,
        path_prefix: str,
        stop_seconds: int,
        requests_end_seconds: float,
        on_stop: Callable[[], None],
        on_exit: Callable[[], None],
        on_child_exit: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.request_line_bytes = request_line_bytes
        self.head_bytes = head_bytes
        self.upload_wait_seconds = upload_wait_seconds
        self.upload_seconds = upload_seconds
        self.tls = tls
        self.path_prefix = path_prefix
        self.stop_seconds = stop_seconds
        self.on_stop = on_stop
        self._make_app = make_app
        self._options = {
            "bind": f"fd://{listener.fileno()}",
            "worker_class": PatientWorker,
            "workers": processes,
            "threads": threads,
            "worker_connections": _most_connections(),
            "limit_request_line": request_line_bytes,
            # One field may be as long as the head, which is held to its limit before it is parsed.
            "limit_request_field_size": head_bytes,
            "keepalive": keep_alive_seconds,
            "graceful_timeout": int(requests_end_seconds),
            # The beat of the process's main thread, which no request runs on.
            "timeout": 60,
            "logger_class": _SharedLogger,
            "worker_exit": lambda _server, _worker: on_exit(),
            "child_exit": lambda _server, worker: on_child_exit(worker.pid),
            # No header of a sender may set the WSGI variables of that name.
            "forwarder_headers": "",
            "control_socket_disable": True,
        }
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
        app = self._make_app()
        self.slots = app.extensions[EXTENSION]
        return _adapted(app)

    def run(self) -> None:
        _Parent(self).run()


class _Parent(Arbiter):  # type: ignore[misc]
    """The process that keeps the worker processes, and ends with the terminal it was started from.

    For gunicorn that signal, and others, ask for more processes or new ones. None is wanted here,
    least of all beside the one that `stowgate run` embeds its broker in.
    """

    SIGNALS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGINT, signal.SIGTERM)

    def init_signals(self) -> None:
        is_detached = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        super().init_signals()
        if is_detached:  # with nohup(1)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def handle_hup(self) -> None:
        self.handle_term()

    def stop(self, graceful: bool = True) -> None:
        """gunicorn would kill its processes when the time of their requests is over, which is when
        they begin to let go of what they have."""
        self.cfg.set("graceful_timeout", self.app.stop_seconds)
        super().stop(graceful)


def _most_connections() -> int:
    """Per process; half of the open files it may have is left for all else."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1000 if files == resource.RLIM_INFINITY else min(1000, files // 2)


def _adapted(
    app: Callable[[dict[str, Any], Any], Iterable[bytes]],
) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """The application is told when the head of a request was whole, before any wait for a slot.

    An answer to a request whose body was not read to its end says `Connection: close`. The server
    reads on behind the answer, not before it: a proxy gives up on a peer that takes the body and
    then hangs up, and tells the sender to try again instead. And in place of 100 Continue nobody
    knows whether the body comes at all.
    """

    def call(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"]
        environ["stowgate.head_at"] = body.head_at

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            if body.unread:
                start_response.__self__.force_close()
            return start_response(status, headers, exc_info)

        return app(environ, start)

    return call


class _SharedLogger(Logger):  # type: ignore[misc]
    """Hands gunicorn's lines to the handlers that all logs go through."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


def _has_room(sock: socket.socket) -> bool:
    """Whether the peer has taken enough of what it was sent before for more to fit."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


def _say_the_end(sock: ssl.SSLSocket) -> None:
    """RFC 8446 6.1: without a close_notify a peer may take the answer for one that was cut."""
    # The peer's own close_notify is not waited for, and that is an error to `unwrap`.
    with suppress(OSError, ValueError):
        sock.unwrap()


def _has_decrypted(sock: socket.socket) -> bool:
    """Whether there is data that no poller tells of, as it is no longer with the kernel."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


class _Received:
    """`head_at` is when the head before the body was whole, by the monotonic clock."""

    head_at = 0.0


class _LengthBody(_Received):
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


class _ChunkedBody(_Received):
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


class _AroundBody(_Received):
    """A body with something done around each read of it."""

    def __init__(self, body: "_Body") -> None:
        self._body = body

    def read(self, size: int) -> bytes:
        return self._body.read(size)

    @property
    def unread(self) -> bool:
        return self._body.unread

    @property
    def failed(self) -> bool:
        return self._body.failed


_Body = _LengthBody | _ChunkedBody | _AroundBody


class _ExpectedBody(_AroundBody):
    """A body that is sent once the sender was told to go on (RFC 9110 10.1.1).

    It is told when the body is read, so one that is refused on its head alone never comes.
    """

    def __init__(self, body: _Body, sock: socket.socket) -> None:
        super().__init__(body)
        self._sock = sock
        self._asked_for = False

    def read(self, size: int) -> bytes:
        if not self._asked_for:
            self._asked_for = True
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return super().read(size)


class _SmallBody(_AroundBody):
    """A body that is to be in by `end`, by the monotonic clock.

    It is the sender who is held to that: once the body is in, an answer takes what it takes.
    """

    def __init__(self, body: _Body, sock: socket.socket, hourglass: Hourglass, end: float) -> None:
        super().__init__(body)
        self._receiving = Receiving(sock)
        self._hourglass = hourglass
        self._end = end

    def read(self, size: int) -> bytes:
        self._hourglass.turn(self._receiving, self._end)
        try:
            return super().read(size)
        finally:
            self._hourglass.stop(self._receiving)


class PatientWorker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's worker, in which a connection takes a thread only while its request is served.

    gunicorn's own gives a connection a thread from its first byte on, also when the rest of the
    request's head never comes, and waits on its main loop for peers that do not close, so that a
    few connections keep everyone out. Here both wait in the poller of the main loop, which costs
    a file descriptor each: a head until it is whole, and a connection behind its last answer until
    its peer closes. So does a TLS handshake. An upload waits for a slot without a thread too, and
    nothing more of it is read. All methods run on the main loop except `handle` and what it calls;
    none of them waits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hourglass = Hourglass()
        # Until when each connection may stay in the poller, by the monotonic clock.
        self._ends: dict[TConn, float] = {}
        # Those with a thread.
        self._served: set[TConn] = set()
        # Uploads without a slot, in the order in which they came, and until when each waits for one
        # by that clock. The others have the rest of the connections.
        self._waiting: dict[TConn, float] = {}
        self._most_waiting = self.worker_connections // 2

    def run(self) -> None:
        try:
            super().run()
        finally:
            # What a stop has no more time for would keep its thread, and that the process.
            for conn in list(self._served):
                Receiving(conn.sock, grace_seconds=0).cut()

    def init_signals(self) -> None:
        """A terminal that closes tells this process too, which has requests to finish."""
        super().init_signals()
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def accept(self, listener: socket.socket) -> None:
        """When there are as many as may be, the one that waits the longest makes room."""
        has_room = True
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            has_room = False
        if has_room and self.nr_conns < self.worker_connections:
            return
        # One that was accepted just now is the last of these.
        if len(self._ends) > has_room:
            self._close(next(iter(self._ends)))
        elif self.keepalived_conns:
            # Its turn to be closed by `murder_keepalived`, in this round.
            self.keepalived_conns[0].timeout = 0.0

    def enqueue_req(self, conn: TConn) -> None:
        """Where gunicorn gives a connection a thread: new, readable again, or read ahead."""
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
            # The peer is gone already.
            self._close(conn)
            return
        self.poller.register(
            conn.sock, selectors.EVENT_READ, lambda _: self._go_on_with_handshake(conn)
        )

    def _go_on_with_handshake(self, conn: TConn) -> None:
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
        self.poller.modify(conn.sock, awaited, lambda _: self._go_on_with_handshake(conn))

    def _refuse_handshake(self, conn: TConn, error: OSError) -> None:
        reason = error.reason if isinstance(error, ssl.SSLError) else None
        if reason == "HTTP_REQUEST":
            self.poller.unregister(conn.sock)
            # Without TLS, or the peer could not read it.
            conn.sock = socket.socket(fileno=conn.sock.detach())
            self.handle_error(None, conn.sock, conn.client, _PlainHttp())
            self._linger(conn)
            return
        if reason is not None and not isinstance(error, ssl.SSLEOFError):
            # A name out of OpenSSL's list, and nothing that was sent.
            self.log.warning("TLS handshake with %s failed: %s", conn.client[0], reason)
        self._close(conn)

    def _await_head(self, conn: TConn) -> None:
        """Mostly it is there by now: on the connection, in the parser's buffer, where what a
        pipelining sender sent of its next request is, or decrypted with the request before it."""
        conn.init()
        conn.sock.setblocking(False)
        if conn.parser.unreader.buf.getvalue():
            self._ends[conn] = time.monotonic() + _HEAD_SECONDS
        if self._is_whole(conn):
            self._serve(conn)
            return
        self.poller.register(conn.sock, selectors.EVENT_READ, lambda _: self._receive_head(conn))
        self._receive_head(conn)

    def _receive_head(self, conn: TConn) -> None:
        try:
            with self._bounded(conn.sock):
                # More than a TLS record has, so that nothing is left where no poller sees it.
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
        if self._is_whole(conn):
            self.poller.unregister(conn.sock)
            self._serve(conn)

    @contextmanager
    def _bounded(self, sock: socket.socket) -> Iterator[None]:
        """Ends what reads from it and does not come back, though it waits for nothing."""
        receiving = Receiving(sock, grace_seconds=0)
        self._hourglass.turn(receiving, time.monotonic() + _READ_SECONDS)
        try:
            yield
        finally:
            self._hourglass.stop(receiving)

    def _is_whole(self, conn: TConn) -> bool:
        """Whether what was received can be answered, if only with a refusal."""
        head = conn.parser.unreader.buf.getvalue()
        return b"\r\n\r\n" in head or b"\n\n" in head or self._excess(head) is not None

    def _excess(self, received: bytes) -> errors.ParseException | None:
        """What of a head is over its limit, as soon as that can be told.

        gunicorn's own limits together would let each connection hold 800 kB.
        """
        line_bytes, head_bytes = self.app.request_line_bytes, self.app.head_bytes
        if b"\n" not in received[: line_bytes + 2] and len(received) > line_bytes + 1:
            return errors.LimitRequestLine(len(received), line_bytes)
        if b"\r\n\r\n" not in received[: head_bytes + 4] and len(received) > head_bytes + 3:
            return errors.LimitRequestHeaders("too long")
        return None

    def _serve(self, conn: TConn) -> None:
        if not _has_room(conn.sock):
            # It asks on and on and takes no answers; another would wait for it with its thread.
            self._close(conn)
            return
        del self._ends[conn]
        conn.head_at = time.monotonic()
        if self._is_upload(conn) and len(self._waiting) < self._most_waiting:
            self._waiting[conn] = conn.head_at + self.app.upload_wait_seconds
            self._begin_uploads()
        else:
            super().enqueue_req(conn)

    def _is_upload(self, conn: TConn) -> bool:
        """By the request line. One that is malformed is no upload, and will be refused."""
        head: bytes = conn.parser.unreader.buf.getvalue()[: self.app.request_line_bytes]
        method, _, rest = head.decode("latin-1").partition(" ")
        try:
            path = split_request_uri(rest.partition(" ")[0]).path
        except ValueError:
            return False
        return method == "POST" and self._own_path(path).startswith(_UPLOADS)

    def _own_path(self, path: str) -> str:
        return own_path(unquote_to_wsgi_str(path), self.app.path_prefix)

    def _begin_uploads(self) -> None:
        """Serve those that get a slot now, and those that have waited for long enough: without a
        slot, the application refuses them."""
        slots, now = self.app.slots, time.monotonic()
        for conn, end in list(self._waiting.items()):
            if not slots.take(conn.sock) and end > now:
                break
            del self._waiting[conn]
            super().enqueue_req(conn)
        slots.waiting(len(self._waiting))

    def handle(self, conn: TConn) -> bool:
        """Refuses a head that is too long, which gunicorn would go on reading."""
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
        """Bounds how long the sender may keep the thread.

        The time of a body counts from when its head was whole, not from when a thread was free:
        so those that stall together are ended together, however many they are.
        """
        conn.sock.settimeout(_SOCKET_SECONDS)
        if self.app.tls is not None:
            req.scheme = "https"
        if isinstance(req.body.reader, LengthReader):
            req.body = _LengthBody(req.body.reader)
        else:
            req.body = _ChunkedBody(req.body, self.app.head_bytes)
        if not self._own_path(req.path).startswith(_UPLOADS):
            end = conn.head_at + _SMALL_BODY_SECONDS
            req.body = _SmallBody(req.body, conn.sock, self._hourglass, end)
        if req._expected_100_continue:
            req._expected_100_continue = False
            req.body = _ExpectedBody(req.body, conn.sock)
        req.body.head_at = conn.head_at
        try:
            return bool(super().handle_request(req, conn))
        except (TimeoutError, ssl.SSLError):
            # A peer that does not take its answer, or one whose encryption is broken; gunicorn
            # would log it as an error of ours.
            return False

    def _keepalive_after(self, conn: TConn, keepalive: bool) -> bool:
        """gunicorn would wait 5 s for a body that the application left unread."""
        try:
            with self._bounded(conn.sock):
                return keepalive and conn.parser.finish_body(deadline=time.monotonic() + 0.1)
        except (errors.ParseException, ssl.SSLError):
            # The answer was sent; gunicorn would send a refusal behind it.
            return False

    def handle_error(
        self,
        req: message.Request | None,  # noqa: ARG002
        client: socket.socket,
        addr: Any,  # noqa: ARG002
        exc: Exception,
    ) -> None:
        """Answers with fixed words: gunicorn's repeat what was sent, to the log as well."""
        for kind, kind_status, words in _REFUSALS:
            # A header of an answer that is malformed is no fault of the sender.
            at_fault = (errors.InvalidResponseHeader, errors.InvalidResponseHeaderName)
            if isinstance(exc, kind) and not isinstance(exc, at_fault):
                status, detail = kind_status, words
                self.log.warning("request refused with %d: %s", status, detail)
                break
        else:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            detail = "an error of this service, which its log describes"
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
        self.app.slots.give_back(conn.sock)
        if fs.cancelled() or fs.exception() or not fs.result():
            self._linger(conn)
        elif _has_decrypted(conn.sock):
            self.enqueue_req(conn)
        else:
            super().finish_request(conn, fs)
        self._begin_uploads()

    def _linger(self, conn: TConn) -> None:
        """Read on and forget, so that a sender in the middle of sending gets to see the answer.

        A connection closed with unread data on it is reset, and the answer lost (RFC 9112 9.6).
        Some senders, `HttpURLConnection` of Java among them, look for an answer only when they have
        sent everything, however much that is. So one that goes on sending is read from for as long
        as its upload might have taken; one that pauses or trickles is hung up on.
        """
        conn.linger_end = time.monotonic() + self.app.upload_seconds
        self._linger_on(conn)
        try:
            conn.sock.setblocking(False)
            if isinstance(conn.sock, ssl.SSLSocket):
                with self._bounded(conn.sock):
                    _say_the_end(conn.sock)
            # From here on what comes is not decrypted, only forgotten.
            conn.sock.shutdown(socket.SHUT_WR)
            self.poller.register(conn.sock, selectors.EVENT_READ, lambda _: self._forget(conn))
        except (OSError, ValueError):
            self._close(conn)

    def _forget(self, conn: TConn) -> None:
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
            self._linger_on(conn)

    def _linger_on(self, conn: TConn) -> None:
        conn.linger_bytes = _LINGER_BYTES
        self._ends[conn] = min(time.monotonic() + _LINGER_SECONDS, conn.linger_end)

    def _close(self, conn: TConn) -> None:
        """End a connection that waits in the poller, which may have an event for it still."""
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
        """gunicorn calls this when it stops, for connections that have no request under way."""
        self.app.on_stop()
        super()._cap_keepalive(deadline)
        for ends in (self._ends, self._waiting):
            for conn, end in ends.items():
                ends[conn] = min(end, deadline)
