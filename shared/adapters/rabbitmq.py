"""Events over RabbitMQ (AMQP 0-9-1), for 3.10 and later.

Publisher and consumer each keep a connection of their own, so that a memory alarm, which stops
connections that publish, does not stop the consumer. Only this module and its connection's import
pika.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from pika.channel import Channel
from pika.exceptions import AMQPError
from pika.spec import Basic, BasicProperties

from shared.adapters.queues import EventQueue, TopicExchange, rejection
from shared.adapters.rabbitmq_connection import RabbitConnection, cause_in_words
from shared.errors import BrokerUnavailable, Unroutable
from shared.ports import Message


class RabbitEventPublisher:
    """Publishes with `mandatory` and publisher confirms, many threads at once over one channel.

    `topology` is declared on every connect, so that events published before any consumer ran are
    kept. `url` is `amqp(s)://user:password@host:port/vhost`, its parts percent-encoded. Connects
    at the first use, so that it may be made before a fork. Raises ValueError for a bad URL.
    """

    def __init__(
        self,
        url: str,
        *,
        topology: Sequence[EventQueue | TopicExchange],
        deadline_seconds: float = 3.0,
    ) -> None:
        self._deadline_seconds = deadline_seconds
        self._connection = RabbitConnection(
            url,
            name="stowgate publisher",
            topology=topology,
            prefetch_count=0,
            set_up=self._set_up,
            on_blocked=self._fail_unconfirmed,
            on_down=self._forget_unconfirmed,
        )
        # From here on only the I/O thread's.
        self._last_delivery_tag = 0
        self._unconfirmed: dict[int, _Publication] = {}
        self._returned: Counter[tuple[str, str, str]] = Counter()

    def start(self) -> None:
        """Begin to connect, without waiting for it."""
        self._connection.start()

    def publish(self, message: Message) -> None:
        deadline = time.monotonic() + self._deadline_seconds
        self._connection.require(self._deadline_seconds)
        publication = _Publication(message)
        self._connection.call(partial(self._send, publication))
        try:
            publication.confirmed.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self._connection.call(partial(self._give_up_on_silent_broker, publication))
            raise BrokerUnavailable(
                f"{self._connection.broker} did not confirm message {message.message_id} within "
                f"{self._deadline_seconds:g} s; it may have arrived all the same"
            ) from None

    def ping(self) -> None:
        self._connection.ask(_open_and_close, self._deadline_seconds)

    def expect_queue(self, queue: str) -> None:
        """Return when there is a queue of that name, somebody else's; else `BrokerUnavailable`."""

        def look(channel: Channel, answer: Callable[[None], None]) -> None:
            channel.queue_declare(queue, passive=True, callback=lambda _: answer(None))

        self._connection.ask(look, self._deadline_seconds)

    def close(self) -> None:
        self._connection.close(self._deadline_seconds)

    def _set_up(self, channel: Channel, ready: Callable[[], None]) -> None:
        self._last_delivery_tag = 0
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=lambda _: ready())

    def _send(self, publication: "_Publication") -> None:
        message = publication.message
        try:
            publication.channel = self._connection.usable_channel()
            publication.channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                BasicProperties(
                    content_type=message.content_type,
                    delivery_mode=message.delivery_mode,
                    message_id=message.message_id,
                    correlation_id=message.correlation_id,
                    type=message.type,
                    app_id=message.app_id,
                    timestamp=message.timestamp,
                ),
                mandatory=True,
            )
        except BrokerUnavailable as error:
            publication.fail(error)
        except AMQPError as error:
            publication.fail(self._connection.unavailable(cause_in_words(error)))
        else:
            self._last_delivery_tag += 1
            self._unconfirmed[self._last_delivery_tag] = publication

    def _on_return(
        self, _channel: Channel, method: Basic.Return, properties: BasicProperties, _body: bytes
    ) -> None:
        self._returned[properties.message_id, method.exchange, method.routing_key] += 1

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        confirmed = [
            tag
            for tag in self._unconfirmed
            if tag == method.delivery_tag or (method.multiple and tag < method.delivery_tag)
        ]
        for tag in confirmed:
            publication = self._unconfirmed.pop(tag)
            message = publication.message
            # A Basic.Return comes before the ack of the same publish, and bears no delivery tag.
            key = (message.message_id, message.exchange, message.routing_key)
            if key in self._returned:
                self._returned -= Counter([key])
                publication.fail(
                    Unroutable(
                        f"{self._connection.broker} has no queue for exchange "
                        f"{message.exchange!r} and routing key {message.routing_key!r}, so message "
                        f"{message.message_id} came back. Start the service that declares it"
                    )
                )
            elif isinstance(method, Basic.Nack):
                publication.fail(
                    self._connection.unavailable(
                        f"it refused message {message.message_id} (basic.nack): its queue is full "
                        "or has no leader"
                    )
                )
            else:
                publication.succeed()

    def _give_up_on_silent_broker(self, publication: "_Publication") -> None:
        if publication.channel is not None and not publication.confirmed.done():
            self._connection.drop(
                publication.channel, f"no confirm within {self._deadline_seconds:g} s"
            )

    def _fail_unconfirmed(self, cause: str) -> None:
        """Release who waits, but keep the tags: their acks are still to come."""
        for publication in self._unconfirmed.values():
            publication.fail(self._connection.unavailable(cause))

    def _forget_unconfirmed(self, cause: str) -> None:
        self._fail_unconfirmed(f"{cause}; the message was not confirmed, but may have arrived")
        self._unconfirmed.clear()
        self._returned.clear()


