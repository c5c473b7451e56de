"""The composition root of the API: the one place that knows which parts it is made of."""

from concurrent.futures import ThreadPoolExecutor

from flask import Flask
from prometheus_client import CollectorRegistry

from api.app import create_app
from api.ingest import Ingest, Limits
from api.stow import StowOptions
from shared.config import Settings
from shared.engines import Engines
from shared.health import Dependency
from shared.metrics import ApiMetrics
from shared.records import Records
from shared.vae import VaeRegistry


def compose(settings: Settings, engines: Engines, registry: CollectorRegistry) -> Flask:
    settings.spool.mkdir(parents=True, exist_ok=True)
    metrics = ApiMetrics(registry)
    records = Records(engines.state)
    ingest = Ingest(
        instances=engines.instances,
        records=records,
        announce=engines.announce,
        putters=ThreadPoolExecutor(settings.api_threads, thread_name_prefix="put"),
        spool_folder=settings.spool,
        limits=Limits(
            part_bytes=settings.max_part_bytes,
            parts=settings.max_parts,
            spool_memory_bytes=settings.spool_memory_bytes,
        ),
        metrics=metrics,
    )
    return create_app(
        ingest=ingest,
        vaes=VaeRegistry(engines.state),
        records=records,
        dependencies={
            "object_store": Dependency(engines.ping_stores, essential=True),
            "broker": Dependency(engines.publisher.ping, essential=False),
        },
        registry=registry,
        metrics=metrics,
        options=StowOptions(
            body_bytes=settings.max_body_bytes,
            idle_seconds=settings.idle_seconds,
            # Some threads stay free, so that health and status answer while uploads run.
            concurrent_uploads=max(1, settings.api_threads - 2),
            public_url=settings.public_url,
        ),
        trusted_proxies=settings.trusted_proxies,
    )
