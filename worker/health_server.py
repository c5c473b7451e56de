"""The server of the worker's health and metrics: waitress, for any number of connections."""

import logging
import resource
import socket
from wsgiref.types import WSGIApplication

from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer

_THREADS = 4
_IDLE_SECONDS = 10

# Nothing here has a body, and waitress keeps one on disk before it calls the application.
_HEAD_BYTES = 16 << 10
_BODY_BYTES = 1 << 10


class HealthServer(TcpWSGIServer):  # type: ignore[misc]
    """Serves `app` on a listening socket with a fixed number of threads.

    An idle connection needs no thread. At the maximum number of connections, the one that has been
    idle longest is closed, so that idle clients cannot lock out a health probe.
    """

    def __init__(self, app: WSGIApplication, listener: socket.socket) -> None:
        self._max_connections = _max_connections()
        # It logs a line for each request that waits for a thread; a client could fill the log.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        super().__init__(
            app,
            _sock=listener,
            bind_socket=False,
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
            adj=Adjustments(
                sockets=[listener],
                threads=_THREADS,
                # Two are its own, and one is accepted before another is closed.
                connection_limit=self._max_connections + 3,
                asyncore_use_poll=True,
                channel_timeout=_IDLE_SECONDS,
                cleanup_interval=_IDLE_SECONDS // 2,
                max_request_header_size=_HEAD_BYTES,
                max_request_body_size=_BODY_BYTES,
                ident=None,
            ),
        )

    def handle_accept(self) -> None:
        super().handle_accept()
        if len(self.active_channels) > self._max_connections:
            idle = [c for c in self.active_channels.values() if not c.requests]
            if idle:
                min(idle, key=lambda channel: channel.last_activity).handle_close()


def _max_connections() -> int:
    """Leave half of the process's file descriptors to the store and the broker."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1000 if files == resource.RLIM_INFINITY else min(1000, files // 2)
