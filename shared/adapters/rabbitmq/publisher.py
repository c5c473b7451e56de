"""Events over RabbitMQ (AMQP 0-9-1), version 3.10 or later.

Publisher and consumer have separate connections, so that a memory alarm, which blocks connections
that publish, does not block the consumer. Only the modules of this package import pika.
"""

import re
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosedByBroker, ChannelClosedByClient
from pika.spec import Basic, BasicProperties, Queue

from shared.adapters.queues import EventQueue, TopicExchange, rejection
from shared.adapters.rabbitmq.connection import (
    NOT_FOUND,
    PRECONDITION_FAILED,
    RabbitConnection,
    cause_in_words,
    close_channel,
    is_refusal,
)
from shared.adapters.rabbitmq.subscription import Delivery, Subscription
from shared.errors import BrokerUnavailable, MessageRefused, Unroutable
from shared.ports import Message, ReceivedMessage

_CLOSE_SECONDS = 1.0
_PING_SECONDS = 3.0

# 1 Mbit/s: the time that a message's bytes may take, in addition to the confirm timeout.
_SLOW_LINE_BYTES_PER_SECOND = 125_000

# A larger message gets its own channel: if the broker refuses it, it closes the channel, and all
# other publications on it fail.
_LARGE_BYTES = 64 << 10

# Maximum unconfirmed publications.
_MAX_OPEN = 1000

_TICKS_PER_REFRESH = 5

# RabbitMQ 3.8 or later, for a message over its `max_message_size`.
_TOO_LARGE = re.compile(r"message size (\d+) is larger than")


