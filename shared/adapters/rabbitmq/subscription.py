"""The consumption of one queue, on each channel that a connection sets up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from pika.channel import Channel
from pika.spec import Basic, BasicProperties

from shared.adapters.rabbitmq.connection import RabbitConnection

Content = TypeVar("Content")


class Subscription:
    """A consumer of one queue. All methods run on the connection's I/O thread."""

    def __init__(
        self,
        connection: RabbitConnection,
        queue: str,
        on_delivery: Callable[[Channel, Basic.Deliver, BasicProperties, bytes], None],
    ) -> None:
        self._connection = connection
        self._queue = queue
        self._on_delivery = on_delivery
        self._consumer_tag: str | None = None

    def forget(self) -> None:
        """Forget the consumer of an earlier connection."""
        self._consumer_tag = None

    def begin(self, channel: Channel, ready: Callable[[], None] = lambda: None) -> None:
        """Consume on `channel`, and call `ready` when the broker has agreed."""
        channel.add_on_cancel_callback(
            lambda _: self._connection.drop(
                channel, f"it cancelled the consumer: queue {self._queue!r} was deleted"
            )
        )
        self._consumer_tag = channel.basic_consume(
            self._queue, self._on_delivery, callback=lambda _: ready()
        )

    def begin_if_connected(self) -> None:
        channel = self._connection.channel
        if channel is not None and self._consumer_tag is None:
            self.begin(channel)

    def cancel(self) -> None:
        channel = self._connection.channel
        if channel is not None and self._consumer_tag is not None:
            channel.basic_cancel(self._consumer_tag)


@dataclass(frozen=True)
class Delivery(Generic[Content]):
    channel: Channel
    delivery_tag: int
    content: Content

    def settle(self, done: bool) -> None:
        """Ack or reject on the channel of the delivery; on the I/O thread.

        A delivery tag is valid on its own channel only. On another it would settle another message,
        or close the channel (AMQP 0-9-1, 1.8.3.13: unknown tag).
        """
        if not self.channel.is_open:
            return
        if done:
            self.channel.basic_ack(self.delivery_tag)
        else:
            # Not basic.nack: since RabbitMQ 4.3 it no longer counts against the delivery limit.
            self.channel.basic_reject(self.delivery_tag, requeue=False)
