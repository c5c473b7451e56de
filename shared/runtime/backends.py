"""The adapters that the settings select, created once per process.

Those of S3 and RabbitMQ are imported where they are selected: minio and pika take a sixth of the
start, which a folder and events in memory do not need.
"""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias

import structlog

from shared import events
from shared.adapters.folder.publisher import FolderEventPublisher
from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.memory import MemoryBroker
from shared.adapters.queues import DeadLetterQueue, EventQueue, NoDeadLetters, TopicExchange
from shared.adapters.s3.verified_store import Verification, VerifiedObjectStore
from shared.errors import StoreUnfit, StowgateError
from shared.ids import PayloadIds
from shared.ports import (
    DeadLetterConsumer,
    EventConsumer,
    EventPublisher,
    ObjectStore,
    Publication,
)
from shared.runtime.measured import Calls, MeasuredEventPublisher, MeasuredObjectStore
from shared.runtime.tls_files import client_tls
from shared.runtime.tracing import NO_SPANS, Tracer
from shared.settings.services import CommonSettings
from shared.sweep_cursor import CursorUnreadable, SweepCursor

if TYPE_CHECKING:
    from shared.adapters.s3.store import MinioObjectStore

    # `cli/serve.py` imports this module before prometheus_client may be imported.
    from shared.runtime.metrics import BackendMetrics

_log = structlog.get_logger()

_PREPARE_AGAIN_SECONDS = 2.0

VERSIONED = (
    "the state bucket is versioned: removed objects slow down every listing, and so the relay; set "
    "a lifecycle rule that removes noncurrent versions after one day, and expired delete markers"
)


def _instances_stored(exchange: str) -> EventQueue:
    return EventQueue(
        exchange=exchange,
        routing_key="instances-stored",
        queue=f"{exchange}.instances-stored",
        dead_letter=f"{exchange}.dead-letter",
    )


@dataclass(frozen=True)
class Dependency:
    """`ping` raises a `StowgateError` when it is down. Without an essential one uploads are
    refused for now; without another a service is degraded, and catches up later."""

    ping: Callable[[], None]
    essential: bool


@dataclass(frozen=True)
class Backends:
    """`instances` is the payloads' bucket, `state` that of records and registry. `publisher`
    takes our own events, which go to `queue`, and `requests` those for the Workflow Manager, which
    may be large and keep no event waiting. `dead_letters` has those that it refused.
    `prepare_stores` creates missing buckets and verifies both; it raises `StoreUnfit`. `keys_end`
    returns when the temporary keys of the object store expire, None if they do not."""

    instances: ObjectStore
    state: ObjectStore
    sweep_cursor: SweepCursor
    queue: EventQueue
    publisher: EventPublisher
    consumer: EventConsumer
    requests: EventPublisher
    dead_letters: DeadLetterConsumer
    prepare_stores: Callable[[], None]
    keys_end: Callable[[], datetime | None]
    tracer: Tracer = NO_SPANS

    def announce(self, event: events.InstancesStored) -> Publication:
        """Publish the event without waiting. Raises what `EventPublisher.begin` raises."""
        message = events.encode(event, self.queue.exchange, self.queue.routing_key)
        with self.tracer.publishing(message, event.traceparent) as traced:
            return self.publisher.begin(traced)

    def dependencies(self, ping_broker: Callable[[], None]) -> dict[str, Dependency]:
        """Return the dependencies that health reports. Only the object store is essential."""
        return {
            "object_store": Dependency(self._ping_stores, essential=True),
            "free_space": Dependency(self.instances.check_room, essential=False),
            "broker": Dependency(ping_broker, essential=False),
            "workflow_manager_queue": Dependency(self.requests.ping, essential=False),
            "workflow_manager_refusals": Dependency(self.dead_letters.ping, essential=False),
        }

    def _ping_stores(self) -> None:
        self.instances.ping()
        self.state.ping()

    def prepare(self) -> None:
        """Create the buckets where they are missing, verify the store, and have the sweep begin.

        If the store does not answer yet, or refuses, the service starts, and this is repeated in
        the background until it succeeds; nothing is stored before. Raises `StoreUnfit` if the store
        answers and must not be used. If that is found in the background, it stops the process, and
        the next start reports why.
        """
        try:
            self._prepare()
        except StoreUnfit:
            raise
        except StowgateError as error:
            _log.warning("object store not ready; trying again", error=str(error))
            self._prepare_again(_PREPARE_AGAIN_SECONDS)

    def _prepare(self) -> None:
        self.prepare_stores()
        with suppress(CursorUnreadable):  # which each sweep says, and nothing else waits for
            self.sweep_cursor.read()
        _log.info("object store ready")
        if self.state.keeps_removed():
            _log.warning(VERSIONED)

    def _prepare_again(self, pause_seconds: float) -> None:
        def prepare() -> None:
            try:
                self.prepare()
            except StoreUnfit as error:
                _log.critical("object store unfit; stopping", error=str(error))
                os.kill(os.getpid(), signal.SIGTERM)

        timer = threading.Timer(pause_seconds, prepare)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        self.consumer.close()
        self.dead_letters.close()
        self.publisher.close()
        self.requests.close()
        self.tracer.close()


def open_backends(
    settings: CommonSettings,
    *,
    store_threads: int,
    openings: int = 1,
    metrics: "BackendMetrics | None" = None,
    tracer: Tracer = NO_SPANS,
) -> Backends:
    """Return the adapters, which connect at their first use.

    `store_threads` is the number of concurrent users of the store, `openings` that of payloads that
    are processed concurrently. With `metrics` the calls of both services are measured. `tracer` is
    closed with the adapters.
    """
    backends = replace(_open_backends(settings, store_threads, openings), tracer=tracer)
    if metrics is None:
        return backends
    store_calls, broker_calls = (
        Calls(metrics.store_call_seconds),
        Calls(metrics.broker_call_seconds),
    )
    return replace(
        backends,
        instances=MeasuredObjectStore(backends.instances, store_calls),
        state=MeasuredObjectStore(backends.state, store_calls),
        publisher=MeasuredEventPublisher(backends.publisher, broker_calls, "publish_event"),
        requests=MeasuredEventPublisher(backends.requests, broker_calls, "publish_request"),
    )


