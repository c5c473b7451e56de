"""The composition root of the worker, and its life as a process."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from uuid import uuid4

import structlog
from flask import Flask
from prometheus_client import CollectorRegistry
from werkzeug.serving import WSGIRequestHandler, make_server

from shared.config import Settings
from shared.engines import Engines, open_engines
from shared.health import Dependency, health_blueprint
from shared.listen import bind, url_of
from shared.metrics import WorkerMetrics
from shared.ports import EventConsumer
from shared.records import Records
from worker.handler import Handler
from worker.relay import Relay
from worker.workflow_manager import WorkflowManager

_log = structlog.get_logger()


class Worker:
    """Handles events and runs the relay, each in threads of its own."""

    def __init__(
        self,
        consumer: EventConsumer,
        handler: Handler,
        relay: Relay,
        relay_seconds: float,
    ) -> None:
        self._consumer = consumer
        self._handler = handler
        self._relay = relay
        self._relay_seconds = relay_seconds
        self._stopping = threading.Event()
        self._relaying = threading.Thread(target=self._run_relay, name="relay", daemon=True)

    def start(self) -> None:
        self._consumer.start(self._handler)
        self._relaying.start()

    def stop(self) -> None:
        """Finish or hand back what is in hand, in bounded time."""
        self._stopping.set()
        self._consumer.close()
        self._relaying.join(timeout=5.0)

    def _run_relay(self) -> None:
        while True:
            self._relay.look()
            if self._stopping.wait(self._relay_seconds):
                return


def compose(settings: Settings, engines: Engines, registry: CollectorRegistry) -> Worker:
    metrics = WorkerMetrics(registry)
    records = Records(engines.state)
    handler = Handler(
        records=records,
        instances=engines.instances,
        publisher=engines.requests,
        workflow_manager=WorkflowManager(
            exchange=settings.workflow_manager_exchange,
            routing_key=settings.workflow_manager_routing_key,
            bucket=settings.bucket,
        ),
        sidecar_writers=ThreadPoolExecutor(settings.worker_threads, thread_name_prefix="sidecar"),
        owner=f"{socket.gethostname()}/{os.getpid()}/{uuid4()}",
        metrics=metrics,
    )
    relay = Relay(
        records=records,
        announce=engines.announce,
        backlog=engines.consumer.backlog,
        metrics=metrics,
    )
    return Worker(engines.consumer, handler, relay, settings.relay_seconds)


def run(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `say` is told where health and metrics are.

    Raises `BadSetting` where the address is taken.
    """
    registry = CollectorRegistry()
    engines = open_engines(settings)
    worker = compose(settings, engines, registry)
    app = Flask(__name__, static_folder=None)
    app.register_blueprint(health_blueprint(_dependencies(engines), registry))
    listener = bind(settings.worker_listen, "STOWGATE_WORKER_LISTEN")
    server = make_server(
        *settings.worker_listen,
        app,
        threaded=True,
        request_handler=_QuietRequestHandler,
        fd=listener.fileno(),
    )
    stop = threading.Event()

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    engines.prepare()
    worker.start()
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    say(f"Stowgate's worker tells its health on {url_of(listener)}")
    stop.wait()
    _log.info("worker stopping")
    worker.stop()
    engines.close()
    server.shutdown()


def _dependencies(engines: Engines) -> Mapping[str, Dependency]:
    return {
        "object_store": Dependency(engines.ping_stores, essential=True),
        "broker": Dependency(engines.consumer.ping, essential=False),
    }


class _QuietRequestHandler(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Probes come every few seconds and say nothing that the metrics do not."""
