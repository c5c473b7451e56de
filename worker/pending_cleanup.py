"""Removes the leftovers of opened records in pending/, many with one request.

An object store takes about 2 ms to remove one object, and 0.3 ms for each of many. Until a leftover
is removed the record lies in both places, and opened/ counts. After a crash of this worker another
one removes the leftover when the relay announces it again.
"""

from collections.abc import Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue

import structlog

from shared.errors import Permanent, Transient
from shared.ports import ObjectStore

_log = structlog.get_logger()

_WAIT_SECONDS = 1.0

# Keys that are kept while the store is unavailable; the relay finds any others.
_MAX_KEPT = 10_000


class PendingCleanup:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._keys: SimpleQueue[str] = SimpleQueue()

    def add(self, keys: Iterable[str]) -> None:
        """Queue `keys` for removal. Safe between threads."""
        for key in keys:
            self._keys.put(key)

    def run_once(self, wait_seconds: float = _WAIT_SECONDS) -> None:
        """Wait up to `wait_seconds` for a key, then remove all that are queued.

        Errors of the store are logged, and after a transient one the keys are queued again.
        """
        keys: list[str] = []
        with suppress(Empty):
            keys.append(self._keys.get(timeout=wait_seconds))
            while True:
                keys.append(self._keys.get_nowait())
        if not keys:
            return
        try:
            self._store.delete(keys)
        except Transient as error:
            self.add(keys[:_MAX_KEPT])
            _log.warning("opened records stay in pending/ for now", error=str(error))
        except Permanent as error:
            _log.error("opened records stay in pending/", error=str(error))