def _open_backends(settings: CommonSettings, store_threads: int, openings: int) -> Backends:
    queue = _instances_stored(settings.event_exchange)
    instances, state, prepare_stores, keys_end = _stores(settings, store_threads)
    sweep_cursor = SweepCursor(
        state=state, instances=instances, payload_ids=PayloadIds(settings.state_bucket)
    )
    if settings.broker == "memory":
        broker = MemoryBroker(queue)
        return Backends(
            instances=instances,
            state=state,
            sweep_cursor=sweep_cursor,
            queue=queue,
            publisher=broker.publisher(),
            consumer=broker.consumer(
                queue, concurrency=openings, close_seconds=settings.payloads_end_seconds
            ),
            requests=FolderEventPublisher(settings.workflow_requests),
            dead_letters=NoDeadLetters(),
            prepare_stores=prepare_stores,
            keys_end=keys_end,
        )
    from shared.adapters.rabbitmq.dead_letters import RabbitDeadLetterConsumer
    from shared.adapters.rabbitmq.publisher import RabbitEventConsumer, RabbitEventPublisher

    password = settings.current("broker_password") if settings.broker_password else None
    tls = client_tls(
        "STOWGATE_BROKER_",
        ca=settings.broker_ca,
        certificate=settings.broker_client_certificate,
        key=settings.broker_client_key,
    ).context
    return Backends(
        instances=instances,
        state=state,
        sweep_cursor=sweep_cursor,
        queue=queue,
        publisher=RabbitEventPublisher(
            settings.broker,
            name="stowgate events",
            topology=[queue],
            confirm_seconds=settings.broker_confirm_seconds,
            password=password,
            tls=tls,
        ),
        consumer=RabbitEventConsumer(
            settings.broker,
            queue=queue,
            concurrency=openings,
            answer_seconds=settings.broker_confirm_seconds,
            close_seconds=settings.payloads_end_seconds,
            password=password,
            tls=tls,
        ),
        requests=RabbitEventPublisher(
            settings.broker,
            name="stowgate requests",
            topology=[TopicExchange(settings.workflow_manager_exchange)],
            expected_queue=settings.workflow_manager_queue,
            confirm_seconds=settings.broker_confirm_seconds,
            password=password,
            tls=tls,
        ),
        dead_letters=RabbitDeadLetterConsumer(
            settings.broker,
            queue=DeadLetterQueue(
                exchange=settings.workflow_manager_dead_letter_exchange,
                routing_key=settings.workflow_manager_routing_key,
                queue=f"{settings.event_exchange}.refusals",
                dead_letter=queue.dead_letter,
            ),
            answer_seconds=settings.broker_confirm_seconds,
            close_seconds=settings.payloads_end_seconds,
            password=password,
            tls=tls,
        ),
        prepare_stores=prepare_stores,
        keys_end=keys_end,
    )


def _stores(
    settings: CommonSettings, threads: int
) -> tuple[ObjectStore, ObjectStore, Callable[[], None], Callable[[], datetime | None]]:
    """The buckets of the instances and of the state, what prepares both, and when their keys end.

    A folder is not verified: its lock is the kernel's, and nothing that one machine does shows what
    another machine does on the same folder.
    """
    instances, state = open_stores(settings, threads)
    if isinstance(instances, FolderObjectStore) or isinstance(state, FolderObjectStore):

        def prepare() -> None:
            instances.prepare()
            state.prepare()

        return instances, state, prepare, lambda: None
    verification = Verification(instances=instances, state=state)
    return (
        VerifiedObjectStore(instances, verification),
        VerifiedObjectStore(state, verification),
        verification.run,
        instances.keys_end,
    )


_Stores: TypeAlias = (
    "tuple[FolderObjectStore, FolderObjectStore] | tuple[MinioObjectStore, MinioObjectStore]"
)


def open_stores(settings: CommonSettings, threads: int) -> _Stores:
    """The buckets of the instances and of the state, as they are, verified or not."""
    if settings.object_store == "folder":
        return _folder(settings, settings.bucket), _folder(settings, settings.state_bucket)
    from shared.adapters.s3.credentials import iam_credentials, static_credentials
    from shared.adapters.s3.store import MinioObjectStore, brief_pool

    tls = client_tls(
        "STOWGATE_OBJECT_STORE_",
        ca=settings.object_store_ca,
        certificate=settings.object_store_client_certificate,
        key=settings.object_store_client_key,
    ).context
    if settings.object_store_credentials == "iam":
        credentials = iam_credentials(
            brief_pool(tls, 1),
            url=settings.object_store_credentials_url,
            region=settings.object_store_region,
        )
    else:
        credentials = static_credentials(
            settings.current("object_store_access_key"),
            settings.current("object_store_secret_key"),
            settings.current("object_store_session_token"),
        )

    def connect(bucket: str) -> MinioObjectStore:
        return MinioObjectStore.connect(
            settings.object_store,
            credentials=credentials,
            region=settings.object_store_region,
            bucket=bucket,
            threads=threads,
            tls=tls,
        )

    return connect(settings.bucket), connect(settings.state_bucket)


def _folder(settings: CommonSettings, bucket: str) -> FolderObjectStore:
    return FolderObjectStore(settings.data / bucket, min_free_bytes=settings.min_free_bytes)
