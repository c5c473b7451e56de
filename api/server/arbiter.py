"""gunicorn, started from here rather than from its command line."""

import logging
import resource
import signal
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from api.admission.concurrency import EXTENSION, Admission
from api.server.worker import SlowClientWorker
from api.settings import ApiSettings


class Server(BaseApplication):  # type: ignore[misc]
    """Serves what `make_app` returns, which is called in each worker process after its fork.

    `on_stop` is called in a worker process when a stop begins, and must not wait; `on_exit` when
    its requests have ended; and `on_child_exit` with its process id in the parent after that.
    """

    admission: Admission

    def __init__(
        self,
        settings: ApiSettings,
        listener: socket.socket,
        make_app: Callable[[], Flask],
        *,
        processes: int,
        tls: ssl.SSLContext | None,
        on_stop: Callable[[], None],
        on_exit: Callable[[], None],
        on_child_exit: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.tls = tls
        self.on_stop = on_stop
        self._make_app = make_app
        self._options = {
            "bind": f"fd://{listener.fileno()}",
            "worker_class": SlowClientWorker,
            "workers": processes,
            "threads": settings.api_threads,
            "worker_connections": _max_connections(),
            "limit_request_line": settings.max_request_line_bytes,
            # One field may be as long as the head, which is held to its limit before it is parsed.
            "limit_request_field_size": settings.max_head_bytes,
            "keepalive": settings.keep_alive_seconds,
            "graceful_timeout": int(settings.uploads_end_seconds),
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
        self.admission = app.extensions[EXTENSION]
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
        self.cfg.set("graceful_timeout", self.app.settings.stop_seconds)
        super().stop(graceful)


def _max_connections() -> int:
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