@dataclass(eq=False)
class _Publication:
    message: Message
    channel: Channel | None = None
    confirmed: Future[None] = field(default_factory=Future)

    def succeed(self) -> None:
        if not self.confirmed.done():
            self.confirmed.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.confirmed.done():
            self.confirmed.set_exception(error)


class RabbitEventConsumer:
    """Consumes one queue on one channel, `concurrency` events at a time.

    The channel's prefetch count is `concurrency` too: each event that is delivered is in a
    thread's hands at once and none waits behind another, so the crash that costs an event a
    delivery costs it to those in hand only. Channels with a prefetch of one each would return the
    same events. The threads are daemons, so that a handler that hangs cannot keep the process.

    An event in hand when the connection is lost is delivered again, maybe while `handle` still
    runs for the first delivery; that one's ack is then dropped.
    """

    def __init__(
        self,
        url: str,
        *,
        queue: EventQueue,
        concurrency: int,
        deadline_seconds: float = 3.0,
        close_seconds: float = 10.0,
    ) -> None:
        self._queue = queue
        self._concurrency = concurrency
        self._deadline_seconds = deadline_seconds
        self._close_seconds = close_seconds
        self._handle: Callable[[bytes], None] | None = None
        self._threads: list[threading.Thread] = []
        self._deliveries: SimpleQueue[_Delivery | None] = SimpleQueue()
        self._closing = False
        self._in_hand = 0
        self._in_hand_changed = threading.Condition()
        self._consumer_tag: str | None = None
        self._connection = RabbitConnection(
            url,
            name="stowgate consumer",
            topology=[queue],
            prefetch_count=concurrency,
            set_up=self._set_up,
            on_blocked=lambda _: None,
            on_down=lambda _: None,
        )

    def start(self, handle: Callable[[bytes], None]) -> None:
        if self._handle is not None:
            raise RuntimeError("this consumer is started already")
        self._handle = handle
        for number in range(self._concurrency):
            thread = threading.Thread(
                target=self._work, args=[handle], name=f"event-handler-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._connection.start()
        self._connection.call(self._consume_if_connected)

    def backlog(self) -> int:
        return self._connection.ask(self._count, self._deadline_seconds)

    def ping(self) -> None:
        if self._closing:
            raise self._connection.unavailable("this consumer is closed")
        self.backlog()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._connection.call(self._cancel)
        with self._in_hand_changed:
            self._in_hand_changed.wait_for(lambda: self._in_hand == 0, self._close_seconds)
        for _ in self._threads:
            self._deliveries.put(None)
        # What is still unacknowledged goes back to its queue when the channel closes.
        self._connection.close(self._deadline_seconds)

    def _set_up(self, channel: Channel, ready: Callable[[], None]) -> None:
        self._consumer_tag = None
        if self._handle is None:
            ready()
        else:
            self._consume(channel, ready)

    def _consume_if_connected(self) -> None:
        channel = self._connection.channel
        if channel is not None and self._consumer_tag is None:
            self._consume(channel, lambda: None)

    def _consume(self, channel: Channel, ready: Callable[[], None]) -> None:
        channel.add_on_cancel_callback(
            lambda _: self._connection.drop(
                channel, f"it cancelled the consumer: queue {self._queue.queue!r} was deleted"
            )
        )
        self._consumer_tag = channel.basic_consume(
            self._queue.queue, self._on_delivery, callback=lambda _: ready()
        )

    def _cancel(self) -> None:
        channel = self._connection.channel
        if channel is not None and self._consumer_tag is not None:
            channel.basic_cancel(self._consumer_tag)

    def _on_delivery(
        self, channel: Channel, method: Basic.Deliver, _properties: BasicProperties, body: bytes
    ) -> None:
        with self._in_hand_changed:
            self._in_hand += 1
        self._deliveries.put(_Delivery(channel, method.delivery_tag, body))

    def _work(self, handle: Callable[[bytes], None]) -> None:
        while (delivery := self._deliveries.get()) is not None:
            # Waiting behind a stale one, an event may have become stale itself.
            if not self._closing and delivery.channel.is_open:
                reason = rejection(handle, delivery.body, self._queue.queue)
                self._connection.call(partial(delivery.settle, done=reason is None))
            with self._in_hand_changed:
                self._in_hand -= 1
                self._in_hand_changed.notify_all()

    def _count(self, channel: Channel, answer: Callable[[int], None]) -> None:
        channel.queue_declare(
            self._queue.queue,
            passive=True,
            callback=lambda frame: answer(frame.method.message_count),
        )


@dataclass(frozen=True)
class _Delivery:
    channel: Channel
    delivery_tag: int
    body: bytes

    def settle(self, done: bool) -> None:
        """Ack or reject; on the I/O thread.

        A delivery tag means something on its own channel only. On any other it would settle
        somebody else's event, or close the channel (AMQP 0-9-1, 1.8.3.13: unknown tag).
        """
        if not self.channel.is_open:
            return
        if done:
            self.channel.basic_ack(self.delivery_tag)
        else:
            # Reject, because basic.nack no longer counts against the delivery limit since 4.3.
            self.channel.basic_reject(self.delivery_tag, requeue=False)


def _open_and_close(_channel: Channel, answer: Callable[[None], None]) -> None:
    """The least that needs an answer: opening the channel was one."""
    answer(None)
