"""Ports whose calls are measured: how long each took, and its outcome."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from shared.errors import (
    BrokerUnavailable,
    MessageRefused,
    ObjectMissing,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StowgateError,
    Unroutable,
    VersionConflict,
)
from shared.ports import (
    EventPublisher,
    ListedObject,
    Message,
    ObjectStore,
    Publication,
    StoredObject,
    Writing,
)

if TYPE_CHECKING:
    # `cli/serve.py` imports this module before prometheus_client may be imported.
    from prometheus_client import Histogram

_T = TypeVar("_T")

_OUTCOMES: tuple[tuple[type[StowgateError], str], ...] = (
    (StoreUnavailable, "unavailable"),
    (BrokerUnavailable, "unavailable"),
    (StoreFull, "full"),
    (StoreRefused, "refused"),
    (MessageRefused, "refused"),
    (ObjectMissing, "missing"),
    (VersionConflict, "conflict"),
    (Unroutable, "unroutable"),
)


class Calls:
    """Observes calls in a histogram with the labels `operation` and `outcome`."""

    def __init__(self, histogram: "Histogram") -> None:
        self._histogram = histogram

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        began_at = time.monotonic()
        try:
            yield
        except Exception as error:
            self.observe(operation, outcome_of(error), time.monotonic() - began_at)
            raise
        self.observe(operation, "ok", time.monotonic() - began_at)

    def observe(self, operation: str, outcome: str, seconds: float) -> None:
        self._histogram.labels(operation, outcome).observe(seconds)

    def timed_iteration(self, operation: str, found: Iterator[_T]) -> Iterator[_T]:
        """Yield from `found`; observe the time in it, without that of its reader."""
        seconds, outcome = 0.0, "ok"
        try:
            while True:
                began_at = time.monotonic()
                try:
                    item = next(found)
                except StopIteration:
                    return
                except Exception as error:
                    outcome = outcome_of(error)
                    raise
                finally:
                    seconds += time.monotonic() - began_at
                yield item
        finally:
            self.observe(operation, outcome, seconds)


def outcome_of(error: BaseException) -> str:
    """Return the label for the error of a call."""
    return next((word for kind, word in _OUTCOMES if isinstance(error, kind)), "error")


class MeasuredObjectStore:
    """A bucket whose calls are measured, but those that only check or prepare it."""

    def __init__(self, store: ObjectStore, calls: Calls) -> None:
        self._store = store
        self._calls = calls

    def prepare(self) -> None:
        self._store.prepare()

    def put(
        self,
        key: str,
        data: BinaryIO,
        size_bytes: int,
        content_type: str,
        sha256: str | None = None,
    ) -> None:
        with self._calls.timed("put"):
            self._store.put(key, data, size_bytes, content_type, sha256)

    def begin(self, key: str, data: BinaryIO, content_type: str, max_bytes: int) -> Writing:
        return _MeasuredWriting(self._store.begin(key, data, content_type, max_bytes), self._calls)

    def create(self, key: str, data: bytes, content_type: str) -> str:
        with self._calls.timed("create"):
            return self._store.create(key, data, content_type)

    def replace(self, key: str, data: bytes, version: str, content_type: str) -> str:
        with self._calls.timed("replace"):
            return self._store.replace(key, data, version, content_type)

    def get(self, key: str) -> StoredObject:
        with self._calls.timed("get"):
            return self._store.get(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._calls.timed("read_range"):
            return self._store.read_range(key, start, length)

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        return self._calls.timed_iteration("list", self._store.list(prefix, after))

    def folders(self, after: str) -> Iterator[str]:
        return self._calls.timed_iteration("folders", self._store.folders(after))

    def delete(self, keys: Iterable[str]) -> None:
        with self._calls.timed("delete"):
            self._store.delete(keys)

    def check_room(self) -> None:
        self._store.check_room()

    def ping(self) -> None:
        with self._calls.timed("ping"):
            self._store.ping()

    def keeps_removed(self) -> bool:
        return self._store.keeps_removed()


class _MeasuredWriting:
    """Measures how long the end of an upload waits for the store."""

    def __init__(self, writing: Writing, calls: Calls) -> None:
        self._writing = writing
        self._calls = calls

    @property
    def has_failed(self) -> bool:
        return self._writing.has_failed

    def proceed(self, size_bytes: int) -> None:
        self._writing.proceed(size_bytes)

    def finish(self, size_bytes: int) -> None:
        with self._calls.timed("finish"):
            self._writing.finish(size_bytes)

    def abandon(self) -> None:
        self._writing.abandon()


class MeasuredEventPublisher:
    """A publisher whose publications are measured until their confirms."""

    def __init__(self, publisher: EventPublisher, calls: Calls, operation: str) -> None:
        """`operation` is the label of its publications."""
        self._publisher = publisher
        self._calls = calls
        self._operation = operation

    def start(self) -> None:
        self._publisher.start()

    def begin(self, message: Message) -> Publication:
        began_at = time.monotonic()

        def observe(outcome: str) -> None:
            self._calls.observe(self._operation, outcome, time.monotonic() - began_at)

        try:
            publication = self._publisher.begin(message)
        except StowgateError as error:
            observe(outcome_of(error))
            raise
        return _MeasuredPublication(publication, observe)

    def ping(self) -> None:
        with self._calls.timed("ping"):
            self._publisher.ping()

    def close(self) -> None:
        self._publisher.close()


class _MeasuredPublication:
    def __init__(self, publication: Publication, observe: Callable[[str], None]) -> None:
        self._publication = publication
        self._observe = observe

    @property
    def overdue(self) -> str | None:
        return self._publication.overdue

    def wait(self, seconds: float) -> bool:
        try:
            is_confirmed = self._publication.wait(seconds)
        except StowgateError as error:
            self._observe(outcome_of(error))
            raise
        if is_confirmed:
            self._observe("ok")
        return is_confirmed

    def on_settled(self, settled: Callable[[BaseException | None], None]) -> None:
        observe = self._observe  # a reference to this publication would be a cycle

        def measured(error: BaseException | None) -> None:
            observe("ok" if error is None else outcome_of(error))
            settled(error)

        self._publication.on_settled(measured)
