"""The composition root of the worker, and its process."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import structlog
from flask import Flask
from prometheus_client import CollectorRegistry

from shared.ids import PayloadIds
from shared.ports import DeadLetter, DeadLetterConsumer, EventConsumer, ReceivedMessage
from shared.record_store import Records
from shared.refusals import Refusals
from shared.runtime.backends import Backends, open_backends
from shared.runtime.facts import Facts
from shared.runtime.health import Readiness, health_views
from shared.runtime.health_paths import HEALTH_PATHS
from shared.runtime.listen import bind, url_of
from shared.runtime.logs import log_start, where
from shared.runtime.metrics import BackendMetrics, HealthMetrics, WorkerMetrics
from shared.runtime.threads import started_pool
from shared.runtime.tracing import open_tracer
from worker.handler import Handler
from worker.health_server import HealthServer
from worker.leader import LeaderLease, Leadership, SoleLeader
from worker.pending_cleanup import PendingCleanup
from worker.refusals import RefusalNotes
from worker.relay import Relay
from worker.replays import Replays
from worker.settings import WorkerSettings
from worker.sweeper import Sweeper
from worker.workflow_manager import WorkflowManager

_log = structlog.get_logger()

# Under load, each removal request covers the records that were opened within this time.
_CLEANUP_PAUSE_SECONDS = 0.1
# Minimum of sidecar threads, shared by all payloads.
_MIN_SIDECAR_THREADS = 4

_STOP_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Routine:
    """A task that runs at the start, and again after each pause."""

    name: str
    do: Callable[[], None]
    pause_seconds: float


class Worker:
    """Handles events and runs routines, each in its own threads."""

    def __init__(
        self,
        consumer: EventConsumer,
        handler: Handler,
        routines: Sequence[Routine],
        cleanup: PendingCleanup,
        leader: Leadership,
        routines_end_seconds: float,
        *,
        dead_letters: DeadLetterConsumer,
        note_refusal: Callable[[DeadLetter], None],
        replays: Replays,
        handle: Callable[[ReceivedMessage], None] | None = None,
    ) -> None:
        """`handle` is the handler within a span."""
        self._consumer = consumer
        self._handle = handle or handler
        self._dead_letters = dead_letters
        self._note_refusal = note_refusal
        self._replays = replays
        self._handler = handler
        self._cleanup = cleanup
        self._leader = leader
        self._routines_end_seconds = routines_end_seconds
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=[routine], name=routine.name, daemon=True)
            for routine in routines
        ]

    def start(self) -> None:
        self._consumer.start(self._handle)
        self._dead_letters.start(self._note_refusal)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish the payloads in progress or return them to the queue, in bounded time."""
        _log.info("draining: payloads in progress end, or return to the queue")
        self._stopping.set()
        self._handler.stop()
        self._replays.stop()
        self._consumer.close()
        self._dead_letters.close()
        _log.info("no payloads in progress; waiting for relay and sweep to end")
        end = time.monotonic() + self._routines_end_seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        # A routine that still runs waits for the store, which would delay this too.
        if not any(thread.is_alive() for thread in self._threads):
            self._cleanup.run_once(0)
            self._leader.release()

    def _run(self, routine: Routine) -> None:
        while not self._stopping.is_set():
            try:
                routine.do()
            except Exception as error:  # noqa: BLE001
                # Nobody would notice the end of a routine before much work has piled up.
                _log.error(
                    "routine failed; it runs again after its pause",
                    routine=routine.name,
                    error=type(error).__name__,
                    place=where(error),
                )
            self._stopping.wait(routine.pause_seconds)


