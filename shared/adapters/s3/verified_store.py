"""Object stores that are checked once, before anything is stored there."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from threading import Event
from typing import BinaryIO, Protocol

import orjson
import structlog

from shared.adapters.s3.conformance import PROBES, check_payload_bucket, check_state_bucket
from shared.errors import (
    ObjectMissing,
    Permanent,
    StoreRefused,
    StoreUnavailable,
    StoreUnfit,
    StowgateError,
    VersionConflict,
)
from shared.ports import ListedObject, ObjectStore, StoredObject, Writing
from shared.time import iso_utc, utc_now

_log = structlog.get_logger()

PASSED = f"{PROBES}/passed.json"
"""The object in the state bucket with the stores that passed, by the addresses in the settings. A
store with another address or engine is checked again, for example after a restore from a backup."""

_MAX_REMEMBERED = 50
_JSON = "application/json"


class NamedStore(ObjectStore, Protocol):
    def identify(self) -> str:
        """Return the address of the store and the name of its engine."""


class Verification:
    """Checks both buckets before they are used. Safe between threads."""

    def __init__(self, *, instances: NamedStore, state: NamedStore) -> None:
        self._instances = instances
        self._state = state
        self._passed = Event()
        self._failure: StowgateError = StoreUnavailable("it has not answered yet")

    def run(self) -> None:
        """Create missing buckets, and check both unless they have passed before.

        Raises `StoreUnfit`, and the errors of the store.
        """
        try:
            self._run()
        except StowgateError as error:
            self._failure = error
            raise
        self._passed.set()

    def require(self) -> None:
        """Raise `StoreUnavailable` or `StoreRefused` unless the buckets may be used."""
        if not self._passed.is_set():
            kind = StoreRefused if isinstance(self._failure, Permanent) else StoreUnavailable
            raise kind(f"the object store is not verified yet: {self._failure}")

    def _run(self) -> None:
        self._instances.prepare()
        self._state.prepare()
        stores = [self._state.identify(), self._instances.identify()]
        if stores in _passed(self._state)[0]:
            return
        checks = (check_state_bucket, self._state), (check_payload_bucket, self._instances)
        for name, (check, store) in zip(stores, checks, strict=True):
            try:
                check(store)
            except StoreUnfit as error:
                raise StoreUnfit(f"{name}: {error}") from error
        _log.info("object store verified", stores=stores)
        # If it cannot be remembered, for example on a full store, the next start checks again.
        with suppress(StowgateError):
            remember(self._state, stores)


def remember(state: ObjectStore, stores: list[str]) -> None:
    """Note in the state bucket that these two have passed, by the names of `identify`."""
    while True:
        passed, version = _passed(state)
        kept = [other for other in passed if other != stores][-_MAX_REMEMBERED:]
        row = {"version": 1, "passed": [*kept, stores], "at": iso_utc(utc_now())}
        data = orjson.dumps(row, option=orjson.OPT_INDENT_2)
        with suppress(VersionConflict):
            if version is None:
                state.create(PASSED, data, _JSON)
            else:
                state.replace(PASSED, data, version, _JSON)
            return


def _passed(state: ObjectStore) -> tuple[list[object], str | None]:
    """Return the stores that passed, and the version of the object `PASSED`."""
    try:
        found = state.get(PASSED)
    except ObjectMissing:
        return [], None
    try:
        passed = orjson.loads(found.data)["passed"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        passed = []
    return passed if isinstance(passed, list) else [], found.version


class VerifiedObjectStore:
    """A bucket that is used only after verification. Until then every call except `prepare` raises
    the errors of `Verification.require`."""

    def __init__(self, store: ObjectStore, verification: Verification) -> None:
        self._store = store
        self._verification = verification

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
        self._verified().put(key, data, size_bytes, content_type, sha256)

    def begin(self, key: str, data: BinaryIO, content_type: str, max_bytes: int) -> Writing:
        return self._verified().begin(key, data, content_type, max_bytes)

    def create(self, key: str, data: bytes, content_type: str) -> str:
        return self._verified().create(key, data, content_type)

    def replace(self, key: str, data: bytes, version: str, content_type: str) -> str:
        return self._verified().replace(key, data, version, content_type)

    def get(self, key: str) -> StoredObject:
        return self._verified().get(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._verified().read_range(key, start, length)

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        return self._verified().list(prefix, after)

    def folders(self, after: str) -> Iterator[str]:
        return self._verified().folders(after)

    def delete(self, keys: Iterable[str]) -> None:
        self._verified().delete(keys)

    def check_room(self) -> None:
        self._verified().check_room()

    def keeps_removed(self) -> bool:
        return self._store.keeps_removed()

    def ping(self) -> None:
        self._verified().ping()

    def _verified(self) -> ObjectStore:
        self._verification.require()
        return self._store
