"""Limits how many large bodies are sent to the object store concurrently."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

from urllib3.exceptions import HTTPError

from shared.adapters.s3.connections import NoProgress

# A body that takes longer shares the line with too many others, or the store is overloaded.
_SLOW_SECONDS = 3.0

# Initial limit: on a slow line, some of many concurrent bodies would make no progress.
_FIRST_AT_ONCE = 4


class ConcurrencyLimit:
    """Halves the limit after a slow request, and raises it by one after a fast one."""

    def __init__(self, max_running: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_running = max_running
        self._allowed = min(_FIRST_AT_ONCE, max_running)
        self._clock = clock
        self._running = 0
        self.waiting = 0
        self._stalls = 0
        self._changed = Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait while too many requests run. If one of them stalls, all that wait raise
        `NoProgress`, so that a silent store delays no caller for longer than one request."""
        with self._changed:
            stalls = self._stalls
            self.waiting += 1
            self._changed.wait_for(lambda: self._running < self._allowed or self._stalls != stalls)
            self.waiting -= 1
            if self._stalls != stalls:
                raise NoProgress("an earlier request made no progress")
            self._running += 1
        began = self._clock()
        has_failed = False
        try:
            yield
        except HTTPError:
            has_failed = True
            raise
        finally:
            self._end(self._clock() - began > _SLOW_SECONDS, has_failed)

    def _end(self, was_slow: bool, has_failed: bool) -> None:
        with self._changed:
            if was_slow:
                self._allowed = min(self._allowed, max(1, self._running // 2))
                self._stalls += has_failed
            else:
                self._allowed = min(self._allowed + 1, self._max_running)
            self._running -= 1
            self._changed.notify_all()
