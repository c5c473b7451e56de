"""The adapters that the settings select, created once per process."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from shared import events
from shared.adapters.folder.publisher import FolderEventPublisher
from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.memory import MemoryBroker
from shared.adapters.queues import DeadLetterQueue, EventQueue, NoDeadLetters, TopicExchange
from shared.adapters.rabbitmq.dead_letters import RabbitDeadLetterConsumer
from shared.adapters.rabbitmq.publisher import RabbitEventConsumer, RabbitEventPublisher
from shared.adapters.s3.store import MinioObjectStore
from shared.errors import BrokerUnavailable, StowgateError
from shared.ids import PayloadIds
from shared.ports import (
    DeadLetterConsumer,
    EventConsumer,
    EventPublisher,
    Message,
    ObjectStore,
    Publication,
)
from shared.settings.services import CommonSettings
from shared.sweep_cursor import CursorUnreadable, SweepCursor

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
    """`ping` raises a `StowgateError` if the dependency is down. The service is then unready if it
    is essential, and otherwise degraded: it catches up later."""

    ping: Callable[[], None]
    essential: bool


@dataclass(frozen=True)
class Backends:
    """The adapters of a process.

    `instances` is the payloads' bucket, `state` that of records and registry. `publisher` sends
    Stowgate's events to `queue`. `requests` sends workflow requests, which may be large and must
    not delay events. `dead_letters` receives the requests that the Workflow Manager refused."""

    instances: ObjectStore
    state: ObjectStore
    sweep_cursor: SweepCursor
    queue: EventQueue
    publisher: EventPublisher
    consumer: EventConsumer
    requests: EventPublisher
    dead_letters: DeadLetterConsumer

    def announce(self, event: events.InstancesStored) -> None:
        """Publish the event and wait. Raises what `EventPublisher.publish` raises."""
        self.publisher.publish(self._message(event))

    def begin_announcement(self, event: events.InstancesStored) -> Publication:
        """Publish the event without waiting. Raises what `EventPublisher.begin` raises."""
        return self.publisher.begin(self._message(event))

    def _message(self, event: events.InstancesStored) -> Message:
        return events.encode(event, self.queue.exchange, self.queue.routing_key)

    def dependencies(self, ping_broker: Callable[[], None]) -> dict[str, Dependency]:
        """Return the dependencies that health reports. Only the object store is essential."""
        return {
            "object_store": Dependency(self._ping_stores, essential=True),
            "free_space": Dependency(self.instances.check_room, essential=False),
            "broker": Dependency(ping_broker, essential=False),
            "workflow_manager_queue": Dependency(self._ping_requests, essential=False),
            "workflow_manager_refusals": Dependency(self.dead_letters.ping, essential=False),
        }

    def _ping_requests(self) -> None:
        self.requests.ping()
        overdue = self.requests.overdue
        if overdue is not None:
            raise BrokerUnavailable(overdue)

    def _ping_stores(self) -> None:
        self.instances.ping()
        self.state.ping()

    def prepare(self) -> None:
        """Create missing buckets and the sweep's cursor.

        If the store fails, the service still starts and reports that it is not ready; this is
        repeated in the background until it succeeds.
        """
        try:
            self.instances.prepare()
            self.state.prepare()
            with suppress(CursorUnreadable):  # each sweep reports it, and nothing else needs it
                self.sweep_cursor.read()
            if self.state.keeps_removed():
                _log.warning(VERSIONED)
        except StowgateError as error:
            _log.warning("object store not ready; trying again", error=str(error))
            timer = threading.Timer(_PREPARE_AGAIN_SECONDS, self.prepare)
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        self.consumer.close()
        self.dead_letters.close()
        self.publisher.close()
        self.requests.close()


def open_backends(settings: CommonSettings, *, store_threads: int, openings: int = 1) -> Backends:
    """Return the adapters, which connect at their first use.

    `store_threads` is the number of concurrent users of the store, `openings` that of payloads that
    are processed concurrently.
    """
    queue = _instances_stored(settings.event_exchange)
    instances, state = (
        _store(settings, name, store_threads) for name in (settings.bucket, settings.state_bucket)
    )
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
        )
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
        ),
        consumer=RabbitEventConsumer(
            settings.broker,
            queue=queue,
            concurrency=openings,
            answer_seconds=settings.broker_confirm_seconds,
            close_seconds=settings.payloads_end_seconds,
        ),
        requests=RabbitEventPublisher(
            settings.broker,
            name="stowgate requests",
            topology=[TopicExchange(settings.workflow_manager_exchange)],
            expected_queue=settings.workflow_manager_queue,
            confirm_seconds=settings.broker_confirm_seconds,
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
        ),
    )


def _store(settings: CommonSettings, bucket: str, threads: int) -> ObjectStore:
    if settings.object_store == "folder":
        return FolderObjectStore(settings.data / bucket, min_free_bytes=settings.min_free_bytes)
    return MinioObjectStore.connect(
        settings.object_store,
        access_key=settings.object_store_access_key or "",
        secret_key=settings.object_store_secret_key or "",
        region=settings.object_store_region,
        bucket=bucket,
        threads=threads,
    )
