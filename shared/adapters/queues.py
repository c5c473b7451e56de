"""What the broker adapters share: the shapes of queues, and the handling of an event."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from shared.errors import MalformedEvent, StowgateError
from shared.ports import DeadLetter, ReceivedMessage


@dataclass(frozen=True)
class EventQueue:
    """A queue that Stowgate consumes, its direct exchange, and its dead-letter queue.

    `dead_letter` names a fanout exchange and its only queue, which keeps the newest
    `max_dead_letters`, up to `max_dead_letter_bytes`. An event that was returned unfinished
    `delivery_limit` times is dead-lettered too.

    The arguments of an existing queue cannot change: to change them, change the name.
    """

    exchange: str
    routing_key: str
    queue: str
    dead_letter: str
    delivery_limit: int = 20
    max_dead_letters: int = 10_000
    max_dead_letter_bytes: int = 64 << 20


@dataclass(frozen=True)
class TopicExchange:
    """A durable topic exchange, whose queues another service declares."""

    name: str


@dataclass(frozen=True)
class DeadLetterQueue:
    """A queue of Stowgate for the dead letters of another service's queue, which arrive through
    that service's topic exchange `exchange`.

    It keeps the newest `max_bytes`. A message that was returned unfinished `delivery_limit` times
    goes to the exchange `dead_letter`; RabbitMQ before 4.0 has no limit by default.
    """

    exchange: str
    routing_key: str
    queue: str
    dead_letter: str
    delivery_limit: int = 20
    max_bytes: int = 1 << 30


class Published:
    """A publication that is already confirmed."""

    overdue: str | None = None

    def wait(self, seconds: float) -> bool:  # noqa: ARG002
        return True

    def on_settled(self, settled: Callable[[BaseException | None], None]) -> None:
        settled(None)


class NoDeadLetters:
    """The dead letters without a broker: there are none."""

    def start(self, handle: Callable[[DeadLetter], None]) -> None:
        """Never calls `handle`."""

    def ping(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def rejection(
    handle: Callable[[ReceivedMessage], None], message: ReceivedMessage, queue: str
) -> str | None:
    """Handle an event; return None, or the reason to dead-letter it.

    The reason is logged here, because AMQP's basic.reject carries none.
    """
    log = structlog.get_logger()
    try:
        handle(message)
    except MalformedEvent as error:
        log.warning("event dead-lettered", queue=queue, reason=str(error))
        return str(error)
    except Exception as error:  # noqa: BLE001 an event that trips a bug must not stop the consumer
        # The text of another exception may quote the dataset, so only its type is logged.
        reason = str(error) if isinstance(error, StowgateError) else type(error).__name__
        log.error(
            "event dead-lettered: its handler failed",
            queue=queue,
            reason=reason,
            traceback="".join(traceback.format_tb(error.__traceback__)),
        )
        return reason
    return None
