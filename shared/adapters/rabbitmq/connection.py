"""A connection to RabbitMQ that reconnects forever, and declares queues and exchanges."""

import random
import re
import ssl
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, TypeVar

import pika
import structlog
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import (
    AMQPConnectionWorkflowFailed,
    AMQPConnectorPhaseErrorBase,
)
from pika.channel import Channel
from pika.exceptions import (
    AMQPError,
    ChannelClosed,
    ChannelClosedByBroker,
    ChannelClosedByClient,
    ConnectionClosed,
)

from shared.adapters.queues import DeadLetterQueue, EventQueue, TopicExchange
from shared.errors import BrokerUnavailable

T = TypeVar("T")

# RabbitMQ sends at least two frames in this time.
_HEARTBEAT_SECONDS = 10
# A broker in alarm still sends heartbeats. Dropping the connection would publish unconfirmed
# messages again, so this waits until the alarm has very likely ended.
_BLOCKED_CONNECTION_TIMEOUT_SECONDS = 3600
_TICK_SECONDS = 1.0
# Ticks, not seconds, as this process itself may have been paused.
_MAX_SILENT_TICKS = 10
_TCP_CONNECT_TIMEOUT_SECONDS = 3
_HANDSHAKE_TIMEOUT_SECONDS = 10
# For each answer to a declaration.
_SET_UP_TIMEOUT_SECONDS = 10
_FIRST_BACK_OFF_SECONDS = 0.2
_MAX_BACK_OFF_SECONDS = 10.0
# Each keeps a channel open until its answer arrives.
_MAX_UNANSWERED = 8

# AMQP 0-9-1, 1.2 (reply codes). RabbitMQ sends it for a declaration whose arguments differ from the
# existing ones, and for a message that is too large.
PRECONDITION_FAILED = 406
NOT_FOUND = 404


