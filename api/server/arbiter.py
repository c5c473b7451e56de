"""gunicorn, configured and started without its command line."""

import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from api.admission.concurrency import EXTENSION, Admission
from api.server.worker import SlowClientWorker
from api.settings import ApiSettings
from shared.runtime.tls_files import TlsFiles


class Server(BaseApplication):  # type: ignore[misc]
    """Runs the application in worker processes.

    Args:
        settings: The settings of the API.
        listener: The listening socket.
        make_app: Creates the application, in each worker process after the fork.
        processes: The number of worker processes.
        tls: The TLS context; None for plain HTTP.
        on_stop: Called in a worker process when a stop begins; must not block.
        on_exit: Called in a worker process when its requests have ended.
        on_child_exit: Called in the parent with the id of an ended worker process.
    """

    admission: Admission

    def __init__(
        self,
        settings: ApiSettings,
        listener: socket.socket,
        make_app: Callable[[], Flask],
        *,
        processes: int,
        tls: TlsFiles | None,
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
            # One field may fill the head, whose size is checked before it is parsed.
            "limit_request_field_size": settings.max_head_bytes,
            "keepalive": settings.keep_alive_seconds,
            "graceful_timeout": int(settings.uploads_end_seconds),
            # For the heartbeat of the main thread, which serves no requests.
            "timeout": 60,
            "logger_class": _SharedLogger,
            "worker_exit": lambda _server, _worker: on_exit(),
            "child_exit": lambda _server, worker: on_child_exit(worker.pid),
            # Clients may not set the WSGI variables of these names by headers.
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
        return _with_connection_handling(app)

    def run(self) -> None:
        _Parent(self).run()


class _Parent(Arbiter):  # type: ignore[misc]
    """The parent of the worker processes. It stops when its terminal closes.

    gunicorn would handle SIGHUP and other signals by starting more processes, which would break
    `stowgate run`: its broker lives in the memory of one process.
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
        """Allow the processes time to clean up after their requests.

        gunicorn would kill them when the time for requests ends.
        """
        self.cfg.set("graceful_timeout", self.app.settings.stop_seconds)
        super().stop(graceful)


def _max_connections() -> int:
    """Per process; leaves half of the allowed open files for other purposes."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1000 if files == resource.RLIM_INFINITY else min(1000, files // 2)


def _with_connection_handling(
    app: Callable[[dict[str, Any], Any], Iterable[bytes]],
) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """Add the time of the head to `environ`, and `Connection: close` after an unread body.

    The time is from before any wait for a slot. The server reads the rest of a body after the
    response, not before it: a proxy treats a server that receives the body and then disconnects as
    failed, and asks the client to retry. After `Expect: 100-continue` the body may never come.
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
    """Sends gunicorn's log lines to the handlers of all logs."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
