"""HTTP servers on loopback that say what no real one can be made to say."""

import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class Answering(BaseHTTPRequestHandler):
    """To be given a `do_POST` and its like, which receive and answer."""

    def received(self) -> bytes:
        """The body, of known length."""
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """`headers` have underscores in place of hyphens."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Forwarding(Answering):
    """Passes each request on to the real server, and its answer back, unless `meddle` does
    something else with it.

    `upstream` is that server's `host:port`. The Host header stays what the client signed.
    """

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str]

    def meddle(self, body: bytes) -> None:
        self.relay(*self.ask(body))

    def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """What the real server answers: status, headers, body."""
        with closing(HTTPConnection(self.upstream, timeout=30)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def relay(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "transfer-encoding":
                self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str = "no") -> None:
        """Answer with an error of S3."""
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.relay(status, {"Content-Type": "application/xml"}, body)

    def hang_up(self) -> None:
        """Lose the answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _handle(self) -> None:
        self.meddle(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle


class _Server(ThreadingHTTPServer):
    # Of more connections at once than wait here, Linux has some try again after a second.
    request_queue_size = 128


@contextmanager
def serving(handler: type[Answering], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL where it answers."""
    with _Server(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