class RabbitConnection:
    """One AMQP connection with one channel, which its own I/O thread opens again forever.

    Any failure of the channel or of the set-up drops the connection, so there is one way to
    recover. The connection is also dropped when nothing arrives from the broker, not even a
    heartbeat. All callbacks run on the I/O thread, and so must the methods whose docstrings say so;
    the others can be called from any thread.

    `topology` is declared on every connect. What exists with other arguments is used as it is, so
    that releases with different arguments can work together. `set_up` then gets the channel, and a
    function to call when it is ready. `on_tick` is called every second while the channel is ready,
    and `on_down` when it is lost, with the cause in words and as pika raised it.

    `url` is of one node, or of several with commas between, which are tried in random order; each
    attempt has its own deadlines. `password` gives the password of each attempt, in place of those
    in the URLs, and `tls` its context. Raises ValueError for a URL that cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        topology: Sequence[EventQueue | TopicExchange | DeadLetterQueue],
        prefetch_count: int,
        set_up: Callable[[Channel, Callable[[], None]], None],
        on_tick: Callable[[], None] = lambda: None,
        on_down: Callable[[str, BaseException | None], None] = lambda _cause, _error: None,
        password: Callable[[], str] | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._nodes = [_parameters(one, name) for one in broker_urls(url)]
        addresses = " or ".join(_address(node) for node in self._nodes)
        self.broker = f"RabbitMQ at {addresses}, vhost {self._nodes[0].virtual_host}"
        self._password = password
        self._tls = tls
        self._name = name
        self._topology = topology
        self._prefetch_count = prefetch_count
        self._set_up = set_up
        self._on_tick = on_tick
        self._on_down = on_down
        self._log = structlog.get_logger(broker=self.broker, connection=name)

        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._started_at = 0.0
        self._loop: IOLoop | None = None
        self._closing = threading.Event()
        self._first_attempt_done = threading.Event()

        self.channel: Channel | None = None
        self._blocked_cause: str | None = None
        self._down_since = datetime.now(UTC)
        self._down_cause = "never connected"

        # The fields below belong to the I/O thread.
        self._connection: Any = None
        self._attempt_failed = False
        self._failed_attempts = 0
        self._untried: list[pika.URLParameters] = []
        self._node: pika.URLParameters | None = None
        self._undeclared: deque[_Declaration] = deque()
        self._refused_declaration: str | None = None
        self._set_up_steps = 0
        self._received_bytes = 0
        self._silent_ticks = 0
        self._unanswered: set[Channel] = set()

    def start(self) -> None:
        """Start the I/O thread, unless it is running."""
        with self._lock:
            if self._thread is None and not self._closing.is_set():
                self._started_at = time.monotonic()
                self._down_since = datetime.now(UTC)
                self._down_cause = "the first connection is still being made"
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread

    def call(self, callback: Callable[[], None]) -> bool:
        """Queue `callback` for the I/O thread; return False if that is not running."""
        with self._lock:
            if self._loop is None:
                return False
            self._loop.add_callback_threadsafe(callback)
            return True

    def require(self, grace_seconds: float) -> None:
        """Return if the connection is usable, else raise `BrokerUnavailable`.

        Waits only for the first connection attempt of this process, and up to `grace_seconds` after
        its beginning.
        """
        self.start()
        self._first_attempt_done.wait(max(0.0, self._started_at + grace_seconds - time.monotonic()))
        self.usable_channel()

    def usable_channel(self) -> Channel:
        """Return the channel. Raises `BrokerUnavailable` without one, or if the broker blocks."""
        channel, blocked_cause = self.channel, self._blocked_cause
        if channel is None:
            advice = "is it running, and is STOWGATE_BROKER right?"
            if "SSL" in self._down_cause:
                advice = (
                    "check its certificate, STOWGATE_BROKER_CA and "
                    "STOWGATE_BROKER_CLIENT_CERTIFICATE"
                )
            raise self.unavailable(
                f"not connected since {self._down_since.isoformat(timespec='seconds')}: "
                f"{self._down_cause}; {advice}"
            )
        if blocked_cause is not None:
            raise self.unavailable(blocked_cause)
        return channel

    def unavailable(self, cause: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"{self.broker}: {cause}")

    def ask(
        self, question: Callable[[Channel, Callable[[T], None]], None], deadline_seconds: float
    ) -> T:
        """Ask the broker on a new channel, as a refusal closes the channel.

        `question` receives the channel and a callback for the answer. Raises `BrokerUnavailable`.
        The connection is dropped if the broker leaves many questions unanswered, even if it sends
        heartbeats.
        """
        deadline = time.monotonic() + deadline_seconds
        self.require(deadline_seconds)
        answer: Future[T] = Future()
        channels: list[Channel] = []

        def on_answer(channel: Channel, value: T) -> None:
            if not answer.done():
                answer.set_result(value)
            close_channel(channel)

        def on_close(channel: Channel, error: Exception) -> None:
            self._unanswered.discard(channel)
            if not answer.done():
                answer.set_exception(self.unavailable(cause_in_words(error)))

        def on_io_thread() -> None:
            try:
                channels.append(
                    self.open_channel(
                        lambda opened: question(opened, partial(on_answer, opened)), on_close
                    )
                )
            except BrokerUnavailable as error:
                answer.set_exception(error)

        def give_up() -> None:
            for channel in channels:
                close_channel(channel)
                if not channel.is_closed:  # pika closes it only after the missing answer
                    self._unanswered.add(channel)
            if len(self._unanswered) > _MAX_UNANSWERED:
                self._sever(f"it has not answered {len(self._unanswered)} questions")

        self.call(on_io_thread)
        try:
            return answer.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self.call(give_up)
            raise self.unavailable(f"no answer within {deadline_seconds:g} s") from None

    def open_channel(
        self,
        on_open: Callable[[Channel], None],
        on_closed: Callable[[Channel, Exception], None],
    ) -> Channel:
        """Open a channel for a request that the broker may refuse; on the I/O thread.

        Raises `BrokerUnavailable`.
        """
        self.usable_channel()
        try:
            channel: Channel = self._connection.channel(on_open_callback=on_open)
        except AMQPError as error:
            raise self.unavailable(cause_in_words(error)) from error
        channel.add_on_close_callback(on_closed)
        return channel

    def drop(self, channel: Channel, cause: str) -> None:
        """Drop the connection without a handshake and open a new one; on the I/O thread.

        Does nothing if `channel` belongs to an earlier connection.
        """
        if channel.connection is self._connection:
            self._sever(cause)

    def close(self, deadline_seconds: float) -> None:
        """Close permanently; the handshake gets `deadline_seconds`."""
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
                # A bug in this module or in pika: the state of the connection is unknown.
                self._log.error(
                    "broker connection failed unexpectedly",
                    error=type(error).__name__,
                    # Not exc_info: some renderers print local variables, which hold credentials.
                    traceback="".join(traceback.format_tb(error.__traceback__)),
                )
                self._end_loop(loop)
                self._mark_down("a bug in the broker connection, see the log")
                self._closing.wait(_MAX_BACK_OFF_SECONDS)
            else:
                self._end_loop(loop)

    def _end_loop(self, loop: IOLoop) -> None:
        with self._lock:
            self._loop = None
        loop.close()

    def _connect(self) -> None:
        if self._closing.is_set():
            self._stop_loop()
            return
        self._attempt_failed = False
        self._node = node = self._next_node()
        try:
            parameters = self._prepared(node)
        except (OSError, ssl.SSLError) as error:
            self._mark_down(f"a file of its settings cannot be used: {cause_in_words(error)}")
            self._connect_later()
            return
        self._connection = pika.SelectConnection(
            parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_closed,
            on_close_callback=self._on_closed,
            custom_ioloop=self._loop,
        )

    def _next_node(self) -> pika.URLParameters:
        """Each once in random order, and not first again the one that was left just now."""
        if not self._untried:
            self._untried = random.sample(self._nodes, len(self._nodes))
            if len(self._nodes) > 1 and self._untried[-1] is self._node:
                self._untried.reverse()
        return self._untried.pop()

    def _prepared(self, node: pika.URLParameters) -> pika.URLParameters:
        """With password and certificates as they are now."""
        if self._password is not None:
            node.credentials = pika.PlainCredentials(node.credentials.username, self._password())
        if self._tls is not None and node.ssl_options is not None:
            node.ssl_options = pika.SSLOptions(self._tls(), node.host)
        return node

    def _on_open(self, connection: pika.SelectConnection) -> None:
        if self._closing.is_set():
            connection.close()
            return
        connection.add_on_connection_blocked_callback(self._on_connection_blocked)
        connection.add_on_connection_unblocked_callback(self._on_connection_unblocked)
        self._undeclared = deque(
            declaration for item in self._topology for declaration in _declarations(item)
        )
        self._refused_declaration = None
        self._declare(connection)
        self._expect_set_up(connection)

    def _declare(self, connection: pika.SelectConnection) -> None:
        """Declare the rest of the topology, on a channel that a refusal may close."""
        channel = connection.channel(on_open_callback=self._declare_next)
        channel.add_on_close_callback(self._on_declaring_ended)

    def _declare_next(self, channel: Channel) -> None:
        if self._undeclared:
            self._undeclared[0](
                channel,
                passive=self._refused_declaration is not None,
                callback=lambda _: self._on_declared(channel),
            )
        else:
            close_channel(channel)

    def _on_declared(self, channel: Channel) -> None:
        if not channel.is_open:  # this process has closed it
            return
        self._set_up_steps += 1
        self._undeclared.popleft()
        if self._refused_declaration is not None:
            self._log.warning(
                "an existing queue or exchange has other arguments and is used as it is; delete it "
                "while it is empty to have it declared again",
                cause=self._refused_declaration,
            )
            self._refused_declaration = None
        self._declare_next(channel)

    def _on_declaring_ended(self, channel: Channel, error: Exception) -> None:
        connection = channel.connection
        if not connection.is_open:
            return
        if isinstance(error, ChannelClosedByClient):
            main_channel = connection.channel(on_open_callback=self._on_channel_open)
            main_channel.add_on_close_callback(self._on_channel_closed)
        elif self._refused_declaration is None and is_refusal(error, PRECONDITION_FAILED):
            # It exists with other arguments, or cannot have these: a passive declaration shows.
            self._refused_declaration = cause_in_words(error)
            self._declare(connection)
        else:
            self._sever(self._refused_declaration or cause_in_words(error))

    def _on_channel_open(self, channel: Channel) -> None:
        self._set_up_steps += 1
        channel.basic_qos(
            prefetch_count=self._prefetch_count, callback=lambda _: self._on_channel_set(channel)
        )

    def _on_channel_set(self, channel: Channel) -> None:
        self._set_up_steps += 1
        if channel.is_open:  # unless this process has closed it
            self._set_up(channel, partial(self._on_ready, channel))

    def _on_ready(self, channel: Channel) -> None:
        self._failed_attempts = 0
        self.channel = channel
        self._first_attempt_done.set()
        self._log.info("broker connected", node=_address(self._node or self._nodes[0]))
        self._silent_ticks = 0
        self._tick(self._connection)

    def _tick(self, connection: Any) -> None:
        if connection is not self._connection or self.channel is None:
            return
        if connection.bytes_received != self._received_bytes:
            self._received_bytes = connection.bytes_received
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
        if self._silent_ticks > _MAX_SILENT_TICKS:
            self._sever(
                f"nothing arrived from it for {_MAX_SILENT_TICKS * _TICK_SECONDS:g} s, not even a "
                "heartbeat"
            )
            return
        self._on_tick()
        connection.ioloop.call_later(_TICK_SECONDS, partial(self._tick, connection))

    def _expect_set_up(self, connection: pika.SelectConnection) -> None:
        """Drop the connection if the set-up stalls; pika's timeouts cover the handshake only."""
        steps = self._set_up_steps

        def check() -> None:
            if connection is not self._connection or not connection.is_open or self.channel:
                return
            if steps == self._set_up_steps:
                self._sever(f"no answer to a declaration within {_SET_UP_TIMEOUT_SECONDS} s")
            else:
                self._expect_set_up(connection)

        connection.ioloop.call_later(_SET_UP_TIMEOUT_SECONDS, check)

    def _on_channel_closed(self, channel: Channel, error: Exception) -> None:
        if channel.connection.is_open:
            self._sever(cause_in_words(error), error)

    def _on_connection_blocked(self, _connection: pika.SelectConnection, frame: Any) -> None:
        self._blocked_cause = (
            f"it accepts no messages at present (connection.blocked: {frame.method.reason})"
        )
        self._log.warning("broker blocks publishing", reason=frame.method.reason)

    def _on_connection_unblocked(self, _connection: pika.SelectConnection, _frame: Any) -> None:
        self._blocked_cause = None
        self._log.info("broker accepts messages again")

    def _on_closed(self, _connection: pika.SelectConnection, error: Exception) -> None:
        if self._closing.is_set():
            self._mark_down("closed")
            self._stop_loop()
            return
        self._mark_down(cause_in_words(error))
        self._connect_later()

    def _connect_later(self) -> None:
        """Connect to the next node, almost at once until every node has failed."""
        rounds = self._failed_attempts // len(self._nodes)
        max_seconds = min(_MAX_BACK_OFF_SECONDS, 2 * _FIRST_BACK_OFF_SECONDS * 2 ** min(rounds, 8))
        self._failed_attempts += 1
        delay_seconds = random.uniform(  # noqa: S311 nothing secret about a jitter
            _FIRST_BACK_OFF_SECONDS, max_seconds
        )
        if self._loop is not None:
            self._loop.call_later(delay_seconds, self._connect)

    def _mark_down(self, cause: str, error: BaseException | None = None) -> None:
        """Record the cause and the time of the failure, once per connection."""
        if self._attempt_failed:
            return
        self._attempt_failed = True
        was_connected = self.channel is not None
        if len(self._nodes) > 1 and self._node is not None:
            cause = f"{_address(self._node)}: {cause}"
        if was_connected:
            self._down_since = datetime.now(UTC)
        self._down_cause = cause
        self._blocked_cause = None
        self._unanswered.clear()
        self.channel = None
        self._first_attempt_done.set()
        self._on_down(cause, error)
        if self._closing.is_set():
            self._log.info("broker connection closed")
        elif was_connected:
            self._log.warning("broker connection lost", cause=cause)
        else:
            self._log.warning("broker connection failed", cause=cause)

    def _sever(self, cause: str, error: BaseException | None = None) -> None:
        self._mark_down(cause, error)
        if self._connection is not None and not self._connection.is_closed:
            # pika's public close() would wait for an answer, which a silent broker never sends.
            # pika's heartbeat checker calls this method too.
            self._connection._terminate_stream(pika.exceptions.AMQPConnectionError(cause))

    def _begin_close(self) -> None:
        if self._connection is None or self._connection.is_closed:
            self._stop_loop()
        elif self._connection.is_open:
            self._connection.close()
        # Else it is being opened: `_on_open` or `_on_closed` follows, and pika's close() would
        # fail with an assertion error here.

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


