"""The ports of the two services: an object store, and publishers and consumers of events.

Each port has a contract test in `tests/contract/`, which every adapter passes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import BinaryIO, Protocol


@dataclass(frozen=True)
class StoredObject:
    """An object's bytes, and its version for a conditional write."""

    data: bytes
    version: str


@dataclass(frozen=True)
class ListedObject:
    key: str
    size_bytes: int
    modified_at: datetime


KEY_MAX_BYTES = 1024
"""Of a key in UTF-8, as in S3."""

KEY_NAME_MAX_BYTES = 255
"""Of each name in a key, as in most file systems."""

_NAME = r"[^./\x00-\x1f\x7f-\x9f][^/\x00-\x1f\x7f-\x9f]*+"
_KEY = re.compile(rf"{_NAME}(?:/{_NAME})*+")


def check_key(key: str) -> None:
    """Raise `ValueError` for a key that some store cannot hold.

    A key consists of names separated by `/`, each up to 255 bytes, together up to 1024. A name is
    not empty, does not begin with a dot, and has no control characters.
    """
    size_bytes = len(key.encode())
    if (
        not _KEY.fullmatch(key)
        or size_bytes > KEY_MAX_BYTES
        or (
            size_bytes > KEY_NAME_MAX_BYTES
            and any(len(name.encode()) > KEY_NAME_MAX_BYTES for name in key.split("/"))
        )
    ):
        raise ValueError(f"not a valid object key: {key!r}")


def check_prefix(prefix: str) -> None:
    """Raise `ValueError` for a prefix that is neither empty nor a key followed by `/`."""
    if prefix:
        if not prefix.endswith("/"):
            raise ValueError(f"a prefix of keys must end with a slash: {prefix!r}")
        check_key(prefix.removesuffix("/"))


class Writing(Protocol):
    """An object that is written while its data arrive. It is invisible before `finish`.

    Once it `has_failed`, `finish` will raise.
    """

    @property
    def has_failed(self) -> bool: ...

    def proceed(self, size_bytes: int) -> None:
        """Send what is possible of the first `size_bytes`. Neither waits nor raises."""

    def finish(self, size_bytes: int) -> None:
        """Complete the object with its total size. Returns and raises as `put` does."""

    def abandon(self) -> None:
        """Remove what was written, if the store answers. Does nothing after `finish`."""


class ObjectStore(Protocol):
    """One bucket. A key is a relative path of `/`-separated names that are safe in a file system
    (`check_key`). An invalid key is a programming error and raises `ValueError`.

    When a write returns, the object is durable and visible to every reader. Every call may raise
    `StoreUnavailable` or `StoreRefused`, and every write `StoreFull`.
    """

    def prepare(self) -> None:
        """Create the bucket if it is missing."""

    def put(
        self,
        key: str,
        data: BinaryIO,
        size_bytes: int,
        content_type: str,
        sha256: str | None = None,
    ) -> None:
        """Write the first `size_bytes` of `data`, all or nothing, over any existing object.

        `data` must be seekable. `sha256` is its digest in hexadecimal, if known, which a store may
        verify.
        """

    def begin(self, key: str, data: BinaryIO, content_type: str, max_bytes: int) -> Writing:
        """Start to write data that still arrive, up to `max_bytes`, over any existing object.

        `data` must be seekable. Several threads read it, one at a time, until the writing ends.
        Does not wait; `Writing.finish` raises the errors.
        """

    def create(self, key: str, data: bytes, content_type: str) -> str:
        """Write a new small object, and return its version.

        Raises `VersionConflict` if it exists: of several concurrent callers one succeeds.
        """

    def replace(self, key: str, data: bytes, version: str, content_type: str) -> str:
        """Replace that version of a small object, and return the new version.

        Raises `VersionConflict` if the object has another version or is missing.
        """

    def get(self, key: str) -> StoredObject:
        """Read a small object. Raises `ObjectMissing`."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read `length` bytes from offset `start`, fewer at the end. Raises `ObjectMissing`."""

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        """Yield every object whose key begins with `prefix` and sorts after `after`, by key.

        Lazy: a caller that stops early saves the rest. `prefix` is empty or ends with `/`.
        """

    def folders(self, after: str) -> Iterator[str]:
        """Yield the distinct names before the first `/` of all keys, after `after`, in order."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects, ignoring missing ones.

        If one cannot be removed, the others still are, and the error names it.
        """

    def check_room(self) -> None:
        """Raise `StoreFull` if the store is known to be past its watermark."""

    def ping(self) -> None:
        """Return if the bucket is reachable."""

    def keeps_removed(self) -> bool:
        """Whether removed objects stay forever as noncurrent versions, which slow down listings.

        False if the store does not report it.
        """


AMQP_SHORTSTR_MAX_BYTES = 255
"""AMQP 0-9-1, 4.2.5.3: exchange, routing key, the string properties and the names of headers are
short strings."""

