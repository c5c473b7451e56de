"""Dead letters of another service's queue on RabbitMQ (AMQP 0-9-1), version 3.10 or later."""

import ssl
import threading
from collections.abc import Callable
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
from shared.adapters.rabbitmq.subscription import Delivery, Subscription
from shared.errors import BrokerUnavailable, StowgateError
from shared.ports import DeadLetter
from shared.runtime.logs import where

_log = structlog.get_logger()

_CLOSE_SECONDS = 1.0
_PING_SECONDS = 3.0
_FIRST_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 30.0
# A crash counts against the delivery limit of every unacknowledged message, so there is only one.
_PREFETCH_COUNT = 1
_TICKS_BETWEEN_BINDINGS = 5


class RabbitDeadLetterConsumer:
    """Binds its own queue to the dead-letter exchange, and consumes it.

    The binding is repeated every few seconds: if the exchange is deleted, the binding disappears
    without notice. `ping` raises while the exchange is missing. Without `start`, the queue is
    declared and bound too, and keeps the dead letters until a consumer starts.

    `url` is `amqp(s)://user:password@host:port/vhost`, percent-encoded. Connects at the first use.
    Raises ValueError for an invalid URL.
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
        self._deliveries: SimpleQueue[Delivery[DeadLetter] | None] = SimpleQueue()
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
        self._subscription = Subscription(self._connection, queue.queue, self._on_delivery)
        self._binding_known = threading.Event()
        self._unbound: str | None = None
        # The fields below belong to the I/O thread.
        self._binding = False
        self._ticks = 0

    def start(self, handle: Callable[[DeadLetter], None]) -> None:
        if self._handle is not None:
            raise RuntimeError("this consumer has already been started")
        self._handle = handle
        threading.Thread(
            target=self._work, args=[handle], name="dead-letter-handler", daemon=True
        ).start()
        self._connection.start()
        self._connection.call(self._subscription.begin_if_connected)

    def ping(self) -> None:
        self._connection.require(self._answer_seconds)
        if not self._binding_known.wait(self._answer_seconds):
            raise self._connection.unavailable(
                f"it has not answered whether exchange {self._queue.exchange!r} exists"
            )
        if self._unbound is not None:
            raise BrokerUnavailable(self._unbound)

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._connection.call(self._subscription.cancel)
        self._idle.wait(self._close_seconds)
        self._deliveries.put(None)
        # The broker requeues unacknowledged messages when the channel closes.
        self._connection.close(_CLOSE_SECONDS)

    def _set_up(self, channel: Channel, ready: Callable[[], None]) -> None:
        self._subscription.forget()

        def bound() -> None:
            ready()
            self._bind()

        if self._handle is None:
            bound()
        else:
            self._subscription.begin(channel, bound)

    def _on_tick(self) -> None:
        self._ticks += 1
        if self._ticks % _TICKS_BETWEEN_BINDINGS == 0:
            self._bind()

    def _bind(self) -> None:
        """Bind the queue on a new channel, as a missing exchange closes the channel."""
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
            _log.warning("not receiving the Workflow Manager's refusals", cause=unbound)
        elif unbound is None and not (self._binding_known.is_set() and self._unbound is None):
            _log.info("receiving the Workflow Manager's refusals", queue=self._queue.queue)
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
            f"{broker} {cause}, so Stowgate does not receive the Workflow Manager's refusals. "
            "Start the Workflow Manager, which declares its dead-letter exchange, or set "
            "STOWGATE_WORKFLOW_MANAGER_DEAD_LETTER_EXCHANGE to the exchange that it uses"
        )

    def _forget_binding(self) -> None:
        """Forget the binding, as the next connection may lead to another broker."""
        self._binding = False
        self._binding_known.clear()

    def _on_delivery(
        self, channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
    ) -> None:
        self._idle.clear()
        letter = _dead_letter(properties, body)
        self._deliveries.put(Delivery(channel, method.delivery_tag, letter))

    def _work(self, handle: Callable[[DeadLetter], None]) -> None:
        while (delivery := self._deliveries.get()) is not None:
            is_done = self._done(handle, delivery)
            if is_done is not None:
                self._connection.call(partial(delivery.settle, done=is_done))
            if self._deliveries.empty():
                self._idle.set()

    def _done(
        self, handle: Callable[[DeadLetter], None], delivery: Delivery[DeadLetter]
    ) -> bool | None:
        """Whether the dead letter was handled; None if it returns to the queue."""
        retry_seconds = _FIRST_RETRY_SECONDS
        while not self._closing.is_set() and delivery.channel.is_open:
            try:
                handle(delivery.content)
                return True
            except StowgateError as error:
                _log.warning("refusal not recorded; trying again", error=str(error))
                self._closing.wait(retry_seconds)
                retry_seconds = min(2 * retry_seconds, _MAX_RETRY_SECONDS)
            except Exception as error:  # noqa: BLE001 a bug must not stop the consumer
                # The exception's text may quote the request, so only its type is logged.
                _log.error(
                    "dead letter rejected, its handler failed",
                    queue=self._queue.queue,
                    error=type(error).__name__,
                    place=where(error),
                )
                return False
        return None


def _dead_letter(properties: BasicProperties, body: bytes) -> DeadLetter:
    """`x-death` is a list of tables, the latest first (https://www.rabbitmq.com/docs/dlx#effects).
    Any client can set this header, so it can hold anything."""
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
