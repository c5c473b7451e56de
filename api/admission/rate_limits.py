"""How often somebody may do something: a token bucket for each."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Network

from api.http.client_address import address_of


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class Rates:
    """Counts for up to `most_names` names, each with a bucket of its own. Safe between threads.

    A bucket holds what a minute allows, so that much may come at once, and fills evenly. Of more
    names the one that was not seen for the longest is forgotten, and has a full bucket again.
    """

    def __init__(
        self, most_names: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_names = most_names
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str, per_minute: int) -> float:
        """Count one for `name`. Returns 0, or without counting it the seconds until it may be."""
        with self._lock:
            now = self._clock()
            bucket = self._buckets.setdefault(name, _Bucket(per_minute, now))
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._most_names:
                self._buckets.popitem(last=False)
            gained = (now - bucket.filled_at) * per_minute / 60
            bucket.tokens = min(per_minute, bucket.tokens + gained)
            bucket.filled_at = now
            if bucket.tokens < 1:
                return (1 - bucket.tokens) * 60 / per_minute
            bucket.tokens -= 1
            return 0


def sender_of(address: str | None) -> str:
    """Whom a rate counts for: an IPv4 address, or the /64 of an IPv6 one, all of which one host
    may use (RFC 4291 2.5.4)."""
    ip = address_of(address)
    if ip is None:
        return ""
    return str(ip) if ip.version == 4 else str(IPv6Network((ip, 64), strict=False))
