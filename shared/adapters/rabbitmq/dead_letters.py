"""Dead letters of somebody else's queue over RabbitMQ (AMQP 0-9-1), for 3.10 and later."""

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from typing import Any

import structlog
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker, ChannelClosedByClient
from pika.spec import Basic, BasicProperties

from shared.adapters.queues import DeadLetterQueue
from shared.adapters.rabbitmq.connection import (
    NOT_FOUND,
    RabbitConnection,
    cause_in_words,
    close_channel,
    is_refusal,
)
from shared.errors import BrokerUnavailable, StowgateError
from shared.ports import DeadLetter
from shared.runtime.logs import where

_log = structlog.get_logger()

_CLOSE_SECONDS = 1.0
_PING_SECONDS = 3.0
_FIRST_RETRY_SECONDS = 1.0
_LONGEST_RETRY_SECONDS = 30.0
# One that this process cannot survive must not take a neighbour with it to the delivery limit.
_PREFETCH_COUNT = 1
_TICKS_BETWEEN_BINDINGS = 5


class RabbitDeadLetterConsumer:
    """Binds a queue of its own to the dead-letter exchange, and consumes it.

    The binding is made again every few seconds: it goes with the exchange where that is deleted,
    which no broker reports. `ping` raises while the exchange is missing. One that is not started
    declares and binds the queue all the same, so that it holds what comes until somebody consumes.

    `url` is `amqp(s)://user:password@host:port/vhost`, its parts percent-encoded. Connects at the
    first use. Raises ValueError for a bad URL.
    """

    def __init__(
        self,
        url: str,
        *,
        queue: DeadLetterQueue,
        answer_seconds: float = _PING_SECONDS,
        close_seconds: float = 10.0,
        password: Callable[[], str] | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._queue = queue
        self._answer_seconds = min(_PING_SECONDS, answer_seconds)
        self._close_seconds = close_seconds
        self._handle: Callable[[DeadLetter], None] | None = None
        self._deliveries: SimpleQueue[_Delivery | None] = SimpleQueue()
        self._closing = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._connection = RabbitConnection(
            url,
            name="stowgate refusals",
            topology=[queue],
            prefetch_count=_PREFETCH_COUNT,
            set_up=self._set_up,
            on_tick=self._on_tick,
            on_down=lambda _cause, _error: self._forget_binding(),
            password=password,
            tls=tls,
        )
        self._binding_known = threading.Event()
        self._unbound: str | None = None
        # From here on only the I/O thread's.
        self._consumer_tag: str | None = None
        self._binding = False
        self._ticks = 0

    def start(self, handle: Callable[[DeadLetter], None]) -> None:
        if self._handle is not None:
            raise RuntimeError("this consumer is started already")
        self._handle = handle
        threading.Thread(
            target=self._work, args=[handle], name="dead-letter-handler", daemon=True
        ).start()
        self._connection.start()
        self._connection.call(self._consume_if_connected)

    def ping(self) -> None:
        self._connection.require(self._answer_seconds)
        if not self._binding_known.wait(self._answer_seconds):
            raise self._connection.unavailable(
                f"it has not answered yet whether there is an exchange {self._queue.exchange!r}"
            )
        if self._unbound is not None:
            raise BrokerUnavailable(self._unbound)

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._connection.call(self._cancel)
        self._idle.wait(self._close_seconds)
        self._deliveries.put(None)
        # What is still unacknowledged goes back to its queue when the channel closes.
        self._connection.close(_CLOSE_SECONDS)

    def _set_up(self, channel: Channel, ready: Callable[[], None]) -> None:
        self._consumer_tag = None

        def bound() -> None:
            ready()
            self._bind()

        if self._handle is None:
            bound()
        else:
            self._consume(channel, bound)

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

    def _on_tick(self) -> None:
        self._ticks += 1
        if self._ticks % _TICKS_BETWEEN_BINDINGS == 0:
            self._bind()

    def _bind(self) -> None:
        """Bind the queue, on a channel of its own, as the answer that the exchange is missing
        closes that."""
        if self._binding:
            return
        try:
            self._connection.open_channel(self._ask_to_bind, self._on_bound)
        except BrokerUnavailable:
            return
        self._binding = True

    def _ask_to_bind(self, channel: Channel) -> None:
        channel.queue_bind(
            self._queue.queue,
            self._queue.exchange,
            routing_key=self._queue.routing_key,
            callback=lambda _: close_channel(channel),
        )

    def _on_bound(self, _channel: Channel, error: Exception) -> None:
        self._binding = False
        if isinstance(error, ChannelClosedByClient):
            unbound = None
        elif isinstance(error, ChannelClosedByBroker):
            unbound = self._why_unbound(error)
        else:
            return
        if unbound is not None and unbound != self._unbound:
            _log.warning("refusals of the Workflow Manager are not received", cause=unbound)
        elif unbound is None and not (self._binding_known.is_set() and self._unbound is None):
            _log.info("refusals of the Workflow Manager are received", queue=self._queue.queue)
        self._unbound = unbound
        self._binding_known.set()

    def _why_unbound(self, error: ChannelClosedByBroker) -> str:
        broker, exchange = self._connection.broker, self._queue.exchange
        cause = (
            f"has no exchange {exchange!r}"
            if is_refusal(error, NOT_FOUND)
            else f"does not let Stowgate bind a queue to exchange {exchange!r}: "
            f"{cause_in_words(error)}"
        )
        return (
            f"{broker} {cause}. So refusals of the Workflow Manager are not received. Start the "
            "Workflow Manager, which declares its dead-letter exchange, or name the exchange that "
            "it has in STOWGATE_WORKFLOW_MANAGER_DEAD_LETTER_EXCHANGE"
        )

    def _forget_binding(self) -> None:
        """On the next connection it may be another broker."""
        self._binding = False
        self._binding_known.clear()

    def _on_delivery(
        self, channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
    ) -> None:
        self._idle.clear()
        letter = _dead_letter(properties, body)
        self._deliveries.put(_Delivery(channel, method.delivery_tag, letter))

    def _work(self, handle: Callable[[DeadLetter], None]) -> None:
        while (delivery := self._deliveries.get()) is not None:
            is_done = self._done(handle, delivery)
            if is_done is not None:
                self._connection.call(partial(delivery.settle, done=is_done))
            if self._deliveries.empty():
                self._idle.set()

    def _done(self, handle: Callable[[DeadLetter], None], delivery: "_Delivery") -> bool | None:
        """Whether it is handled; None where it goes back to the queue."""
        retry_seconds = _FIRST_RETRY_SECONDS
        while not self._closing.is_set() and delivery.channel.is_open:
            try:
                handle(delivery.letter)
                return True
            except StowgateError as error:
                _log.warning("refusal not noted; trying again", error=str(error))
                self._closing.wait(retry_seconds)
                retry_seconds = min(2 * retry_seconds, _LONGEST_RETRY_SECONDS)
            except Exception as error:  # noqa: BLE001 a bug must not stop the consumer
                # The text of a foreign exception may quote the request, so only its type is told.
                _log.error(
                    "dead letter rejected, its handler failed",
                    queue=self._queue.queue,
                    error=type(error).__name__,
                    place=where(error),
                )
                return False
        return None


@dataclass(frozen=True)
class _Delivery:
    channel: Channel
    delivery_tag: int
    letter: DeadLetter

    def settle(self, done: bool) -> None:
        """Ack or reject, on the I/O thread, and only on the channel that it came on."""
        if not self.channel.is_open:
            return
        if done:
            self.channel.basic_ack(self.delivery_tag)
        else:
            self.channel.basic_reject(self.delivery_tag, requeue=False)


def _dead_letter(properties: BasicProperties, body: bytes) -> DeadLetter:
    """`x-death` is a list of tables, the last death first
    (https://www.rabbitmq.com/docs/dlx#effects). Anyone may have sent it, so it may be anything."""
    deaths = (properties.headers or {}).get("x-death")
    last: dict[str, Any] = {}
    if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict):
        last = deaths[0]
    reason, at = last.get("reason"), last.get("time")
    return DeadLetter(
        body=body,
        message_id=properties.message_id or "",
        reason=reason if isinstance(reason, str) else "",
        at=at.replace(tzinfo=UTC) if isinstance(at, datetime) else None,
    )
