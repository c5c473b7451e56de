"""Checks that an object store does what Stowgate relies on.

Leases, the commit point and the uniqueness of a VAE depend on conditional writes. Some S3 engines
ignore the condition. Others check it and write in two steps, so that several concurrent writers
succeed. Neither causes an error: payloads are lost or opened twice without any sign of it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Protocol, runtime_checkable
from uuid import uuid4

from shared.errors import (
    ObjectMissing,
    StoreRefused,
    StoreUnfit,
    StowgateError,
    VersionConflict,
)
from shared.ports import ObjectStore

PROBES = "stowgate-check"
"""The folder, in each bucket, of the objects that a check writes and removes."""

_WRITERS = 16
# Sizes of the objects, one for each round: large ones keep a store busy with one writer while the
# others arrive, small ones are like leases. VersityGW 1.6 checks the condition and writes in two
# steps; with 32 KiB several of its writers succeed in 39 of 40 rounds.
_RACED_BYTES = (32 << 10, 64, 32 << 10)

_TEXT = "text/plain"
_PART_BYTES = 8 << 20

_ADVICE = (
    "On such a store Stowgate would lose payloads or open them twice, so it does not start: use an "
    "engine and a version that docs/object-stores.md lists, and run stowgate check"
)


class Answer(Protocol):
    """The answer of a store to one write; its text has the status and the S3 error code."""

    @property
    def status(self) -> int: ...


@runtime_checkable
class Raced(Protocol):
    """A store that can get many writes at the same moment."""

    def put_at_once(
        self, key: str, bodies: Sequence[bytes], version: str | None
    ) -> Sequence[Answer]:
        """Create the object, or replace that version of it, once with each body."""


def check_state_bucket(store: ObjectStore) -> None:
    """Check what records, leases and the registry rely on, with concurrent writers on S3.

    Raises `StoreUnfit` if the store does something else. Raises the store's own error if it cannot
    be used at all, for example for lack of permissions.
    """
    with _probes(store) as folder:
        _check_conditions(store, f"{folder}/condition")
        if isinstance(store, Raced):
            for number, size_bytes in enumerate(_RACED_BYTES):
                _race(store, store, f"{folder}/race/{number}", size_bytes)
        _check_deletion(store, f"{folder}/deleted")
        _check_listing(store, f"{folder}/list/")


def check_payload_bucket(store: ObjectStore) -> None:
    """Check what the instances rely on. Raises what `check_state_bucket` raises."""
    with _probes(store) as folder:
        _check_conditions(store, f"{folder}/condition")
        _check_multipart(store, f"{folder}/multipart")
        _check_deletion(store, f"{folder}/deleted")
        _check_listing(store, f"{folder}/list/")


@contextmanager
def _probes(store: ObjectStore) -> Iterator[str]:
    """Check plain reads and writes, and yield a folder for the objects of the other checks."""
    folder = f"{PROBES}/{uuid4()}"
    _check_reads(store, f"{folder}/read")
    try:
        yield folder
    except StoreRefused as error:
        # Plain writes and reads succeeded, so the store lacks what this check needs.
        raise StoreUnfit(f"{error}. {_ADVICE}") from error
    finally:
        # Another check reports why the store cannot remove them.
        with suppress(StowgateError):
            store.delete([found.key for found in store.list(f"{folder}/")])


def _check_reads(store: ObjectStore, key: str) -> None:
    store.put(key, BytesIO(b"first"), 5, _TEXT)
    store.put(key, BytesIO(b"0123456789"), 10, _TEXT)
    found = store.get(key)
    _expect(found.data, b"0123456789", "an object that was written and read again")
    _expect(store.get(key).version, found.version, "the ETag of an object that was read twice")
    for start, length, data in ((2, 3, b"234"), (8, 5, b"89"), (10, 1, b"")):
        _expect(
            store.read_range(key, start, length), data, f"a range of {length} bytes from {start}"
        )


def _check_conditions(store: ObjectStore, key: str) -> None:
    first = store.create(key, b"1", _TEXT)
    _expect(store.get(key).version, first, "the ETag of an object after it was created")
    if not _conflicts(lambda: store.create(key, b"2", _TEXT)):
        raise StoreUnfit(
            "a write with If-None-Match: * succeeded although the object existed, so the store "
            f"ignores the condition. {_ADVICE}"
        )
    second = store.replace(key, b"3", first, _TEXT)
    _expect(store.get(key).version, second, "the ETag of an object after it was replaced")
    if not _conflicts(lambda: store.replace(key, b"4", first, _TEXT)):
        raise StoreUnfit(
            "a write with If-Match succeeded although the object had another version, so the "
            f"store ignores the condition. {_ADVICE}"
        )
    _expect(store.get(key).data, b"3", "an object after refused writes")


def _race(store: ObjectStore, raced: Raced, key: str, size_bytes: int) -> None:
    bodies = [b"%02d" % number + bytes(size_bytes) for number in range(2 * _WRITERS)]
    # Two writers of the same bytes would get the same ETag.
    created, replaced = bodies[:_WRITERS], bodies[_WRITERS:]
    _judge(store, key, created, raced.put_at_once(key, created, None), "created one object")
    try:
        version = store.get(key).version
    except ObjectMissing:  # S3 may ask every writer to try again
        version = store.create(key, b"x", _TEXT)
    answers = raced.put_at_once(key, replaced, version)
    _judge(store, key, replaced, answers, "replaced one version of an object")


def _judge(
    store: ObjectStore, key: str, bodies: Sequence[bytes], answers: Sequence[Answer], doing: str
) -> None:
    told = f"of {len(bodies)} concurrent writers that {doing}"
    if odd := [str(answer) for answer in answers if not _is_expected(answer.status)]:
        counts = Counter(odd)
        words = ", ".join(f"{number} {answer}" for answer, number in counts.items())
        raise StoreUnfit(
            f"{told}, some got neither success (200) nor a failed condition (412): {words}. "
            f"{_ADVICE}"
        )
    winners = [
        body for body, answer in zip(bodies, answers, strict=True) if _is_success(answer.status)
    ]
    if len(winners) > 1:
        raise StoreUnfit(
            f"{told}, {len(winners)} succeeded instead of one: the store does not check the "
            f"condition and write in one step. {_ADVICE}"
        )
    if winners:
        _expect(store.get(key).data, winners[0], f"the object, {told},")


def _is_success(status: int) -> bool:
    return 200 <= status < 300


def _is_expected(status: int) -> bool:
    """S3 may also answer 409 (ConditionalRequestConflict), 404 to If-Match, and 5xx under load."""
    return _is_success(status) or status in (404, 409, 412, 429, 500, 502, 503, 504)


def _check_multipart(store: ObjectStore, key: str) -> None:
    size_bytes = _PART_BYTES + 2
    data = BytesIO(bytes(_PART_BYTES) + b"12")
    writing = store.begin(key, data, "application/dicom", size_bytes)
    try:
        writing.proceed(_PART_BYTES)
        try:
            store.read_range(key, 0, 1)
        except ObjectMissing:
            pass
        else:
            raise StoreUnfit(f"an object was visible before its multipart upload ended. {_ADVICE}")
        writing.finish(size_bytes)
    finally:
        writing.abandon()
    end = store.read_range(key, _PART_BYTES - 1, 10)
    _expect(end, b"\00012", "the end of an object that was written in two parts")


def _check_listing(store: ObjectStore, prefix: str) -> None:
    names = ["a-b", "a/b", "a/c", "a0", "b"]
    for name in reversed(names):
        store.put(f"{prefix}{name}", BytesIO(b"x"), 1, _TEXT)
    listed = [found.key.removeprefix(prefix) for found in store.list(prefix)]
    _expect(listed, names, "a listing in the byte order of the keys")
    later = [found.key.removeprefix(prefix) for found in store.list(prefix, f"{prefix}a/b")]
    _expect(later, names[2:], "a listing after a key (start-after)")
    _expect(next(store.folders(PROBES[:-1]), ""), PROBES, "a listing of folders (delimiter)")
    store.delete([f"{prefix}{name}" for name in [*names, "never"]])
    _expect(list(store.list(prefix)), [], "a listing after its objects were deleted in one request")


def _check_deletion(store: ObjectStore, key: str) -> None:
    version = store.create(key, b"1", _TEXT)
    store.delete([key])
    try:
        store.get(key)
    except ObjectMissing:
        pass
    else:
        raise StoreUnfit(f"a deleted object still exists. {_ADVICE}")
    if not _conflicts(lambda: store.replace(key, b"2", version, _TEXT)):
        raise StoreUnfit(
            "a write with If-Match succeeded although the object was deleted; if the bucket keeps "
            f"versions, use one that keeps none. {_ADVICE}"
        )
    if _conflicts(lambda: store.create(key, b"3", _TEXT)):
        raise StoreUnfit(
            "a write with If-None-Match: * was refused although the object was deleted; if the "
            f"bucket keeps versions, use one that keeps none. {_ADVICE}"
        )


def _conflicts(write: Callable[[], object]) -> bool:
    try:
        write()
    except VersionConflict:
        return True
    return False


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        shown = f"{found!r:.100}"
        raise StoreUnfit(f"{what} was {shown} instead of {expected!r:.100}. {_ADVICE}")
