"""Removes what opened records leave behind in pending/: not at once, but many by one request.

An object store takes some two milliseconds to remove one object, and a third of one for each of
many. Until then the record lies in both places, where opened/ counts; what a worker that dies had
not removed yet the relay clears away.
"""

from collections.abc import Iterable
from queue import Empty, SimpleQueue

import structlog

from shared.errors import StowgateError
from shared.ports import ObjectStore

_log = structlog.get_logger()

_LOOK_SECONDS = 1.0


class Clearing:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._doomed: SimpleQueue[str] = SimpleQueue()

    def add(self, keys: Iterable[str]) -> None:
        """Have these removed soon. Safe between threads."""
        for key in keys:
            self._doomed.put(key)

    def clear(self, wait_seconds: float = _LOOK_SECONDS) -> None:
        """Remove what was added, and wait so long for it. Errors of the store are logged."""
        try:
            keys = [self._doomed.get(timeout=wait_seconds)]
        except Empty:
            return
        while not self._doomed.empty():
            keys.append(self._doomed.get())
        try:
            self._store.delete(keys)
        except StowgateError as error:
            _log.warning("opened records are left in pending/ to the relay", error=str(error))
