"""`stowgate run`, `stowgate api`, `stowgate worker`.

Their parts are imported where they are used: in the serving process, after the fork, and after this
module has set the environment variable that prometheus_client reads on import.
"""

import ctypes
import gc
import os
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, TypeVar

import click
import structlog
from gunicorn.arbiter import Arbiter

from api.admission.concurrency import EXTENSION
from api.server.arbiter import Server
from api.server.tls import server_tls
from api.settings import ApiSettings, guard_listen
from cli.settings import ALL_SETTINGS
from shared.errors import StoreUnfit
from shared.runtime.backends import Backends, open_backends
from shared.runtime.listen import bind, url_of
from shared.runtime.logs import configure_logs, log_start
from shared.runtime.tracing import open_tracer, why_no_spans
from shared.settings.loader import BadSetting, doubtful_variables, load
from shared.settings.services import METRICS_FOLDER, CommonSettings
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from flask import Flask

    from worker.main import Worker

_log = structlog.get_logger()

_Section = TypeVar("_Section", bound=CommonSettings)

_M_ARENA_MAX = -8

# A folder in memory, shm_overview(7).
_SHARED_MEMORY = "/dev/shm"  # noqa: S108

# There are hardly any reference cycles here, and with Python's default of 700 the garbage collector
# takes 5 % of the CPU time.
_COLLECT_AFTER_OBJECTS = 20_000


@click.command(short_help="Run API and worker in one process.")
def run() -> None:
    """Run API and worker in one process, which is all that one machine needs."""
    settings, of_worker = _start_api(), load(WorkerSettings)
    tls = server_tls(settings)
    listener = bind(settings.listen, "STOWGATE_LISTEN")
    log_start()
    _say_where(settings, url_of(listener, settings.scheme))
    embedded: list[tuple[Worker, Backends]] = []
    apps: list[Flask] = []

    def make_app() -> "Flask":
        from prometheus_client import CollectorRegistry

        import api.main
        import worker.main
        from shared.runtime.metrics import BackendMetrics

        registry = CollectorRegistry()
        backends = open_backends(
            settings,
            store_threads=settings.api_threads + of_worker.openings,
            openings=of_worker.openings,
            metrics=BackendMetrics(registry),
            tracer=open_tracer("stowgate", settings.broker, os.environ),
        )
        app = api.main.compose(settings, backends, registry)
        opener = worker.main.compose(of_worker, backends, registry)
        _prepare(backends)
        opener.start()
        embedded.append((opener, backends))
        apps.append(app)
        return app

    stopping: list[threading.Thread] = []

    def on_stop() -> None:
        # Beside the uploads that are given time to end, so that whoever kills the process before
        # they have leaves no lease behind.
        _say_stopping(apps)
        for opener, _ in embedded:
            stopping.append(threading.Thread(target=opener.stop, name="stop worker", daemon=True))
            stopping[-1].start()

    def on_exit() -> None:
        if not stopping:
            on_stop()
        for thread in stopping:
            thread.join()
        for _, backends in embedded:
            backends.close()
        _log.info("stopped")

    Server(
        settings, listener, make_app, processes=1, tls=tls, on_stop=on_stop, on_exit=on_exit
    ).run()


