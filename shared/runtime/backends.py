"""The adapters that the settings name, made once for a process."""

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
    "the state bucket is versioned: each listing passes over all that was ever removed, and so the "
    "relay becomes slower; set a lifecycle rule that removes noncurrent versions after a day, and "
    "expired delete markers"
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
    """`ping` raises a `StowgateError` when it is down. Without an essential one a service is
    unready; without another it is degraded, and catches up later."""

    ping: Callable[[], None]
    essential: bool


@dataclass(frozen=True)
class Backends:
    """`instances` is the payloads' bucket, `state` that of records and registry. `publisher`
    takes our own events, which go to `queue`, and `requests` those for the Workflow Manager, which
    may be large and keep no event waiting. `dead_letters` has those that it refused."""

    instances: ObjectStore
    state: ObjectStore
    sweep_cursor: SweepCursor
    queue: EventQueue
    publisher: EventPublisher
    consumer: EventConsumer
    requests: EventPublisher
    dead_letters: DeadLetterConsumer

    def announce(self, event: events.InstancesStored) -> None:
        """Tell a worker. Raises what `EventPublisher.publish` raises."""
        self.publisher.publish(self._message(event))

    def begin_announcement(self, event: events.InstancesStored) -> Publication:
        """The same without waiting for it. Raises what `EventPublisher.begin` raises."""
        return self.publisher.begin(self._message(event))

    def _message(self, event: events.InstancesStored) -> Message:
        return events.encode(event, self.queue.exchange, self.queue.routing_key)

    def dependencies(self, ping_broker: Callable[[], None]) -> dict[str, Dependency]:
        """What health tells of. Without a store nothing can be taken; all else is caught up."""
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
        """Create the buckets where they are missing, and have the sweep begin.

        A store that does not answer yet, or refuses, is no reason not to start: this goes on in the
        background until it succeeds, and meanwhile the service says that it is not ready.
        """
        try:
            self.instances.prepare()
            self.state.prepare()
            with suppress(CursorUnreadable):  # which each sweep says, and nothing else waits for
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
    """Connects to nothing yet.

    `store_threads` use the store at a time, and `openings` payloads are opened at a time.
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
