"""What the two services need of the outside: an object store, and the two ends of the events.

Each port has one contract test, in `tests/contract/`, that every adapter passes.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO, Protocol


@dataclass(frozen=True)
class StoredObject:
    """An object's bytes, and the version that a conditional write may name."""

    data: bytes
    version: str


@dataclass(frozen=True)
class ListedObject:
    key: str
    size_bytes: int
    modified_at: datetime


KEY_MAX_BYTES = 1024
"""Of a whole key in UTF-8, as in S3."""

KEY_NAME_MAX_BYTES = 255
"""Of each name in a key, as in most file systems."""

_NAME = r"[^./\x00-\x1f\x7f-\x9f][^/\x00-\x1f\x7f-\x9f]*+"
_KEY = re.compile(rf"{_NAME}(?:/{_NAME})*+")


def check_key(key: str) -> None:
    """Raise `ValueError` for a key that not every store can hold.

    A key is `/`-separated names of up to 255 bytes, together up to 1024, none empty, none beginning
    with a dot, none with control characters.
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
        raise ValueError(f"no key for an object: {key!r}")


def check_prefix(prefix: str) -> None:
    """Raise `ValueError` for a prefix that is neither empty nor a key with a `/` behind it."""
    if prefix:
        if not prefix.endswith("/"):
            raise ValueError(f"no prefix of keys, as it ends without a slash: {prefix!r}")
        check_key(prefix.removesuffix("/"))


class Writing(Protocol):
    """An object that is written while its data still come. Nothing of it shows before `finish`.

    Once it `has_failed`, `finish` will raise.
    """

    @property
    def has_failed(self) -> bool: ...

    def proceed(self, size_bytes: int) -> None:
        """The first `size_bytes` of the data can be read by now. Does not wait, or raise."""

    def finish(self, size_bytes: int) -> None:
        """These are all of the data. Returns and raises as `put` does."""

    def abandon(self) -> None:
        """Leave nothing, as far as the store answers; does nothing once it was finished."""


class ObjectStore(Protocol):
    """One bucket. A key is a relative path of `/`-separated names that are safe in a file system
    (`check_key`): anything else is a programming error, `ValueError`.

    What a call that writes has returned for is durable, and visible to every reader. Every call may
    raise `StoreUnavailable` or `StoreRefused`, and every write `StoreFull`.
    """

    def prepare(self) -> None:
        """Create the bucket where it is missing."""

    def put(
        self,
        key: str,
        data: BinaryIO,
        size_bytes: int,
        content_type: str,
        sha256: str | None = None,
    ) -> None:
        """Write the first `size_bytes` of `data`, all or nothing, over what may be there.

        `data` can seek. `sha256` is its digest, in hexadecimal, where that is known; a store may
        hold what reaches it against that.
        """

    def begin(self, key: str, data: BinaryIO, content_type: str, max_bytes: int) -> Writing:
        """Write what `data` will have, `max_bytes` at most, over what may be there.

        `data` can seek, and is read by several threads, one at a time, until the writing ends.
        Does not wait; what goes wrong is raised by `Writing.finish`.
        """

    def create(self, key: str, data: bytes, content_type: str) -> str:
        """Write only where nothing is, and return the version.

        Raises `VersionConflict` where something is there: of any number of callers at once, one
        succeeds. Meant for small objects.
        """

    def replace(self, key: str, data: bytes, version: str, content_type: str) -> str:
        """Write only over that version, and return the new one.

        Raises `VersionConflict` where another version, or nothing, is there.
        """

    def get(self, key: str) -> StoredObject:
        """Read a whole small object. Raises `ObjectMissing`."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read `length` bytes from offset `start`, fewer at the end. Raises `ObjectMissing`."""

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        """Every object whose key begins with `prefix` and sorts behind `after`, by key.

        Lazy: a caller that stops early does not pay for the rest. `prefix` is empty or ends in `/`.
        """

    def folders(self, after: str) -> Iterator[str]:
        """The names before the first `/` of all keys, each once, behind `after`, in order. Lazy."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove these; a key with nothing under it is no error.

        One that cannot be removed keeps none of the others; it is named in what is raised then.
        """

    def check_room(self) -> None:
        """Raises `StoreFull` where the store is known to be past its watermark."""

    def ping(self) -> None:
        """Return when the bucket can be reached."""

    def keeps_removed(self) -> bool:
        """Whether what is removed stays as versions for good, which each listing passes over.

        False where the store does not tell.
        """


