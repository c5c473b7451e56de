"""Rate limits by token bucket."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimiter:
    """Keeps a token bucket for each name. Thread-safe.

    A bucket holds the requests of one minute, which may come in one burst, and refills evenly.

    Args:
        max_names: Beyond this number, the name that was not seen for longest is forgotten.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self, max_names: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_names = max_names
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str, per_minute: int) -> float:
        """Count one request of `name`.

        Returns:
            0, or if the rate limit is exceeded, the seconds until the next request is allowed.
        """
        with self._lock:
            now = self._clock()
            bucket = self._buckets.setdefault(name, _Bucket(per_minute, now))
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._max_names:
                self._buckets.popitem(last=False)
            gained = (now - bucket.filled_at) * per_minute / 60
            bucket.tokens = min(per_minute, bucket.tokens + gained)
            bucket.filled_at = now
            if bucket.tokens < 1:
                return (1 - bucket.tokens) * 60 / per_minute
            bucket.tokens -= 1
            return 0
