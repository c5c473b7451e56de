"""Events within one process, for the embedded run: queues in memory.

The queues are lost with the process. That loses no payload: the ingest record is the truth, and the
relay announces pending records again.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shared.adapters.queues import EventQueue, Published, rejection
from shared.errors import BrokerUnavailable, Unroutable
from shared.ports import Message, ReceivedMessage


@dataclass(frozen=True)
class DeadLetter:
    message: Message
    reason: str


class MemoryBroker:
    """Queues behind direct exchanges, for any number of publishers and consumers.

    A queue holds up to `capacity` messages and refuses more, like one with `reject-publish`. The
    newest dead letters of each queue are kept for inspection.
    """

    def __init__(self, *queues: EventQueue, capacity: int = 100_000) -> None:
        self._queues = {queue: _Queue(queue, capacity) for queue in queues}

    def publisher(self) -> "MemoryEventPublisher":
        return MemoryEventPublisher(list(self._queues.values()))

    def consumer(
        self, queue: EventQueue, *, concurrency: int, close_seconds: float = 10.0
    ) -> "MemoryEventConsumer":
        """Return a consumer for one of the broker's queues. Raises KeyError for any other."""
        return MemoryEventConsumer(self._queues[queue], concurrency, close_seconds)

    def dead_letters(self, queue: EventQueue) -> list[DeadLetter]:
        """Return the rejected messages, oldest first."""
        return self._queues[queue].dead_letters()


class MemoryEventPublisher:
    def __init__(self, queues: "list[_Queue]") -> None:
        self._queues = queues
        self._closed = False

    def start(self) -> None:
        """Does nothing."""

    def begin(self, message: Message) -> Published:
        self.ping()
        bound = [queue for queue in self._queues if queue.takes(message)]
        if not bound:
            raise Unroutable(
                f"the memory broker has no queue for exchange {message.exchange!r} and routing "
                f"key {message.routing_key!r} and returned message {message.message_id}"
            )
        for queue in bound:
            queue.put(message)
        return Published()

    def ping(self) -> None:
        if self._closed:
            raise BrokerUnavailable("the memory broker's publisher is closed")

    def close(self) -> None:
        self._closed = True


class MemoryEventConsumer:
    """Calls the handler in `concurrency` threads, which are daemons, as a handler may hang."""

    def __init__(self, queue: "_Queue", concurrency: int, close_seconds: float) -> None:
        self._queue = queue
        self._concurrency = concurrency
        self._close_seconds = close_seconds
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()

    def start(self, handle: Callable[[ReceivedMessage], None]) -> None:
        if self._threads:
            raise RuntimeError("this consumer has already been started")
        self._queue.add(self)
        for number in range(self._concurrency):
            thread = threading.Thread(
                target=self._work, args=[handle], name=f"event-handler-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def backlog(self) -> int:
        self.ping()
        return self._queue.backlog()

    def consumers(self) -> int:
        self.ping()
        return self._queue.consumers()

    def ping(self) -> None:
        if self._closing.is_set():
            raise BrokerUnavailable("the memory broker's consumer is closed")

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._queue.close(self, self._close_seconds)

    def _work(self, handle: Callable[[ReceivedMessage], None]) -> None:
        while (delivery := self._queue.take(self, self._closing)) is not None:
            message = delivery.message
            received = ReceivedMessage(message.body, message.headers, delivery.redelivered)
            reason = rejection(handle, received, self._queue.name)
            self._queue.settle(delivery, reason)


@dataclass(frozen=True, eq=False)
class _Delivery:
    message: Message
    redelivered: bool
    consumer: MemoryEventConsumer


class _Queue:
    def __init__(self, shape: EventQueue, capacity: int) -> None:
        self.name = shape.queue
        self._shape = shape
        self._capacity = capacity
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._waiting: deque[tuple[Message, bool]] = deque()
        self._in_hand: dict[_Delivery, None] = {}  # as a set that keeps the order
        self._consumers: set[MemoryEventConsumer] = set()
        self._dead_letters: deque[DeadLetter] = deque(maxlen=shape.max_dead_letters)

    def takes(self, message: Message) -> bool:
        return (message.exchange, message.routing_key) == (
            self._shape.exchange,
            self._shape.routing_key,
        )

    def add(self, consumer: MemoryEventConsumer) -> None:
        with self._lock:
            self._consumers.add(consumer)

    def consumers(self) -> int:
        with self._lock:
            return len(self._consumers)

    def put(self, message: Message) -> None:
        with self._lock:
            if len(self._waiting) >= self._capacity:
                raise BrokerUnavailable(
                    f"queue {self.name!r} of the memory broker has its maximum of "
                    f"{self._capacity} messages and refused message {message.message_id}"
                )
            self._waiting.append((message, False))
            self._arrived.notify()

    def take(self, consumer: MemoryEventConsumer, closing: threading.Event) -> _Delivery | None:
        """Wait for a message; None once the consumer is closing."""
        with self._lock:
            self._arrived.wait_for(lambda: self._waiting or closing.is_set())
            if closing.is_set():
                # Pass the wake-up on: it may have been for a message.
                self._arrived.notify()
                return None
            delivery = _Delivery(*self._waiting.popleft(), consumer)
            self._in_hand[delivery] = None
            return delivery

    def settle(self, delivery: _Delivery, rejected_for: str | None) -> None:
        with self._lock:
            if delivery not in self._in_hand:
                return  # returned to the queue by `close`
            del self._in_hand[delivery]
            if rejected_for is not None:
                self._dead_letters.append(DeadLetter(delivery.message, rejected_for))
            self._settled.notify_all()

    def close(self, consumer: MemoryEventConsumer, close_seconds: float) -> None:
        """Wake the consumer's threads, wait for their messages, and requeue the unfinished ones."""
        with self._lock:
            self._consumers.discard(consumer)
            self._arrived.notify_all()
            self._settled.wait_for(lambda: not self._held_by(consumer), close_seconds)
            unfinished = self._held_by(consumer)
            for delivery in unfinished:
                del self._in_hand[delivery]
            self._waiting.extendleft((found.message, True) for found in reversed(unfinished))
            self._arrived.notify_all()

    def _held_by(self, consumer: MemoryEventConsumer) -> list[_Delivery]:
        return [delivery for delivery in self._in_hand if delivery.consumer is consumer]

    def backlog(self) -> int:
        with self._lock:
            return len(self._waiting)

    def dead_letters(self) -> list[DeadLetter]:
        with self._lock:
            return list(self._dead_letters)