AMQP_SHORTSTR_MAX_BYTES = 255
"""AMQP 0-9-1, 4.2.5.3: exchange, routing key and the string properties are short strings."""


@dataclass(frozen=True)
class Message:
    """One message with the AMQP 0-9-1 basic properties that the two contracts use.

    `timestamp` is in whole seconds since the epoch. Two with one `message_id`, exchange and routing
    key are the same message. Raises ValueError for what AMQP cannot carry.
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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str) and len(value.encode()) > AMQP_SHORTSTR_MAX_BYTES:
                raise ValueError(
                    f"{name} of a message has {len(value.encode())} bytes; "
                    f"AMQP carries at most {AMQP_SHORTSTR_MAX_BYTES}"
                )
        if not 0 <= self.timestamp < 2**63:
            raise ValueError(f"timestamp {self.timestamp} of a message is no AMQP timestamp")


class Publication(Protocol):
    """A message on its way to a queue."""

    @property
    def overdue(self) -> str | None:
        """In words, where the broker's confirm takes longer than the message's size explains."""

    def wait(self, seconds: float) -> bool:
        """Whether a queue has the message for good; False where that is not known in `seconds`.

        Raises `Unroutable` when no queue takes it, `MessageRefused`, and `BrokerUnavailable` when
        nobody will know any more; the message may then have arrived all the same.
        """


class EventPublisher(Protocol):
    @property
    def overdue(self) -> str | None:
        """In words, a publication that is overdue, where there is one."""

    def begin(self, message: Message) -> Publication:
        """Send a message, without waiting for what becomes of it.

        A message that is on its way already is not sent again: it has one publication for as long
        as the connection lives. Raises what `Publication.wait` raises.
        """

    def publish(self, message: Message) -> None:
        """Return once a queue has the message for good.

        Raises what `Publication.wait` raises, and `BrokerUnavailable` when it is overdue.
        """

    def ping(self) -> None:
        """Return when a message could be published now; raises `BrokerUnavailable`."""

    def close(self) -> None:
        """Stop; waits no longer than the adapter's deadline."""


class EventConsumer(Protocol):
    def start(self, handle: Callable[[bytes], None]) -> None:
        """Call `handle` with the body of each event, several at a time, until closed.

        An event is done when `handle` returns, and dead-lettered when it raises `MalformedEvent`.
        Until then it belongs to this consumer, and goes to another one if this process dies.
        """

    def backlog(self) -> int:
        """How many events wait in the queue, untaken. Raises `BrokerUnavailable`."""

    def consumers(self) -> int:
        """How many consume the queue now, in all processes. Raises `BrokerUnavailable`."""

    def ping(self) -> None:
        """Return when events could be delivered now; raises `BrokerUnavailable`."""

    def close(self) -> None:
        """Take no more events, wait a bounded time for those in hand, hand back the rest."""


@dataclass(frozen=True)
class DeadLetter:
    """A message that left a queue undone. `reason` is what its last `x-death` says, empty where
    there is none, and `at` when that was, by the broker's clock. `message_id` is empty where the
    message has none."""

    body: bytes
    message_id: str
    reason: str
    at: datetime | None


class DeadLetterConsumer(Protocol):
    """Receives copies of what somebody else's queue dead-letters, on a queue of our own."""

    def start(self, handle: Callable[[DeadLetter], None]) -> None:
        """Call `handle` with each, several at a time, until closed.

        One is done when `handle` returns. Where that raises a `StowgateError` the same one is
        tried again until it is done or this is closed; then it goes to another consumer.
        """

    def ping(self) -> None:
        """Return when dead letters are received now; raises `BrokerUnavailable`."""

    def close(self) -> None:
        """Take no more, wait a bounded time for those in hand, hand back the rest."""
