"""The composition root of the API, which creates and connects all its parts."""

from datetime import timedelta

from flask import Flask
from prometheus_client import CollectorRegistry

from api.admission.concurrency import EXTENSION, Admission, UploadLimiter
from api.admission.small_bodies import SmallBodies
from api.admission.watchdog import Watchdog
from api.app import create_app
from api.auth.authenticators import authenticator as authenticator_of
from api.auth.guard import may
from api.http.routes import Scope
from api.page.activity import Activity
from api.page.rendering import Pages
from api.page.views import page_views
from api.payloads.states import Payloads
from api.payloads.views import payload_views
from api.payloads.workflow_manager_api import WorkflowManagerApi
from api.settings import ApiSettings
from api.stow.announcements import Announcements
from api.stow.confirmations import Confirmations
from api.stow.idempotency import IdempotencyKeys
from api.stow.ingest import Ingest
from api.stow.upload import Uploads
from api.stow.view import StoreTransaction, stow_views
from api.vae.registry import VaeRegistry
from api.vae.views import vae_views
from shared.adapters.queues import Published
from shared.events import InstancesStored
from shared.ids import PayloadIds
from shared.ports import Publication
from shared.record_store import Records
from shared.records import first_lease
from shared.refusals import Refusals
from shared.runtime.backends import Backends
from shared.runtime.facts import Facts
from shared.runtime.health import Readiness, health_views
from shared.runtime.metrics import ApiMetrics, HealthMetrics
from shared.runtime.threads import started_pool

READINESS = "stowgate.readiness"
"""Key of the application's `Readiness` among its extensions, which a stop calls."""

# Each thread holds data in memory, so there are just enough to keep a store busy.
_PUT_THREADS = 8

# How long a sender may stall while others wait for its slot.
_PATIENCE_SECONDS = 5.0


def compose(
    settings: ApiSettings,
    backends: Backends,
    registry: CollectorRegistry,
    *,
    events_reach_workers: bool = True,
) -> Flask:
    """Create the application, with its `Admission` under `EXTENSION` for the server.

    If events do not reach any worker, none are published, as they would only fill memory, and
    records have no first lease, for which the relay would wait.
    """
    announce = backends.announce if events_reach_workers else _leave_to_relay
    # So that the first events find a connection.
    backends.publisher.start()
    metrics = ApiMetrics(registry)
    announcements = Announcements(announce, metrics)
    records = Records(backends.state)
    payload_ids = PayloadIds(settings.state_bucket)
    uploads = Uploads(
        backends.instances,
        started_pool(_PUT_THREADS, "put"),
        settings,
    )
    confirmations = Confirmations(backends.sweep_cursor.confirm)
    confirmations.start()
    vaes = VaeRegistry(backends.state)
    admission = Admission(
        UploadLimiter(
            settings.concurrent_uploads, patience_seconds=_PATIENCE_SECONDS, metrics=metrics
        ),
        Watchdog(),
    )
    store = StoreTransaction(
        ingest=Ingest(
            uploads=uploads,
            records=records,
            recorded=confirmations.recorded,
            metrics=metrics,
            mint=payload_ids.mint,
            tracer=backends.tracer,
            first_lease=(
                first_lease(timedelta(seconds=settings.lease_seconds))
                if events_reach_workers
                else timedelta()
            ),
        ),
        uploads=uploads,
        announcements=announcements,
        vaes=vaes,
        records=records,
        keys=IdempotencyKeys(
            backends.state,
            records,
            payload_ids.mint,
            lease=timedelta(seconds=settings.lease_seconds),
        ),
        admission=admission,
        settings=settings,
    )
    authenticator = authenticator_of(settings)
    readiness = Readiness(backends.dependencies(backends.publisher.ping), HealthMetrics(registry))
    refusals = Refusals(backends.state)
    payloads = Payloads(records, refusals, backends.instances, announcements.make)
    workflow_manager = WorkflowManagerApi.from_settings(settings)
    bodies = SmallBodies(admission.watchdog)
    pages = Pages(authenticator.scheme)
    app = create_app(
        settings,
        views={
            **stow_views(store, settings.public_url),
            **vae_views(vaes, settings.public_url, bodies),
            **payload_views(payloads, workflow_manager),
            **page_views(
                pages,
                activity=Activity(records, refusals),
                payloads=payloads,
                vaes=vaes,
                readiness=readiness,
                workflow_manager=workflow_manager,
                bodies=bodies,
                settings=settings,
            ),
            **health_views(
                readiness,
                registry,
                _facts(settings, backends).registry(),
                lambda: may(authenticator, Scope.READ),
            ),
        },
        pages=pages,
        authenticator=authenticator,
        metrics=metrics,
        tracer=backends.tracer,
    )
    app.extensions[EXTENSION] = admission
    app.extensions[READINESS] = readiness
    return app


def _leave_to_relay(_: InstancesStored) -> Publication:
    """The relay of a worker on the same object store finds the record."""
    return Published()


def _facts(settings: ApiSettings, backends: Backends) -> Facts:
    return Facts(
        settings,
        backends.keys_end,
        certificates={"api": settings.tls_certificate},
        disks={"spool": settings.spool},
        max_uploads=settings.api_processes * settings.concurrent_uploads,
    )
