"""What the tests of event brokers share."""

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import pika
import pika.frame

from shared.adapters.memory import MemoryBroker
from shared.adapters.queues import EventQueue, TopicExchange
from shared.adapters.rabbitmq.publisher import RabbitEventConsumer, RabbitEventPublisher
from shared.errors import BrokerUnavailable, Unroutable
from shared.ports import EventConsumer, EventPublisher, Message, ReceivedMessage

R = TypeVar("R")


PATIENCE_SECONDS = 30.0


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not within the test's patience"
        time.sleep(0.01)


def within_patience(call: Callable[[], R]) -> R:
    """Fail instead of hanging if `call` never returns."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result(PATIENCE_SECONDS)
    finally:
        pool.shutdown(wait=False)


class Handled:
    """A handler that keeps the events, and can run a callback for each."""

    def __init__(self, then: Callable[[bytes], object] = lambda _: None) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.redelivered: list[bool] = []
        self._then = then

    def __call__(self, message: ReceivedMessage) -> None:
        self.headers.append(message.headers)
        self.redelivered.append(message.redelivered)
        self.bodies.append(message.body)
        self._then(message.body)


class Broker(Protocol):
    queue: EventQueue

    def publisher(self) -> EventPublisher: ...

    def consumer(self, concurrency: int = 1, close_seconds: float = 10.0) -> EventConsumer: ...

    def dead_letters(self) -> list[bytes]: ...

    def message(self, body: bytes = b"{}", routing_key: str | None = None) -> Message: ...


def random_queue() -> EventQueue:
    name = f"stowgate-test-{secrets.token_hex(8)}"
    return EventQueue(
        exchange=name, routing_key="event", queue=f"{name}.events", dead_letter=f"{name}.dead"
    )


def message_for(queue: EventQueue, body: bytes = b"{}", routing_key: str | None = None) -> Message:
    return Message(
        exchange=queue.exchange,
        routing_key=queue.routing_key if routing_key is None else routing_key,
        body=body,
        message_id=secrets.token_hex(16),
        correlation_id="7a1d2c54-9a53-4a52-b5a7-19e4a3f1a001",
        type="SomethingHappened",
        app_id="stowgate-test",
        timestamp=1_700_000_000,
    )


class InMemory:
    def __init__(self, closing: contextlib.ExitStack) -> None:
        self.queue = random_queue()
        self._closing = closing
        self._broker = MemoryBroker(self.queue)

    def publisher(self) -> EventPublisher:
        publisher = self._broker.publisher()
        self._closing.callback(publisher.close)
        return publisher

    def consumer(self, concurrency: int = 1, close_seconds: float = 10.0) -> EventConsumer:
        consumer = self._broker.consumer(
            self.queue, concurrency=concurrency, close_seconds=close_seconds
        )
        self._closing.callback(consumer.close)
        return consumer

    def dead_letters(self) -> list[bytes]:
        return [letter.message.body for letter in self._broker.dead_letters(self.queue)]

    def message(self, body: bytes = b"{}", routing_key: str | None = None) -> Message:
        return message_for(self.queue, body, routing_key)


class Rabbit:
    """`url` is the broker itself; the adapters may be sent through a proxy instead."""

    def __init__(self, url: str, closing: contextlib.ExitStack) -> None:
        self.url = url
        self.queue = random_queue()
        self.foreign = TopicExchange(f"{self.queue.exchange}.foreign")
        self._closing = closing
        connection = pika.BlockingConnection(pika.URLParameters(url))
        closing.callback(connection.close)
        self.channel = connection.channel()
        closing.callback(self._delete_everything)

    def publisher(
        self,
        url: str | None = None,
        confirm_seconds: float = 10,
        answer_seconds: float = 10,
        expected_queue: str | None = None,
    ) -> RabbitEventPublisher:
        publisher = RabbitEventPublisher(
            url or self.url,
            topology=[self.queue, self.foreign],
            expected_queue=expected_queue,
            confirm_seconds=confirm_seconds,
            answer_seconds=answer_seconds,
        )
        self._closing.callback(publisher.close)
        return publisher

    def consumer(
        self,
        concurrency: int = 1,
        close_seconds: float = 10.0,
        url: str | None = None,
        answer_seconds: float = 10,
    ) -> EventConsumer:
        consumer = RabbitEventConsumer(
            url or self.url,
            queue=self.queue,
            concurrency=concurrency,
            answer_seconds=answer_seconds,
            close_seconds=close_seconds,
        )
        self._closing.callback(consumer.close)
        return consumer

    def dead_letters(self) -> list[bytes]:
        bodies = []
        while (got := self.channel.basic_get(self.queue.dead_letter))[0] is not None:
            bodies.append(got[2])
        self.channel.basic_nack(multiple=True, requeue=True)
        return bodies

    def message(self, body: bytes = b"{}", routing_key: str | None = None) -> Message:
        return message_for(self.queue, body, routing_key)

    def foreign_message(self) -> Message:
        return message_for(
            EventQueue(self.foreign.name, "some.request", "none of ours", "none of ours")
        )

    @property
    def foreign_queue(self) -> str:
        return f"{self.foreign.name}.queue"

    @property
    def other_queue(self) -> str:
        """A consumer that receives every event."""
        return f"{self.foreign.name}.audit"

    def bind_foreign_queue(self, **arguments: object) -> str:
        self.channel.exchange_declare(self.foreign.name, "topic", durable=True)
        self.channel.queue_declare(self.foreign_queue, durable=True, arguments=arguments)
        self.channel.queue_bind(self.foreign_queue, self.foreign.name, routing_key="some.request")
        return self.foreign_queue

    def waiting(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)

    def _delete_everything(self) -> None:
        own = (self.queue.queue, self.queue.dead_letter)
        for queue in (*own, self.foreign_queue, self.other_queue):
            self.channel.queue_delete(queue)
        for exchange in (self.queue.exchange, self.queue.dead_letter, self.foreign.name):
            self.channel.exchange_delete(exchange)
        self.channel.exchange_delete(self.other_queue)


def publish(publisher: EventPublisher, message: Message) -> None:
    """Publish it and wait for the confirm, until that is overdue."""
    publication = publisher.begin(message)
    while not publication.wait(0.02):
        if publication.overdue is not None:
            raise BrokerUnavailable(publication.overdue)


class Told(list[BaseException | None]):
    """Of a publication's end, each time that it is called."""

    def __call__(self, error: BaseException | None) -> None:
        self.append(error)


def publishes(publisher: EventPublisher, message: Message) -> bool:
    try:
        publish(publisher, message)
    except (BrokerUnavailable, Unroutable):
        return False
    return True


def begins(publisher: EventPublisher, message: Message) -> bool:
    try:
        publisher.begin(message)
    except BrokerUnavailable:
        return False
    return True


def pings(end: EventPublisher | EventConsumer) -> bool:
    try:
        end.ping()
    except (BrokerUnavailable, Unroutable):
        return False
    return True
