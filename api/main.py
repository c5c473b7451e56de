"""The composition root of the API, which creates and connects all its parts."""

from datetime import timedelta

from flask import Flask
from prometheus_client import CollectorRegistry

from api.admission.concurrency import EXTENSION, Admission, UploadLimiter
from api.admission.watchdog import Watchdog
from api.app import create_app
from api.auth.authenticators import authenticator
from api.auth.own_hosts import OwnHosts
from api.payloads.states import Payloads
from api.payloads.workflow_manager_api import WorkflowManagerApi
from api.settings import ApiSettings
from api.stow.announcements import Announcements
from api.stow.confirmations import Confirmations
from api.stow.idempotency import IdempotencyKeys
from api.stow.ingest import Ingest
from api.stow.upload import Limits, Uploads
from api.stow.view import StoreTransaction, StowOptions
from api.vae.registry import VaeRegistry
from shared.ids import PayloadIds
from shared.record_store import Records
from shared.refusals import Refusals
from shared.runtime.backends import Backends
from shared.runtime.metrics import ApiMetrics
from shared.runtime.threads import started_pool

# These threads wait for the broker, which has a deadline.
_ANNOUNCE_THREADS = 4

# Each thread holds data in memory, so there are just enough to keep a store busy.
_PUT_THREADS = 8

# How long a sender may stall while others wait for its slot.
_PATIENCE_SECONDS = 5.0


def compose(settings: ApiSettings, backends: Backends, registry: CollectorRegistry) -> Flask:
    """Create the application, with its `Admission` under `EXTENSION` for the server."""
    metrics = ApiMetrics(registry)
    records = Records(backends.state)
    payload_ids = PayloadIds(settings.state_bucket)
    uploads = Uploads(
        backends.instances,
        started_pool(_PUT_THREADS, "put"),
        settings.spool,
        Limits(
            part_bytes=settings.max_part_bytes,
            parts=settings.max_parts,
            spool_memory_bytes=settings.spool_memory_bytes,
            min_free_bytes=settings.min_free_bytes,
            upload=timedelta(seconds=settings.max_upload_seconds),
            structure=settings.structure_limits,
        ),
    )
    announcers = (
        None if settings.broker == "memory" else started_pool(_ANNOUNCE_THREADS, "announce")
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
        ),
        uploads=uploads,
        announcements=Announcements(backends.announce, announcers, metrics),
        vaes=vaes,
        records=records,
        keys=IdempotencyKeys(
            backends.state,
            records,
            payload_ids.mint,
            lease=timedelta(seconds=settings.lease_seconds),
        ),
        admission=admission,
        options=StowOptions(
            body_bytes=settings.max_body_bytes,
            part_header_bytes=settings.max_part_header_bytes,
            idle_seconds=settings.idle_seconds,
            upload_seconds=settings.max_upload_seconds,
            posts_per_minute=settings.rate_per_sender,
            public_url=settings.public_url,
            archive_url=settings.retrieve_url,
        ),
    )
    app = create_app(
        store=store,
        authenticator=authenticator(settings),
        watchdog=admission.watchdog,
        own_hosts=OwnHosts(settings.public_url) if settings.is_for_this_machine else None,
        metrics_open=settings.metrics_open,
        vaes=vaes,
        payloads=Payloads(records, Refusals(backends.state), backends.instances),
        announce=backends.announce,
        workflow_manager=WorkflowManagerApi.from_settings(settings),
        dependencies=backends.dependencies(backends.publisher.ping),
        registry=registry,
        metrics=metrics,
        public_url=settings.public_url,
        trusted_proxies=settings.trusted_proxies,
        cors_origins=settings.cors_origins or (),
        cors_headers=settings.cors_headers or (),
    )
    app.extensions[EXTENSION] = admission
    return app