class _Declaration(Protocol):
    def __call__(
        self, channel: Channel, *, passive: bool, callback: Callable[[Any], None]
    ) -> None: ...


def _declarations(item: EventQueue | TopicExchange | DeadLetterQueue) -> Iterator[_Declaration]:
    if isinstance(item, TopicExchange):
        yield _exchange(item.name, "topic")
        return
    if isinstance(item, DeadLetterQueue):
        yield _queue(
            item.queue,
            {
                "x-queue-type": "quorum",
                "x-delivery-limit": item.delivery_limit,
                "x-dead-letter-exchange": item.dead_letter,
                # If no worker runs for a long time, the queue must not fill the broker's disk.
                "x-overflow": "drop-head",
                "x-max-length-bytes": item.max_bytes,
            },
        )
        return
    yield _exchange(item.dead_letter, "fanout")
    yield _queue(
        item.dead_letter,
        {
            "x-queue-type": "quorum",
            # Dropping the oldest loses nothing, as the records are the truth; a full disk would
            # stop the broker.
            "x-overflow": "drop-head",
            "x-max-length": item.max_dead_letters,
            "x-max-length-bytes": item.max_dead_letter_bytes,
        },
    )
    yield _binding(item.dead_letter, item.dead_letter, "")
    yield _exchange(item.exchange, "direct")
    yield _queue(
        item.queue,
        {
            "x-queue-type": "quorum",
            "x-delivery-limit": item.delivery_limit,
            "x-dead-letter-exchange": item.dead_letter,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",  # without it, at-least-once falls back to at-most-once
        },
    )
    yield _binding(item.queue, item.exchange, item.routing_key)