@click.command(short_help="Run only the API.")
def api() -> None:
    """Run only the API; any number of them can share one object store and broker."""
    settings = _start_api()
    tls = server_tls(settings)
    listener = bind(settings.listen, "STOWGATE_LISTEN")
    log_start()
    url = url_of(listener, settings.scheme)
    _log.info("listening", url=url, processes=settings.api_processes)
    click.echo(f"Stowgate's API listens on {url}")
    events_reach_workers = settings.broker != "memory"
    if not events_reach_workers:
        _log.warning(
            "STOWGATE_BROKER=memory does not reach other processes: payloads stored here wait "
            "until the relay of a worker on the same object store finds them; configure RabbitMQ "
            "for both, or start stowgate run instead"
        )
    opened: list[Backends] = []
    apps: list[Flask] = []

    def make_app() -> "Flask":
        from prometheus_client import CollectorRegistry

        import api.main
        from shared.runtime.metrics import BackendMetrics

        registry = CollectorRegistry()
        backends = open_backends(
            settings,
            store_threads=settings.api_threads,
            metrics=BackendMetrics(registry),
            tracer=open_tracer("stowgate-api", settings.broker, os.environ),
        )
        _prepare(backends)
        opened.append(backends)
        app = api.main.compose(
            settings, backends, registry, events_reach_workers=events_reach_workers
        )
        apps.append(app)
        return app

    def on_exit() -> None:
        for backends in opened:
            backends.close()
        _log.info("stopped")

    def on_child_exit(process_id: int) -> None:
        if METRICS_FOLDER in os.environ:
            from prometheus_client.multiprocess import mark_process_dead

            mark_process_dead(process_id)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        if settings.api_processes > 1:
            folder = tempfile.TemporaryDirectory(prefix="stowgate-metrics-", dir=_memory())
            os.environ[METRICS_FOLDER] = stack.enter_context(folder)
        Server(
            settings,
            listener,
            make_app,
            processes=settings.api_processes,
            tls=tls,
            on_stop=lambda: _say_stopping(apps),
            on_exit=on_exit,
            on_child_exit=on_child_exit,
        ).run()


@click.command(short_help="Run only the worker.")
def worker() -> None:
    """Run only the worker; any number of them can share one object store and broker."""
    import worker.main

    worker.main.run(_start(WorkerSettings), click.echo)


def _memory() -> str | None:
    """A full disk kills a process that writes to a memory-mapped file there (SIGBUS)."""
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK) else None


def _start_api() -> ApiSettings:
    from api.auth.authenticators import authenticator

    settings = _start(ApiSettings)
    guard_listen(settings)
    try:
        settings.spool.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(
            f"STOWGATE_DATA is {str(settings.data)!r}, but must be a writable folder: "
            f"{error.strerror}"
        ) from error
    # Reports a bad file before the fork; each API process makes its own authenticator later.
    authenticator(settings)
    return settings


def _prepare(backends: Backends) -> None:
    """In an API process; where the store must not be used, the whole service ends."""
    try:
        backends.prepare()
    except StoreUnfit as error:
        click.echo(f"stowgate: {error}", err=True)
        sys.exit(Arbiter.WORKER_BOOT_ERROR)


def _say_stopping(apps: "list[Flask]") -> None:
    from api.main import READINESS

    for app in apps:
        app.extensions[READINESS].stop()
        _log.info(
            "draining: no new connections are accepted",
            uploads=app.extensions[EXTENSION].limiter.uploads,
        )


def _start(section: type[_Section]) -> _Section:
    _share_heaps()
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    settings = load(section)
    configure_logs(settings.log)
    for sentence in doubtful_variables(os.environ, ALL_SETTINGS):
        _log.warning(sentence)
    why = why_no_spans(os.environ)
    if why is not None:
        _log.warning(why)
    return settings


def _share_heaps() -> None:
    """Let all threads share two heaps (glibc, mallopt(3)).

    The default is eight heaps per core, which cannot reuse each other's freed memory. With many
    concurrent uploads that would double the memory.
    """
    with suppress(AttributeError):  # musl has one heap
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _say_where(settings: ApiSettings, url: str) -> None:
    _log.info("listening", url=url)
    rows = [("send DICOM to", f"{settings.public_url or url}/dicomweb/studies")]
    if settings.object_store == "folder":
        rows.append(("objects", str(settings.data / settings.bucket)))
    if settings.broker == "memory":
        rows.append(("workflow requests", str(settings.workflow_requests)))
    click.echo(f"Stowgate listens on {url}")
    for label, value in rows:
        click.echo(f"  {label:<18} {value}")