HEADERS_MAX_BYTES = 4096
"""Of names and values in UTF-8. RabbitMQ closes the connection for headers over 128 KiB."""


@dataclass(frozen=True)
class Message:
    """A message with the AMQP 0-9-1 basic properties that the two contracts use.

    `timestamp` is in seconds since the epoch. Messages with the same `message_id`, exchange and
    routing key are the same message. `headers` are up to 4096 bytes of text. Raises ValueError for
    values that AMQP cannot carry.
    """

    exchange: str
    routing_key: str
    body: bytes
    message_id: str
    correlation_id: str
    type: str
    app_id: str
    timestamp: int
    content_type: str = "application/json"
    delivery_mode: int = 2
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = [
            *vars(self).items(),
            *((f"a header of {self.type}", name) for name in self.headers),
        ]
        for name, value in texts:
            if isinstance(value, str) and len(value.encode()) > AMQP_SHORTSTR_MAX_BYTES:
                raise ValueError(
                    f"{name} of a message has {len(value.encode())} bytes; "
                    f"AMQP carries at most {AMQP_SHORTSTR_MAX_BYTES}"
                )
        if not 0 <= self.timestamp < 2**63:
            raise ValueError(f"timestamp {self.timestamp} of a message is not an AMQP timestamp")
        headers_bytes = sum(len(f"{name}{value}".encode()) for name, value in self.headers.items())
        if headers_bytes > HEADERS_MAX_BYTES:
            raise ValueError(
                f"the headers of a message have {headers_bytes} bytes; at most {HEADERS_MAX_BYTES} "
                "are allowed"
            )


@dataclass(frozen=True)
class ReceivedMessage:
    """A message as its consumer receives it.

    `headers` are those whose value is text; any client can set them, so they can hold anything.
    `redelivered` is False only if no consumer received this message before.
    """

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    redelivered: bool = False


class Publication(Protocol):
    """A message in transit to a queue."""

    @property
    def overdue(self) -> str | None:
        """A description, if the confirm takes longer than the message's size explains."""

    def wait(self, seconds: float) -> bool:
        """Wait for the confirm; False if there is none within `seconds`.

        Raises:
            Unroutable: No queue accepts the message.
            MessageRefused: The broker permanently refuses it.
            BrokerUnavailable: The result will remain unknown; the message may have arrived.
        """

    def on_settled(self, settled: Callable[[BaseException | None], None]) -> None:
        """Call `settled` with None once the message is confirmed, or with what `wait` would raise.

        It is called once, in any thread, and must not wait; not at all if this process stops
        before. Nothing else may wait for it.
        """


class EventPublisher(Protocol):
    def start(self) -> None:
        """Start to connect, without waiting."""

    def begin(self, message: Message) -> Publication:
        """Send a message without waiting for the confirm.

        A message in transit is not sent again: while the connection lasts it has one publication.
        Waits for the first connection of this process, within the adapter's deadline.
        Raises what `Publication.wait` raises.
        """

    def ping(self) -> None:
        """Return if a message could be published now, and none is overdue.

        Raises `BrokerUnavailable`, and `Unroutable` if the expected queue is missing.
        """

    def close(self) -> None:
        """Close the publisher, within the adapter's deadline."""


class EventConsumer(Protocol):
    def start(self, handle: Callable[[ReceivedMessage], None]) -> None:
        """Call `handle` with each event, several concurrently, until `close`.

        An event is done when `handle` returns, and dead-lettered if it raises `MalformedEvent`. If
        this process dies before that, another consumer receives the event.
        """

    def backlog(self) -> int:
        """Return the number of undelivered events in the queue. Raises `BrokerUnavailable`."""

    def consumers(self) -> int:
        """Return the number of consumers in all processes. Raises `BrokerUnavailable`."""

    def ping(self) -> None:
        """Return if events could be delivered now. Raises `BrokerUnavailable`."""

    def close(self) -> None:
        """Stop consuming, wait a bounded time for events in progress, and requeue the rest."""


@dataclass(frozen=True)
class DeadLetter:
    """A dead-lettered message. `reason` and `at`, by the broker's clock, come from its latest
    `x-death`. `reason` and `message_id` are empty if the message has none."""

    body: bytes
    message_id: str
    reason: str
    at: datetime | None


class DeadLetterConsumer(Protocol):
    """Receives copies of the dead letters of another service's queue, on a queue of Stowgate."""

    def start(self, handle: Callable[[DeadLetter], None]) -> None:
        """Call `handle` with each dead letter until `close`.

        A dead letter is done when `handle` returns. If that raises a `StowgateError`, it is tried
        again, and after `close` goes to another consumer.
        """

    def ping(self) -> None:
        """Return if dead letters are received now. Raises `BrokerUnavailable`."""

    def close(self) -> None:
        """Stop consuming, wait a bounded time for dead letters in progress, requeue the rest."""
