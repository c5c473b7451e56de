"""What every broker adapter shares: how a queue of ours is shaped, and how an event is handled."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from shared.errors import MalformedEvent, StowgateError
from shared.ports import DeadLetter


@dataclass(frozen=True)
class EventQueue:
    """A queue that Stowgate consumes, the direct exchange before it, and where its rejects go.

    `dead_letter` names a fanout exchange and the one queue bound to it, which keeps the newest
    `max_dead_letters`, of `max_dead_letter_bytes` together. `delivery_limit` is how many times an
    event may come back unfinished before it is dead-lettered too.

    A queue on a broker keeps the arguments that it was declared with: one that has to have others
    gets another name.
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
    """A durable topic exchange whose queues belong to somebody else and are not ours to declare."""

    name: str


@dataclass(frozen=True)
class DeadLetterQueue:
    """A queue of ours for what the queue of somebody else dead-letters to `exchange`, which is a
    topic exchange and not ours to declare.

    It keeps the newest `max_bytes`. What comes back unfinished `delivery_limit` times goes to the
    exchange `dead_letter`. RabbitMQ limits that by itself from 4.0 only, so it is always named.
    """

    exchange: str
    routing_key: str
    queue: str
    dead_letter: str
    delivery_limit: int = 20
    max_bytes: int = 1 << 30


class Published:
    """A publication that was through when it began."""

    overdue = None

    def wait(self, seconds: float) -> bool:  # noqa: ARG002
        return True


class NoDeadLetters:
    """Where no broker is, nothing refuses a workflow request."""

    def start(self, handle: Callable[[DeadLetter], None]) -> None:
        """Never calls it."""

    def ping(self) -> None:
        """There is nothing to reach."""

    def close(self) -> None:
        """Nothing is held open."""


def rejection(handle: Callable[[bytes], None], body: bytes, queue: str) -> str | None:
    """Handle one event; None when it is done, else the reason to dead-letter it for.

    The reason is logged here, because AMQP's basic.reject has no room for one.
    """
    log = structlog.get_logger()
    try:
        handle(body)
    except MalformedEvent as error:
        log.warning("event dead-lettered", queue=queue, reason=str(error))
        return str(error)
    except Exception as error:  # noqa: BLE001 an event that trips a bug must not stop the consumer
        # The text of a foreign exception may quote the dataset, so only its type is told.
        reason = str(error) if isinstance(error, StowgateError) else type(error).__name__
        log.error(
            "event dead-lettered, its handler failed",
            queue=queue,
            reason=reason,
            traceback="".join(traceback.format_tb(error.__traceback__)),
        )
        return reason
    return None
