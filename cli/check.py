"""`stowgate check`: reads every setting, tries every dependency, and reports each failure."""

import errno
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import click

from api.auth.authenticators import authenticator
from api.payloads.workflow_manager_api import WorkflowManagerApi
from api.server.tls import server_tls
from api.settings import ApiSettings, guard_listen
from api.stow.spool import check_room
from cli.client import check_client_ca
from cli.settings import ALL_SETTINGS, ClientSettings
from shared.adapters.s3.conformance import check_payload_bucket, check_state_bucket
from shared.errors import StoreUnavailable, StowgateError
from shared.ports import ObjectStore
from shared.runtime.backends import VERSIONED, Backends, open_backends, open_stores
from shared.runtime.listen import bind
from shared.runtime.logs import configure_logs
from shared.settings.loader import BadSetting, doubtful_variables, load
from shared.settings.parsers import Address
from worker.settings import WorkerSettings


@click.command(short_help="Read every setting and try every dependency.")
def check() -> None:
    """Read every setting and try every dependency; create missing buckets.

    Exits with 1 if a check fails.
    """
    for sentence in doubtful_variables(os.environ, ALL_SETTINGS):
        click.echo(f"warning   {sentence}")
    settings, of_worker, of_client = load(ApiSettings), load(WorkerSettings), load(ClientSettings)
    # The failures are reported below, so the adapters' log lines would only repeat them.
    configure_logs(settings.log, logging.CRITICAL)
    click.echo("ok        settings")
    backends = open_backends(settings, store_threads=2)
    failed = 0
    for name, attempt in _attempts(settings, of_worker, of_client, backends):
        try:
            attempt()
        except (StowgateError, BadSetting) as error:
            failed += 1
            click.echo(f"FAIL      {name}: {error}")
        else:
            click.echo(f"ok        {name}")
    if backends.state.keeps_removed():
        click.echo(f"warning   bucket {settings.state_bucket}: {VERSIONED}")
    backends.close()
    sys.exit(1 if failed else 0)


def _attempts(
    settings: ApiSettings, of_worker: WorkerSettings, of_client: ClientSettings, backends: Backends
) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "STOWGATE_LISTEN", lambda: _try_address(settings.listen, "STOWGATE_LISTEN")
    worker = of_worker.worker_listen
    yield "STOWGATE_WORKER_LISTEN", lambda: _try_address(worker, "STOWGATE_WORKER_LISTEN")
    yield "authentication", lambda: _try_auth(settings)
    if settings.tls_certificate is not None:
        yield "TLS certificate and key", lambda: _try_tls(settings)
    if of_client.client_ca is not None:
        yield "STOWGATE_CLIENT_CA", lambda: check_client_ca(of_client)
    yield "spool", lambda: _try_spool(settings)
    instances, state = open_stores(settings, threads=2)
    yield f"bucket {settings.bucket}", lambda: _try_bucket(instances, check_payload_bucket)
    yield f"bucket {settings.state_bucket}", lambda: _try_bucket(state, check_state_bucket)
    yield "free space", instances.check_room
    yield "broker", backends.publisher.ping
    yield "queue of the Workflow Manager", backends.requests.ping
    yield "refusals of the Workflow Manager", backends.dead_letters.ping
    workflow_manager = WorkflowManagerApi.from_settings(settings)
    if workflow_manager is not None:
        yield "API of the Workflow Manager", workflow_manager.ping


def _try_address(address: Address, variable: str) -> None:
    """Accept an address in use: Stowgate itself may be listening there."""
    try:
        bind(address, variable).close()
    except BadSetting as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno != errno.EADDRINUSE:
            raise


def _try_auth(settings: ApiSettings) -> None:
    guard_listen(settings)
    authenticator(settings).ping()


def _try_tls(settings: ApiSettings) -> None:
    server_tls(settings)


def _try_spool(settings: ApiSettings) -> None:
    try:
        settings.spool.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.spool) as file:
            file.write(b"stowgate")
    except OSError as error:
        raise StoreUnavailable(f"{settings.spool} is not writable: {error.strerror}") from error
    check_room(settings.spool, settings.min_free_bytes)


def _try_bucket(store: ObjectStore, check: Callable[[ObjectStore], None]) -> None:
    store.prepare()
    check(store)
