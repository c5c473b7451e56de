"""gunicorn, started from here rather than from its command line."""

import logging
import socket
from collections.abc import Callable
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger


class Server(BaseApplication):  # type: ignore[misc]
    """Serves what `make_app` returns, which is called in each worker process after its fork.

    `on_exit` is called in a worker process when it ends, and `on_child_exit` with its process id
    in the parent after that.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_app: Callable[[], Flask],
        *,
        processes: int,
        threads: int,
        on_exit: Callable[[], None],
        on_child_exit: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._make_app = make_app
        self._options = {
            "bind": f"fd://{listener.fileno()}",
            "worker_class": "gthread",
            "workers": processes,
            "threads": threads,
            "keepalive": 30,
            "graceful_timeout": 30,
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

    def load(self) -> Flask:
        return self._make_app()


class _SharedLogger(Logger):  # type: ignore[misc]
    """Hands gunicorn's lines to the handlers that all logs go through."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
