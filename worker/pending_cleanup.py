"""Removes what opened records leave behind in pending/: not at once, but many by one request.

An object store takes some two milliseconds to remove one object, and a third of one for each of
many. Until then the record lies in both places, where opened/ counts. What a worker that dies had
not removed yet, another one does when the relay announces it again.
"""

from collections.abc import Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue

import structlog

from shared.errors import Permanent, Transient
from shared.ports import ObjectStore

_log = structlog.get_logger()

_WAIT_SECONDS = 1.0

# As many are kept while the store is away; the relay sees to more.
_MAX_KEPT = 10_000


class PendingCleanup:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._keys: SimpleQueue[str] = SimpleQueue()

    def add(self, keys: Iterable[str]) -> None:
        """Have these removed soon. Safe between threads."""
        for key in keys:
            self._keys.put(key)

    def run_once(self, wait_seconds: float = _WAIT_SECONDS) -> None:
        """Remove what was added, and wait so long for something. Errors of the store are logged;
        after one that may pass, the same is tried again the next time."""
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
