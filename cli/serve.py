"""`stowgate run`, `stowgate api`, `stowgate worker`."""

import os
import shutil
import tempfile

import click
import structlog
from flask import Flask
from prometheus_client import CollectorRegistry

from api import server, wsgi
from shared.config import BadSetting, Settings, load_settings, unknown_variables
from shared.engines import Engines, open_engines
from shared.logs import configure_logs
from shared.metrics import MULTIPROCESS_FOLDER
from worker import main as worker_main


@click.command()
def run() -> None:
    """Run API and worker in one process: all that is needed on one machine."""
    settings = _start()
    listener = server.bind(settings.listen)
    host, port = listener.getsockname()[:2]
    url = f"http://{settings.listen._replace(host=host, port=port)}"
    _say_where(settings, url)
    embedded: list[tuple[worker_main.Worker, Engines]] = []

    def make_app() -> Flask:
        registry = CollectorRegistry()
        engines = open_engines(settings)
        app = wsgi.compose(settings, engines, registry)
        worker = worker_main.compose(settings, engines, registry)
        engines.prepare()
        worker.start()
        embedded.append((worker, engines))
        return app

    def on_exit() -> None:
        for worker, engines in embedded:
            worker.stop()
            engines.close()

    server.Server(
        listener, make_app, processes=1, threads=settings.api_threads, on_exit=on_exit
    ).run()


@click.command()
def api() -> None:
    """Run the HTTP front end alone; any number may run on one store and broker."""
    settings = _start()
    listener = server.bind(settings.listen)
    host, port = listener.getsockname()[:2]
    url = f"http://{settings.listen._replace(host=host, port=port)}"
    click.echo(f"Stowgate's API listens on {url}")
    opened: list[Engines] = []

    def make_app() -> Flask:
        engines = open_engines(settings)
        engines.prepare()
        opened.append(engines)
        return wsgi.compose(settings, engines, CollectorRegistry())

    def on_exit() -> None:
        for engines in opened:
            engines.close()

    if settings.api_processes > 1:
        # prometheus_client adds the processes' counts up by files in this folder.
        os.environ[MULTIPROCESS_FOLDER] = tempfile.mkdtemp(prefix="stowgate-metrics-")
    try:
        server.Server(
            listener,
            make_app,
            processes=settings.api_processes,
            threads=settings.api_threads,
            on_exit=on_exit,
        ).run()
    finally:
        shutil.rmtree(os.environ.get(MULTIPROCESS_FOLDER, ""), ignore_errors=True)


@click.command()
def worker() -> None:
    """Run the worker alone; any number may run on one store and broker."""
    worker_main.run(_start(), click.echo)


def _start() -> Settings:
    settings = load_settings()
    configure_logs(settings.log)
    log = structlog.get_logger()
    for sentence in unknown_variables(os.environ):
        log.warning(sentence)
    try:
        settings.spool.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(
            f"STOWGATE_DATA is {str(settings.data)!r}, but must be a folder that can be written: "
            f"{error.strerror}"
        ) from error
    return settings


def _say_where(settings: Settings, url: str) -> None:
    rows = [("send DICOM to", f"{url}/dicomweb/studies")]
    if settings.object_store == "folder":
        rows.append(("objects", str(settings.data / settings.bucket)))
    if settings.broker == "memory":
        rows.append(("workflow requests", str(settings.data / "workflow-requests")))
    click.echo(f"Stowgate listens on {url}")
    for label, value in rows:
        click.echo(f"  {label:<18} {value}")