class RabbitEventPublisher:
    """Publishes with `mandatory` and publisher confirms, for many threads over one connection.

    `topology` is declared on every connect, so that events published before the first consumer
    starts are kept. `expected_queue` is a queue that another service declares: while it is missing
    nothing is published, even if another queue is bound. It is checked every few seconds.

    A confirm is overdue after `confirm_seconds`, plus the time that a slow line needs for the
    message and those before it. An overdue publication continues until the connection is lost,
    which happens when nothing arrives from the broker.

    `url`, `password` and `tls` are those of `RabbitConnection`: one or more URLs of the form
    `amqp(s)://user:password@host:port/vhost`, their parts percent-encoded. Connects at the first
    use, so that it may be made before a fork. Raises ValueError for a bad URL.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "stowgate publisher",
        topology: Sequence[EventQueue | TopicExchange],
        expected_queue: str | None = None,
        confirm_seconds: float = 10.0,
        answer_seconds: float = _PING_SECONDS,
        password: Callable[[], str] | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._confirm_seconds = confirm_seconds
        self._answer_seconds = answer_seconds
        self._connection = RabbitConnection(
            url,
            name=name,
            topology=topology,
            prefetch_count=0,
            set_up=self._set_up,
            on_tick=self._on_tick,
            on_down=self._on_down,
            password=password,
            tls=tls,
        )
        self._expected_queue = _ExpectedQueue(expected_queue, self._connection)
        self._overdue: str | None = None
        # The fields below belong to the I/O thread.
        self._shared = _Confirms(self._connection)
        self._open: dict[_Key, _Publication] = {}
        self._open_bytes = 0

    def start(self) -> None:
        self._connection.start()

    def begin(self, message: Message) -> "_Publication":
        self._connection.require(self._answer_seconds)
        self._expected_queue.check(self._answer_seconds)
        publication = _Publication(message, self._connection, self._confirm_seconds)
        if not self._connection.call(partial(self._send, publication)):
            raise self._connection.unavailable("reconnecting")
        return publication

    def ping(self) -> None:
        if self._expected_queue.name is None:
            self._connection.ask(_open_and_close, self._answer_seconds)
        else:
            # The queue is checked every few seconds anyway, and the answer to another check would
            # wait behind the requests that are being sent.
            self._connection.require(self._answer_seconds)
            self._expected_queue.check(self._answer_seconds)
        overdue = self._overdue
        if overdue is not None:
            raise BrokerUnavailable(overdue)

    def close(self) -> None:
        self._wait_for_confirms(_CLOSE_SECONDS)
        self._connection.close(_CLOSE_SECONDS)

    def _wait_for_confirms(self, seconds: float) -> None:
        fates: Future[list[Future[None]]] = Future()
        if self._connection.call(
            lambda: fates.set_result([publication.fate for publication in self._open.values()])
        ):
            with suppress(TimeoutError):
                wait(fates.result(seconds), seconds)

    def _set_up(self, channel: Channel, ready: Callable[[], None]) -> None:
        def confirming() -> None:
            ready()
            self._expected_queue.refresh()

        self._shared = _Confirms(self._connection)
        self._shared.start(channel, confirming)

    def _send(self, publication: "_Publication") -> None:
        if not publication.fate.set_running_or_notify_cancel():
            return
        under_way = self._open.get(publication.key)
        if under_way is not None:
            publication.join(under_way)
            return
        try:
            channel = self._connection.usable_channel()
            if len(self._open) >= _MAX_OPEN:
                raise self._connection.unavailable(
                    f"{_MAX_OPEN} messages are waiting for its confirm, which is the maximum"
                )
            self._keep(publication)
            if publication.size_bytes > _LARGE_BYTES:
                self._send_alone(publication)
            else:
                self._shared.send(channel, publication)
        except BrokerUnavailable as error:
            publication.fail(error)

    def _keep(self, publication: "_Publication") -> None:
        """Keep the publication until its result is known."""

        # Without a reference to the publication, which would be a cycle.
        key, size_bytes = publication.key, publication.size_bytes

        def forget(_: Future[None]) -> None:
            del self._open[key]
            self._open_bytes -= size_bytes

        self._open[key] = publication
        self._open_bytes += size_bytes
        publication.due_in(self._confirm_seconds + self._open_bytes / _SLOW_LINE_BYTES_PER_SECOND)
        publication.fate.add_done_callback(forget)

    def _send_alone(self, publication: "_Publication") -> None:
        confirms = _Confirms(self._connection)

        def on_open(channel: Channel) -> None:
            confirms.start(channel, lambda: confirms.send(channel, publication))

        def on_closed(channel: Channel, error: Exception) -> None:
            if is_refusal(error, PRECONDITION_FAILED):
                publication.refuse(error)
            elif isinstance(error, ChannelClosedByBroker):
                publication.fail(self._connection.unavailable(cause_in_words(error)))
                self._connection.drop(channel, cause_in_words(error))

        channel = self._connection.open_channel(on_open, on_closed)
        publication.fate.add_done_callback(lambda _: close_channel(channel))

    def _on_tick(self) -> None:
        overdue = (publication.overdue for publication in self._open.values())
        self._overdue = next(filter(None, overdue), None)
        self._expected_queue.on_tick()

    def _on_down(self, cause: str, error: BaseException | None) -> None:
        refused = self._shared.refused(error)
        if refused is not None:
            refused.refuse(error)
        for publication in list(self._open.values()):
            publication.fail(
                self._connection.unavailable(
                    f"{cause}; the message was not confirmed, but may have arrived"
                )
            )
        self._overdue = None
        self._expected_queue.forget()


class _ExpectedQueue:
    """The latest known state of a queue that another service declares; unused without a name.

    `check` can be called from any thread, the other methods from the I/O thread only.
    """

    def __init__(self, name: str | None, connection: RabbitConnection) -> None:
        self.name = name
        self._connection = connection
        self._is_known = threading.Event()
        self._missing: str | None = None
        self._is_refreshing = False
        self._ticks = 0

    def check(self, answer_seconds: float) -> None:
        """Raise `Unroutable` if the queue is missing, and `BrokerUnavailable` if its state is still
        unknown after `answer_seconds`."""
        if self.name is None:
            return
        if not self._is_known.wait(answer_seconds):
            raise self._connection.unavailable(
                f"it has not answered whether queue {self.name!r} exists"
            )
        if self._missing is not None:
            raise Unroutable(self._missing)

    def on_tick(self) -> None:
        self._ticks += 1
        if self._ticks % _TICKS_PER_REFRESH == 0:
            self.refresh()

    def refresh(self) -> None:
        """Ask on a new channel, as a missing queue closes the channel."""
        if self.name is None or self._is_refreshing:
            return
        try:
            self._connection.open_channel(self._ask, self._on_answer)
        except BrokerUnavailable:
            return
        self._is_refreshing = True

    def forget(self) -> None:
        """Forget the state, as the next connection may lead to another broker."""
        self._is_refreshing = False
        self._is_known.clear()

    def _ask(self, channel: Channel) -> None:
        channel.queue_declare(self.name, passive=True, callback=lambda _: close_channel(channel))

    def _on_answer(self, _channel: Channel, error: Exception) -> None:
        self._is_refreshing = False
        if is_refusal(error, NOT_FOUND):
            self._missing = (
                f"{self._connection.broker} has no queue {self.name!r}, so no requests are sent. "
                "Start the Workflow Manager, which declares it, or set "
                "STOWGATE_WORKFLOW_MANAGER_QUEUE to the queue that it uses"
            )
        elif isinstance(error, ChannelClosedByClient | ChannelClosedByBroker):
            # Also if this user lacks permission to check: only a missing queue stops publishing.
            self._missing = None
        else:
            return
        self._is_known.set()


_Key = tuple[str, str, str]


class _Publication:
    """A message in transit. Once it is sent, only the I/O thread decides its result."""

    def __init__(
        self, message: Message, connection: RabbitConnection, confirm_seconds: float
    ) -> None:
        self.message = message
        self.key: _Key = (message.message_id, message.exchange, message.routing_key)
        self.size_bytes = len(message.body)
        self.fate: Future[None] = Future()
        self._connection = connection
        self._begun_at = time.monotonic()
        self._due_at = self._begun_at + confirm_seconds

    @property
    def overdue(self) -> str | None:
        now = time.monotonic()
        if now < self._due_at:
            return None
        return (
            f"{self._connection.broker} has not confirmed message {self.message.message_id}, of "
            f"{self.size_bytes} bytes, for {now - self._begun_at:.0f} s; it may still "
            "have arrived. Check that its queue has a leader, and that the broker is not overloaded"
        )

    def wait(self, seconds: float) -> bool:
        try:
            self.fate.result(seconds)
        except TimeoutError:
            # Before it is sent, this thread may cancel it.
            if self.overdue is not None and self.fate.cancel():
                raise self._connection.unavailable("its connection accepts no messages") from None
            return False
        return True

    def on_settled(self, settled: Callable[[BaseException | None], None]) -> None:
        self.fate.add_done_callback(lambda fate: settled(fate.exception()))

    def due_in(self, seconds: float) -> None:
        self._due_at = time.monotonic() + seconds

    def join(self, under_way: "_Publication") -> None:
        """Share the result of an earlier publication of the same message."""

        def share(fate: Future[None]) -> None:
            error = fate.exception()
            if error is None:
                self.succeed()
            else:
                self.fail(error)

        self._begun_at, self._due_at = under_way._begun_at, under_way._due_at
        under_way.fate.add_done_callback(share)

    def succeed(self) -> None:
        if not self.fate.done():
            self.fate.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self.fate.done():
            self.fate.set_exception(error)

    def refuse(self, error: BaseException | None) -> None:
        cause = "" if error is None else cause_in_words(error)
        advice = (
            "Raise max_message_size in its rabbitmq.conf, or limit the instances of a request "
            "(STOWGATE_MAX_PARTS). Then replay the payload"
            if _TOO_LARGE.search(cause)
            else "Find the cause in its log, and replay the payload"
        )
        self.fail(
            MessageRefused(
                f"{self._connection.broker} permanently refuses message {self.message.message_id}, "
                f"of {self.size_bytes} bytes: {cause}. {advice}"
            )
        )


class _Confirms:
    """The unconfirmed publications of one channel; on the I/O thread."""

    def __init__(self, connection: RabbitConnection) -> None:
        self._connection = connection
        self._last_delivery_tag = 0
        self._unconfirmed: dict[int, _Publication] = {}
        self._returned: set[_Key] = set()

    def start(self, channel: Channel, ready: Callable[[], None]) -> None:
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=lambda _: ready())

    def send(self, channel: Channel, publication: _Publication) -> None:
        message = publication.message
        try:
            channel.basic_publish(
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
                    headers=dict(message.headers) or None,
                ),
                mandatory=True,
            )
        except AMQPError as error:
            publication.fail(self._connection.unavailable(cause_in_words(error)))
        else:
            self._last_delivery_tag += 1
            self._unconfirmed[self._last_delivery_tag] = publication

    def refused(self, error: BaseException | None) -> _Publication | None:
        """Return the publication that was too large, if the broker closed the channel for that."""
        found = _TOO_LARGE.search(cause_in_words(error)) if error is not None else None
        if found is None or not is_refusal(error, PRECONDITION_FAILED):
            return None
        of_that_size = (p for p in self._unconfirmed.values() if p.size_bytes == int(found[1]))
        return next(of_that_size, None)

    def _on_return(
        self, _channel: Channel, method: Basic.Return, properties: BasicProperties, _body: bytes
    ) -> None:
        self._returned.add((properties.message_id, method.exchange, method.routing_key))

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        confirmed = [
            tag
            for tag in self._unconfirmed
            if tag == method.delivery_tag or (method.multiple and tag < method.delivery_tag)
        ]
        for tag in confirmed:
            self._settle(self._unconfirmed.pop(tag), is_nack=isinstance(method, Basic.Nack))

    def _settle(self, publication: _Publication, is_nack: bool) -> None:
        message = publication.message
        # A Basic.Return arrives before the ack of the same publish, and has no delivery tag.
        if publication.key in self._returned:
            self._returned.remove(publication.key)
            publication.fail(
                Unroutable(
                    f"{self._connection.broker} has no queue for exchange {message.exchange!r} and "
                    f"routing key {message.routing_key!r} and returned message "
                    f"{message.message_id}. Start the service that declares the queue"
                )
            )
        elif is_nack:
            publication.fail(
                self._connection.unavailable(
                    f"it refused message {message.message_id} (basic.nack): its queue is full or "
                    "has no leader"
                )
            )
        else:
            publication.succeed()


class RabbitEventConsumer:
    """Consumes one queue on one channel, with up to `concurrency` events in progress.

    The channel's prefetch count is `concurrency` too, so that every delivered event is handled at
    once: a crash then counts against the delivery limit of the events in progress only. The threads
    are daemons, so that a hanging handler does not keep the process alive.

    An event in progress when the connection is lost is delivered again, possibly while `handle`
    still runs for the first delivery, whose ack is then dropped.
    """

    def __init__(
        self,
        url: str,
        *,
        queue: EventQueue,
        concurrency: int,
        answer_seconds: float = 10.0,
        close_seconds: float = 10.0,
        password: Callable[[], str] | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._queue = queue
        self._concurrency = concurrency
        self._answer_seconds = answer_seconds
        self._close_seconds = close_seconds
        self._handle: Callable[[ReceivedMessage], None] | None = None
        self._threads: list[threading.Thread] = []
        self._deliveries: SimpleQueue[Delivery[ReceivedMessage] | None] = SimpleQueue()
        self._closing = False
        self._in_hand = 0
        self._in_hand_changed = threading.Condition()
        self._connection = RabbitConnection(
            url,
            name="stowgate consumer",
            topology=[queue],
            prefetch_count=concurrency,
            set_up=self._set_up,
            password=password,
            tls=tls,
        )
        self._subscription = Subscription(self._connection, queue.queue, self._on_delivery)

    def start(self, handle: Callable[[ReceivedMessage], None]) -> None:
        if self._handle is not None:
            raise RuntimeError("this consumer has already been started")
        self._handle = handle
        for number in range(self._concurrency):
            thread = threading.Thread(
                target=self._work, args=[handle], name=f"event-handler-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._connection.start()
        self._connection.call(self._subscription.begin_if_connected)

    def backlog(self) -> int:
        return int(self._queue_state(self._answer_seconds).message_count)

    def consumers(self) -> int:
        return int(self._queue_state(self._answer_seconds).consumer_count)

    def ping(self) -> None:
        if self._closing:
            raise self._connection.unavailable("this consumer is closed")
        self._queue_state(min(_PING_SECONDS, self._answer_seconds))

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._connection.call(self._subscription.cancel)
        with self._in_hand_changed:
            self._in_hand_changed.wait_for(lambda: self._in_hand == 0, self._close_seconds)
        for _ in self._threads:
            self._deliveries.put(None)
        # The broker requeues unacknowledged events when the channel closes.
        self._connection.close(_CLOSE_SECONDS)

    def _set_up(self, channel: Channel, ready: Callable[[], None]) -> None:
        self._subscription.forget()
        if self._handle is None:
            ready()
        else:
            self._subscription.begin(channel, ready)

    def _on_delivery(
        self, channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
    ) -> None:
        with self._in_hand_changed:
            self._in_hand += 1
        message = ReceivedMessage(body, _texts(properties), bool(method.redelivered))
        self._deliveries.put(Delivery(channel, method.delivery_tag, message))

    def _work(self, handle: Callable[[ReceivedMessage], None]) -> None:
        while (delivery := self._deliveries.get()) is not None:
            # The connection may have been lost while the event waited for this thread.
            if not self._closing and delivery.channel.is_open:
                reason = rejection(handle, delivery.content, self._queue.queue)
                self._connection.call(partial(delivery.settle, done=reason is None))
            with self._in_hand_changed:
                self._in_hand -= 1
                self._in_hand_changed.notify_all()

    def _queue_state(self, answer_seconds: float) -> Queue.DeclareOk:
        def declare(channel: Channel, answer: Callable[[Queue.DeclareOk], None]) -> None:
            channel.queue_declare(
                self._queue.queue, passive=True, callback=lambda frame: answer(frame.method)
            )

        return self._connection.ask(declare, answer_seconds)


def _texts(properties: BasicProperties) -> dict[str, str]:
    """Return the headers with text as value. pika returns bytes for a text that is not UTF-8."""
    return {
        name: value
        for name, value in (properties.headers or {}).items()
        if isinstance(name, str) and isinstance(value, str)
    }


def _open_and_close(_channel: Channel, answer: Callable[[None], None]) -> None:
    """Answer at once: opening the channel needed an answer of the broker already."""
    answer(None)
