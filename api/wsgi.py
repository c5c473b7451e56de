"""The composition root of the API: the one place that knows which parts it is made of."""

from datetime import timedelta

from flask import Flask
from prometheus_client import CollectorRegistry

from api.announcements import Announcements
from api.app import create_app
from api.auth.authenticators import authenticator
from api.auth.own_hosts import OwnHosts
from api.confirmations import Confirmations
from api.idempotency import IdempotencyKeys
from api.ingest import Ingest
from api.payload_states import Payloads
from api.slots import EXTENSION, Slots
from api.stow import StoreTransaction, StowOptions
from api.upload import Limits, Uploads
from api.workflow_manager_api import WorkflowManagerApi
from shared.config import Settings
from shared.dicom.limits import StructureLimits
from shared.engines import Engines
from shared.ids import PayloadIds
from shared.metrics import ApiMetrics
from shared.records import Records
from shared.refusals import Refusals
from shared.threads import started_pool
from shared.vae import VaeRegistry

# They wait for the broker, whose deadline bounds how long.
_ANNOUNCERS = 4

# What they have in hand is in memory, so there are no more than keep a store busy.
_PUTTERS = 8

# With a sender that stalls, while others wait for its slot.
_PATIENCE_SECONDS = 5.0


def compose(settings: Settings, engines: Engines, registry: CollectorRegistry) -> Flask:
    metrics = ApiMetrics(registry)
    records = Records(engines.state)
    payload_ids = PayloadIds(settings.state_bucket)
    uploads = Uploads(
        engines.instances,
        started_pool(_PUTTERS, "put"),
        settings.spool,
        Limits(
            part_bytes=settings.max_part_bytes,
            parts=settings.max_parts,
            spool_memory_bytes=settings.spool_memory_bytes,
            min_free_bytes=settings.min_free_bytes,
            upload=timedelta(seconds=settings.max_upload_seconds),
            structure=StructureLimits(
                nested_sequences=settings.max_nested_sequences,
                elements=settings.max_elements,
                metadata_bytes=settings.max_metadata_bytes,
            ),
        ),
    )
    announcers = None if settings.broker == "memory" else started_pool(_ANNOUNCERS, "announce")
    confirmations = Confirmations(engines.sweep_cursor.confirm)
    confirmations.start()
    vaes = VaeRegistry(engines.state)
    slots = Slots(settings.concurrent_uploads, patience_seconds=_PATIENCE_SECONDS, metrics=metrics)
    store = StoreTransaction(
        ingest=Ingest(
            uploads=uploads,
            records=records,
            recorded=confirmations.recorded,
            metrics=metrics,
            mint=payload_ids.mint,
        ),
        uploads=uploads,
        announcements=Announcements(engines.announce, announcers, metrics),
        vaes=vaes,
        records=records,
        keys=IdempotencyKeys(
            engines.state,
            records,
            payload_ids.mint,
            lease=timedelta(seconds=settings.lease_seconds),
        ),
        slots=slots,
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
        own_hosts=OwnHosts(settings.public_url) if settings.is_for_this_machine else None,
        metrics_open=settings.metrics_open,
        vaes=vaes,
        payloads=Payloads(records, Refusals(engines.state), engines.instances),
        announce=engines.announce,
        workflow_manager=WorkflowManagerApi.from_settings(settings),
        dependencies=engines.dependencies(engines.publisher.ping),
        registry=registry,
        metrics=metrics,
        public_url=settings.public_url,
        trusted_proxies=settings.trusted_proxies,
        cors_origins=settings.cors_origins or (),
        cors_headers=settings.cors_headers or (),
    )
    app.extensions[EXTENSION] = slots
    return app
