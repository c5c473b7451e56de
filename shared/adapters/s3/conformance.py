"""Whether an object store does what Stowgate relies on.

Leases, the commit point and the uniqueness of a VAE stand on conditional writes. Some S3 engines
ignore the condition, and some check it and write in two steps, so that several writers succeed at
once. Neither is seen in use: payloads are lost or opened twice, in silence.
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
"""Folder, in each bucket, of the objects that a check writes and removes again."""

_WRITERS = 16
# By round, so that a store is busy with one writer while the others arrive, whatever keeps it busy.
# VersityGW 1.6, which checks the condition and writes in two steps, lets several writers of 32 KiB
# through in 39 of 40 rounds.
_RACED_BYTES = (32 << 10, 64, 32 << 10)

_TEXT = "text/plain"
_PART_BYTES = 8 << 20

_ADVICE = (
    "Stowgate would lose payloads or open them twice on such a store, and does not start: take an "
    "engine and a version that docs/object-stores.md lists, and try it with stowgate check"
)


class Answer(Protocol):
    """What a store answered to one write; its text names it."""

    @property
    def status(self) -> int: ...


@runtime_checkable
class Raced(Protocol):
    """A store that many may write to at the same moment."""

    def put_at_once(
        self, key: str, bodies: Sequence[bytes], version: str | None
    ) -> Sequence[Answer]:
        """Have a writer for each body create the object, or replace that version of it."""


def check_state_bucket(store: ObjectStore) -> None:
    """Check what records, leases and registry rely on, and race the store where it can be raced.

    Raises `StoreUnfit` where the store does anything otherwise, and what the store raises where it
    cannot be used at all, such as for want of permissions.
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
    """A folder for objects to try the store with, after plain reads and writes succeeded there."""
    folder = f"{PROBES}/{uuid4()}"
    _check_reads(store, f"{folder}/read")
    try:
        yield folder
    except StoreRefused as error:
        # Plain writes and reads succeeded, so this is what the store cannot do.
        raise StoreUnfit(f"{error}. {_ADVICE}") from error
    finally:
        # What keeps the store from removing them is found, or was said, elsewhere.
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
            "a write with If-None-Match: * was answered with success although the object was "
            f"there, so the store ignores the condition. {_ADVICE}"
        )
    second = store.replace(key, b"3", first, _TEXT)
    _expect(store.get(key).version, second, "the ETag of an object after it was replaced")
    if not _conflicts(lambda: store.replace(key, b"4", first, _TEXT)):
        raise StoreUnfit(
            "a write with If-Match was answered with success although the object had another "
            f"version, so the store ignores the condition. {_ADVICE}"
        )
    _expect(store.get(key).data, b"3", "an object after writes that were refused")


def _race(store: ObjectStore, raced: Raced, key: str, size_bytes: int) -> None:
    bodies = [b"%02d" % number + bytes(size_bytes) for number in range(2 * _WRITERS)]
    # Two writers of the same bytes would have the same ETag.
    created, replaced = bodies[:_WRITERS], bodies[_WRITERS:]
    _judge(store, key, created, raced.put_at_once(key, created, None), "created one object")
    try:
        version = store.get(key).version
    except ObjectMissing:  # every writer was told to try again, as S3 may
        version = store.create(key, b"x", _TEXT)
    answers = raced.put_at_once(key, replaced, version)
    _judge(store, key, replaced, answers, "replaced one version of an object")


def _judge(
    store: ObjectStore, key: str, bodies: Sequence[bytes], answers: Sequence[Answer], doing: str
) -> None:
    told = f"of {len(bodies)} writers that {doing} at the same time"
    if odd := [str(answer) for answer in answers if not _is_expected(answer.status)]:
        counts = Counter(odd)
        words = ", ".join(f"{number} {answer}" for answer, number in counts.items())
        raise StoreUnfit(
            f"{told}, some were answered with neither success (200) nor a failed condition (412): "
            f"{words}. {_ADVICE}"
        )
    winners = [
        body for body, answer in zip(bodies, answers, strict=True) if _is_success(answer.status)
    ]
    if len(winners) > 1:
        raise StoreUnfit(
            f"{told}, {len(winners)} were answered with success, where one may be: the store "
            f"does not check the condition and write in one step. {_ADVICE}"
        )
    if winners:
        _expect(store.get(key).data, winners[0], f"the object, {told},")


def _is_success(status: int) -> bool:
    return 200 <= status < 300


def _is_expected(status: int) -> bool:
    """S3 may also answer 409 (ConditionalRequestConflict), 404 to If-Match, and 5xx when it is
    busy."""
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
            raise StoreUnfit(f"an object showed before its multipart upload ended. {_ADVICE}")
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
    _expect(listed, names, "a listing, by the bytes of the keys")
    behind = [found.key.removeprefix(prefix) for found in store.list(prefix, f"{prefix}a/b")]
    _expect(behind, names[2:], "a listing behind a key (start-after)")
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
        raise StoreUnfit(f"an object that was deleted is still there. {_ADVICE}")
    if not _conflicts(lambda: store.replace(key, b"2", version, _TEXT)):
        raise StoreUnfit(
            "a write with If-Match was answered with success although the object was deleted; "
            f"if the bucket keeps versions, take one that keeps none. {_ADVICE}"
        )
    if _conflicts(lambda: store.create(key, b"3", _TEXT)):
        raise StoreUnfit(
            "a write with If-None-Match: * was refused although the object was deleted; if the "
            f"bucket keeps versions, take one that keeps none. {_ADVICE}"
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
