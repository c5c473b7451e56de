"""Events over RabbitMQ (AMQP 0-9-1), for 3.10 and later. The only module that imports pika.

Publisher and consumer each keep a connection of their own, so that a memory alarm, which stops
connections that publish, does not stop the consumer.
"""

import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import pika
import structlog
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import (
    AMQPConnectionWorkflowFailed,
    AMQPConnectorPhaseErrorBase,
)
from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosed, ConnectionClosed
from pika.spec import Basic, BasicProperties

from shared.adapters.queues import EventQueue, TopicExchange, rejection
from shared.errors import BrokerUnavailable, Unroutable
from shared.ports import Message

T = TypeVar("T")

_HEARTBEAT_SECONDS = 15
_BLOCKED_CONNECTION_TIMEOUT_SECONDS = 60
_TCP_CONNECT_TIMEOUT_SECONDS = 3
_HANDSHAKE_TIMEOUT_SECONDS = 5
_SET_UP_TIMEOUT_SECONDS = 10
_FIRST_BACK_OFF_SECONDS = 0.2
_LONGEST_BACK_OFF_SECONDS = 10.0


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
        self._connection = _Connection(
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
            publication.fail(self._connection.unavailable(_cause(error)))
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
        self._connection = _Connection(
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


def _declare(channel: Channel, item: EventQueue | TopicExchange) -> None:
    """Send the declarations; pika holds each back until the one before is answered."""
    if isinstance(item, TopicExchange):
        channel.exchange_declare(item.name, "topic", durable=True)
        return
    channel.exchange_declare(item.dead_letter, "fanout", durable=True)
    channel.queue_declare(item.dead_letter, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(item.dead_letter, item.dead_letter, routing_key="")
    channel.exchange_declare(item.exchange, "direct", durable=True)
    channel.queue_declare(
        item.queue,
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": item.delivery_limit,
            "x-dead-letter-exchange": item.dead_letter,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",  # without it, at-least-once falls back to at-most-once
        },
    )
    channel.queue_bind(item.queue, item.exchange, routing_key=item.routing_key)


def _open_and_close(_channel: Channel, answer: Callable[[None], None]) -> None:
    """The least that needs an answer: opening the channel was one."""
    answer(None)


class _Connection:
    """One AMQP connection with one channel, made again for ever by an I/O thread of its own.

    Whatever goes wrong with the channel or the set-up drops the connection too, so there is one
    way to recover. All callbacks run on the I/O thread, as does every method here whose docstring
    says so; the others are for any thread.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        topology: Sequence[EventQueue | TopicExchange],
        prefetch_count: int,
        set_up: Callable[[Channel, Callable[[], None]], None],
        on_blocked: Callable[[str], None],
        on_down: Callable[[str], None],
    ) -> None:
        self._parameters = _parameters(url, name)
        address = f"{self._parameters.host}:{self._parameters.port}"
        self.broker = f"RabbitMQ at {address}/{self._parameters.virtual_host}"
        self._name = name
        self._topology = topology
        self._prefetch_count = prefetch_count
        self._set_up = set_up
        self._on_blocked = on_blocked
        self._on_down = on_down
        self._log = structlog.get_logger(broker=self.broker, connection=name)

        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: IOLoop | None = None
        self._closing = threading.Event()
        self._first_attempt_done = threading.Event()

        self.channel: Channel | None = None
        self._blocked_cause: str | None = None
        self._down_since = datetime.now(UTC)
        self._down_cause = "never connected"

        # From here on only the I/O thread's.
        self._connection: Any = None
        self._attempt_failed = False
        self._failed_attempts = 0

    def start(self) -> None:
        """Start the I/O thread where it does not run yet."""
        with self._lock:
            if self._thread is None and not self._closing.is_set():
                self._down_since = datetime.now(UTC)
                self._down_cause = "the first connection is still being made"
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def call(self, callback: Callable[[], None]) -> None:
        """Run it on the I/O thread, behind all that was handed over before."""
        with self._lock:
            if self._loop is not None:
                self._loop.add_callback_threadsafe(callback)

    def require(self, grace_seconds: float) -> None:
        """Return when the connection is usable, else raise `BrokerUnavailable` at once.

        Only while the first attempt of this process is under way does it wait, `grace_seconds`.
        """
        self.start()
        self._first_attempt_done.wait(grace_seconds)
        self.usable_channel()

    def usable_channel(self) -> Channel:
        """The channel; raises `BrokerUnavailable` while there is none or the broker blocks it."""
        channel, blocked_cause = self.channel, self._blocked_cause
        if channel is None:
            raise self.unavailable(
                f"not connected since {self._down_since.isoformat(timespec='seconds')}: "
                f"{self._down_cause}"
            )
        if blocked_cause is not None:
            raise self.unavailable(blocked_cause)
        return channel

    def unavailable(self, cause: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"{self.broker}: {cause}")

    def ask(
        self, question: Callable[[Channel, Callable[[T], None]], None], deadline_seconds: float
    ) -> T:
        """Ask on a channel of its own, because a refusal closes the channel it comes on.

        `question` gets that channel and whom to give the answer to. Raises `BrokerUnavailable`.
        """
        deadline = time.monotonic() + deadline_seconds
        self.require(deadline_seconds)
        answer: Future[T] = Future()

        def on_answer(channel: Channel, value: T) -> None:
            if not answer.done():
                answer.set_result(value)
            if channel.is_open:  # not where our own close came in between
                channel.close()

        def on_close(_channel: Channel, error: Exception) -> None:
            if not answer.done():
                answer.set_exception(self.unavailable(_cause(error)))

        def on_io_thread() -> None:
            try:
                self.usable_channel()
                channel = self._connection.channel(
                    on_open_callback=lambda opened: question(opened, partial(on_answer, opened))
                )
                channel.add_on_close_callback(on_close)
            except BrokerUnavailable as error:
                answer.set_exception(error)
            except AMQPError as error:
                answer.set_exception(self.unavailable(_cause(error)))

        self.call(on_io_thread)
        try:
            return answer.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise self.unavailable(f"no answer within {deadline_seconds:g} s") from None

    def drop(self, channel: Channel, cause: str) -> None:
        """Abandon the connection without a farewell and make a new one; on the I/O thread.

        Nothing where `channel` belongs to an earlier connection.
        """
        if self.channel is channel:
            self._sever(cause)

    def close(self, deadline_seconds: float) -> None:
        """Close for good, politely within `deadline_seconds`."""
        with self._lock:
            self._closing.set()
            thread = self._thread
        if thread is not None:
            self.call(self._begin_close)
            thread.join(deadline_seconds)
            if thread.is_alive():
                self.call(self._abandon)
                thread.join(deadline_seconds)
        self._down_cause = "closed"
        self._first_attempt_done.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            loop = IOLoop()
            with self._lock:
                self._loop = loop
            loop.add_callback_threadsafe(self._connect)
            try:
                loop.start()
            except Exception as error:  # noqa: BLE001 without an I/O thread the service would be cut off
                # A bug, ours or pika's: nothing of this connection is to be trusted any more.
                self._log.error(
                    "broker connection failed unexpectedly",
                    error=type(error).__name__,
                    # Not exc_info: some renderers add the locals, with the credentials among them.
                    traceback="".join(traceback.format_tb(error.__traceback__)),
                )
                self._mark_down("a bug in the broker connection, see the log")
                self._closing.wait(_LONGEST_BACK_OFF_SECONDS)
            finally:
                with self._lock:
                    self._loop = None
                loop.close()

    def _connect(self) -> None:
        if self._closing.is_set():
            self._stop_loop()
            return
        self._attempt_failed = False
        self._connection = pika.SelectConnection(
            self._parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_closed,
            on_close_callback=self._on_closed,
            custom_ioloop=self._loop,
        )

    def _on_open(self, connection: pika.SelectConnection) -> None:
        if self._closing.is_set():
            connection.close()
            return
        connection.add_on_connection_blocked_callback(self._on_connection_blocked)
        connection.add_on_connection_unblocked_callback(self._on_connection_unblocked)
        connection.channel(on_open_callback=self._on_channel_open).add_on_close_callback(
            self._on_channel_closed
        )
        connection.ioloop.call_later(
            _SET_UP_TIMEOUT_SECONDS, partial(self._expect_set_up, connection)
        )

    def _on_channel_open(self, channel: Channel) -> None:
        for item in self._topology:
            _declare(channel, item)
        channel.basic_qos(
            prefetch_count=self._prefetch_count, callback=lambda _: self._on_declared(channel)
        )

    def _on_declared(self, channel: Channel) -> None:
        if channel.is_open:  # not where our own close came in between
            self._set_up(channel, partial(self._on_ready, channel))

    def _on_ready(self, channel: Channel) -> None:
        self._failed_attempts = 0
        self.channel = channel
        self._first_attempt_done.set()
        self._log.info("broker connected")

    def _expect_set_up(self, connection: pika.SelectConnection) -> None:
        """pika's own time-outs end with the handshake."""
        if connection is self._connection and connection.is_open and self.channel is None:
            self._sever(f"no answer to the declarations within {_SET_UP_TIMEOUT_SECONDS} s")

    def _on_channel_closed(self, channel: Channel, error: Exception) -> None:
        if channel.connection.is_open:
            self._sever(_cause(error))

    def _on_connection_blocked(self, _connection: pika.SelectConnection, frame: Any) -> None:
        self._blocked_cause = (
            f"it takes no messages for now (connection.blocked: {frame.method.reason})"
        )
        self._log.warning("broker blocks publishing", reason=frame.method.reason)
        self._on_blocked(self._blocked_cause)

    def _on_connection_unblocked(self, _connection: pika.SelectConnection, _frame: Any) -> None:
        self._blocked_cause = None
        self._log.info("broker takes messages again")

    def _on_closed(self, connection: pika.SelectConnection, error: Exception) -> None:
        if self._closing.is_set():
            self._mark_down("closed")
            self._stop_loop()
            return
        self._mark_down(_cause(error))
        longest_seconds = min(
            _LONGEST_BACK_OFF_SECONDS,
            2 * _FIRST_BACK_OFF_SECONDS * 2 ** min(self._failed_attempts, 8),
        )
        self._failed_attempts += 1
        delay_seconds = random.uniform(  # noqa: S311 nothing secret about a jitter
            _FIRST_BACK_OFF_SECONDS, longest_seconds
        )
        connection.ioloop.call_later(delay_seconds, self._connect)

    def _mark_down(self, cause: str) -> None:
        """Note once per connection that it is unusable, why and since when."""
        if self._attempt_failed:
            return
        self._attempt_failed = True
        was_connected = self.channel is not None
        if was_connected:
            self._down_since = datetime.now(UTC)
        self._down_cause = cause
        self._blocked_cause = None
        self.channel = None
        self._first_attempt_done.set()
        self._on_down(cause)
        if self._closing.is_set():
            self._log.info("broker connection closed")
        elif was_connected:
            self._log.warning("broker connection lost", cause=cause)
        else:
            self._log.warning("broker connection failed", cause=cause)

    def _sever(self, cause: str) -> None:
        self._mark_down(cause)
        if self._connection is not None and not self._connection.is_closed:
            # pika's public close() waits for the broker's answer, for which a silent broker is
            # the wrong one. This is what its heartbeat checker calls.
            self._connection._terminate_stream(pika.exceptions.AMQPConnectionError(cause))

    def _begin_close(self) -> None:
        if self._connection is None or self._connection.is_closed:
            self._stop_loop()
        elif self._connection.is_open:
            self._connection.close()
        # Else it is being opened: `_on_open` or `_on_closed` is next, and pika's close() would
        # trip over its own assertion here.

    def _abandon(self) -> None:
        if self._connection is not None and (
            self._connection.is_open or self._connection.is_closing
        ):
            self._sever("closed")
        else:
            self._stop_loop()

    def _stop_loop(self) -> None:
        if self._loop is not None:
            self._loop.stop()


def _parameters(url: str, name: str) -> pika.URLParameters:
    try:
        if not url.startswith(("amqp://", "amqps://")):
            raise ValueError
        parameters = pika.URLParameters(url)
    except (ValueError, TypeError):
        # Not chained: the parser quotes parts of the URL, and the password may be among them.
        raise ValueError(
            "the broker's URL cannot be read: it must be amqp(s)://user:password@host:port/vhost, "
            "with / : @ ? # % in user, password and vhost percent-encoded"
        ) from None
    parameters.heartbeat = _HEARTBEAT_SECONDS
    parameters.blocked_connection_timeout = _BLOCKED_CONNECTION_TIMEOUT_SECONDS
    parameters.socket_timeout = _TCP_CONNECT_TIMEOUT_SECONDS
    parameters.stack_timeout = _HANDSHAKE_TIMEOUT_SECONDS
    parameters.connection_attempts = 1
    parameters.client_properties = {"connection_name": name}
    return parameters


def _cause(error: BaseException) -> str:
    """The innermost cause in words; pika wraps it several times. Never holds credentials."""
    if isinstance(error, AMQPConnectionWorkflowFailed):
        return _cause(error.exceptions[-1])
    if isinstance(error, AMQPConnectorPhaseErrorBase):
        return _cause(error.exception)
    if isinstance(error, ConnectionClosed | ChannelClosed):
        return f"{error.reply_text} ({error.reply_code})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if error.args and isinstance(error.args[0], BaseException):
        return _cause(error.args[0])
    return str(error) or type(error).__name__