def _exchange(name: str, kind: str) -> _Declaration:
    def declare(channel: Channel, *, passive: bool, callback: Callable[[Any], None]) -> None:
        channel.exchange_declare(name, kind, durable=True, passive=passive, callback=callback)

    return declare


def _queue(name: str, arguments: dict[str, object]) -> _Declaration:
    def declare(channel: Channel, *, passive: bool, callback: Callable[[Any], None]) -> None:
        channel.queue_declare(
            name, durable=True, arguments=arguments, passive=passive, callback=callback
        )

    return declare


def _binding(queue: str, exchange: str, routing_key: str) -> _Declaration:
    def bind(channel: Channel, *, passive: bool, callback: Callable[[Any], None]) -> None:  # noqa: ARG001
        channel.queue_bind(queue, exchange, routing_key=routing_key, callback=callback)

    return bind


def close_channel(channel: Channel) -> None:
    """Close the channel unless it is closed or closing; on the I/O thread."""
    if not (channel.is_closed or channel.is_closing):
        channel.close()


def is_refusal(error: BaseException | None, reply_code: int) -> bool:
    """Whether the broker closed a channel with that reply code."""
    return isinstance(error, ChannelClosedByBroker) and error.reply_code == reply_code


def broker_urls(text: str) -> list[str]:
    """The URLs of all nodes; a comma within a URL does not separate."""
    return re.split(r",\s*(?=amqps?://)", text)


