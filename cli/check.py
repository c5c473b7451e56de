"""`stowgate check`: reads every setting, tries every engine, and says in words what is wrong."""

import errno
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

import click

from api.auth.authenticators import authenticator
from api.tls import server_tls
from cli.http import check_client_ca
from shared.config import (
    Address,
    BadSetting,
    Settings,
    guard_listen,
    load_settings,
    unknown_variables,
)
from shared.engines import Engines, open_engines, open_stores
from shared.errors import StowgateError
from shared.listen import bind
from shared.logs import configure_logs
from shared.ports import ObjectStore
from shared.store_conformance import check_payload_bucket, check_state_bucket


class _Wrong(Exception):
    """One finding, in words."""


@click.command(short_help="Read every setting and try every engine.")
def check() -> None:
    """Read every setting and try every engine, creating buckets that are missing.

    Exits with 1 when anything is wrong.
    """
    for sentence in unknown_variables(os.environ):
        click.echo(f"warning   {sentence}")
    settings = load_settings()
    # What the adapters have to say, the findings say in their own words.
    configure_logs(settings.log, logging.CRITICAL)
    click.echo("ok        settings")
    engines = open_engines(settings)
    wrong = 0
    for name, attempt in _attempts(settings, engines):
        try:
            attempt()
        except (_Wrong, StowgateError, BadSetting) as error:
            wrong += 1
            click.echo(f"wrong     {name}: {error}")
        else:
            click.echo(f"ok        {name}")
    engines.close()
    sys.exit(1 if wrong else 0)


def _attempts(settings: Settings, engines: Engines) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "STOWGATE_LISTEN", lambda: _try_address(settings.listen, "STOWGATE_LISTEN")
    worker = settings.worker_listen
    yield "STOWGATE_WORKER_LISTEN", lambda: _try_address(worker, "STOWGATE_WORKER_LISTEN")
    yield "who may enter", lambda: _try_auth(settings)
    if settings.tls_certificate is not None:
        yield "TLS certificate and key", lambda: _try_tls(settings)
    if settings.client_ca is not None:
        yield "STOWGATE_CLIENT_CA", lambda: check_client_ca(settings)
    yield "spool", lambda: _try_spool(settings)
    instances, state = open_stores(settings)
    yield f"bucket {settings.bucket}", lambda: _try_bucket(instances, check_payload_bucket)
    yield f"bucket {settings.state_bucket}", lambda: _try_bucket(state, check_state_bucket)
    yield "free space", instances.check_room
    yield "broker", engines.publisher.ping
    yield "queue of the Workflow Manager", engines.requests.ping


def _try_address(address: Address, variable: str) -> None:
    """One that is taken is right all the same: what took it may be what is checked."""
    try:
        bind(address, variable).close()
    except BadSetting as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno != errno.EADDRINUSE:
            raise


def _try_auth(settings: Settings) -> None:
    guard_listen(settings)
    authenticator(settings).ping()


def _try_tls(settings: Settings) -> None:
    server_tls(settings)


def _try_spool(settings: Settings) -> None:
    try:
        settings.spool.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.spool) as file:
            file.write(b"stowgate")
        free = shutil.disk_usage(settings.spool).free
    except OSError as error:
        raise _Wrong(f"{settings.spool} cannot be written: {error.strerror}") from error
    if free < settings.min_free_bytes:
        raise _Wrong(
            f"{settings.spool} has {free} bytes free, below STOWGATE_MIN_FREE_BYTES of "
            f"{settings.min_free_bytes}: uploads are refused"
        )


def _try_bucket(store: ObjectStore, check: Callable[[ObjectStore], None]) -> None:
    store.prepare()
    check(store)