def compose(settings: WorkerSettings, backends: Backends, registry: CollectorRegistry) -> Worker:
    metrics = WorkerMetrics(registry)
    cleanup = PendingCleanup(backends.state)
    records = Records(backends.state, cleanup.add)
    owner = f"{socket.gethostname()}/{os.getpid()}/{uuid4()}"
    lease = timedelta(seconds=settings.lease_seconds)
    payload_ids = PayloadIds(settings.state_bucket)
    refusals = Refusals(backends.state)
    workflow_manager = WorkflowManager(
        exchange=settings.workflow_manager_exchange,
        routing_key=settings.workflow_manager_routing_key,
        bucket=settings.bucket,
    )
    replays = Replays(
        records=records,
        refusals=refusals,
        instances=backends.instances,
        publisher=backends.requests,
        workflow_manager=workflow_manager,
        owner=owner,
        lease=lease,
        metrics=metrics,
        tracer=backends.tracer,
    )
    handler = Handler(
        records=records,
        record_missing=backends.sweep_cursor.record_missing,
        instances=backends.instances,
        publisher=backends.requests,
        workflow_manager=workflow_manager,
        sidecar_writers=started_pool(max(_MIN_SIDECAR_THREADS, settings.openings), "sidecar"),
        owner=owner,
        lease=lease,
        metrics=metrics,
        publish_replay=replays.publish,
        tracer=backends.tracer,
    )
    relay = Relay(
        records=records,
        announce=backends.announce,
        backlog=backends.consumer.backlog,
        metrics=metrics,
    )
    sweeper = Sweeper(
        instances=backends.instances,
        state=backends.state,
        records=records,
        cursor=backends.sweep_cursor,
        payload_ids=payload_ids,
        # An upload that took longer than the maximum is never acknowledged.
        grace=2 * timedelta(seconds=settings.max_upload_seconds),
        pause=timedelta(seconds=settings.sweep_seconds),
        metrics=metrics,
    )
    leader: Leadership = SoleLeader()
    if settings.broker != "memory":
        leader = LeaderLease(
            backends.state, owner=owner, duration=lease, workers=backends.consumer.consumers
        )

    def relay_once() -> None:
        if not leader.leads():
            relay.stand_by()
        elif not relay.run_once():
            leader.release()  # another worker may reach the store and the broker

    def replay_once() -> None:
        if leader.leads():
            replays.publish_due()

    def sweep_once() -> None:
        if leader.leads():
            sweeper.sweep()

    return Worker(
        backends.consumer,
        handler,
        [
            Routine("relay", relay_once, settings.relay_seconds),
            Routine("replays", replay_once, settings.relay_seconds),
            Routine("sweeper", sweep_once, settings.sweep_seconds),
            Routine("cleanup", cleanup.run_once, _CLEANUP_PAUSE_SECONDS),
        ],
        cleanup,
        leader,
        settings.routines_end_seconds,
        dead_letters=backends.dead_letters,
        note_refusal=RefusalNotes(records, refusals, payload_ids, metrics),
        replays=replays,
        handle=backends.tracer.consuming(backends.queue, handler),
    )


def run(settings: WorkerSettings, say: Callable[[str], None]) -> None:
    """Serve until a signal or the end of the terminal; `say` prints the address of the health port.

    Raises `BadSetting` if the address is in use.
    """
    is_detached = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # with nohup(1)
    stop_signals = _STOP_SIGNALS - ({signal.SIGHUP} if is_detached else set())
    # All threads that start from here on inherit the mask, so that `sigwait` below receives the
    # signal. A handler would run in this thread only, which another thread's signal need not wake.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    registry = CollectorRegistry()
    backends = open_backends(
        settings,
        store_threads=settings.openings,
        openings=settings.openings,
        metrics=BackendMetrics(registry),
        tracer=open_tracer("stowgate-worker", settings.broker, os.environ),
    )
    worker = compose(settings, backends, registry)
    app = Flask(__name__, static_folder=None)
    readiness = Readiness(backends.dependencies(backends.consumer.ping), HealthMetrics(registry))
    # Nobody is asked who they are here, so nobody is told more than states; the log has the rest.
    facts = Facts(settings, backends.keys_end).registry()
    views = health_views(readiness, registry, facts, may_read=lambda: False)
    for endpoint, path in HEALTH_PATHS.items():
        app.add_url_rule(path, view_func=views[endpoint])
    listener = bind(settings.worker_listen, "STOWGATE_WORKER_LISTEN")
    log_start()
    server = HealthServer(app, listener)
    backends.prepare()
    worker.start()
    threading.Thread(target=server.run, name="health", daemon=True).start()
    _log.info("listening", url=url_of(listener))
    say(f"Stowgate's worker serves health and metrics on {url_of(listener)}")
    signal.sigwait(stop_signals)
    readiness.stop()
    worker.stop()
    backends.close()
    _log.info("stopped")