def _address(node: pika.URLParameters) -> str:
    return f"{node.host}:{node.port}"


def _parameters(url: str, name: str) -> pika.URLParameters:
    try:
        if not url.startswith(("amqp://", "amqps://")):
            raise ValueError
        # pika takes no user without a password, which may come later.
        parameters = pika.URLParameters(re.sub(r"^(amqps?://[^:@/]+)@", r"\1:@", url))
    except (ValueError, TypeError):
        # Not chained: the parser quotes parts of the URL, maybe the password.
        raise ValueError(
            "the broker's URL is not valid: it must be amqp(s)://user:password@host:port/vhost, "
            "with / : @ ? # % in user, password and vhost percent-encoded"
        ) from None
    parameters.heartbeat = _HEARTBEAT_SECONDS
    parameters.blocked_connection_timeout = _BLOCKED_CONNECTION_TIMEOUT_SECONDS
    parameters.socket_timeout = _TCP_CONNECT_TIMEOUT_SECONDS
    parameters.stack_timeout = _HANDSHAKE_TIMEOUT_SECONDS
    parameters.connection_attempts = 1
    parameters.client_properties = {"connection_name": name}
    return parameters


def cause_in_words(error: BaseException) -> str:
    """Return the text of the innermost cause, which pika wraps; it never holds credentials."""
    if isinstance(error, AMQPConnectionWorkflowFailed):
        return cause_in_words(error.exceptions[-1])
    if isinstance(error, AMQPConnectorPhaseErrorBase):
        return cause_in_words(error.exception)
    if isinstance(error, ConnectionClosed | ChannelClosed):
        return f"{error.reply_text} ({error.reply_code})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if error.args and isinstance(error.args[0], BaseException):
        return cause_in_words(error.args[0])
    return str(error) or type(error).__name__
