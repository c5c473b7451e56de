"""Rate limits by token bucket."""

import pytest

from api.admission.rate_limits import RateLimiter
from api.http.client_address import sender_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_requests_of_one_minute_may_come_in_a_burst() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)

    assert [limiter.take("a", 6) for _ in range(6)] == [0] * 6
    assert limiter.take("a", 6) == pytest.approx(10)
    clock.now += 9
    assert limiter.take("a", 6) == pytest.approx(1)
    clock.now += 1.001
    assert limiter.take("a", 6) == 0
    assert limiter.take("a", 6) > 9


def test_a_bucket_holds_at_most_the_requests_of_one_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    limiter.take("a", 2)
    clock.now += 3600

    assert [limiter.take("a", 2) > 0 for _ in range(3)] == [False, False, True]


def test_each_name_has_its_own_limit() -> None:
    limiter = RateLimiter(clock=Clock())

    assert (limiter.take("a", 1), limiter.take("b", 1)) == (0, 0)
    assert limiter.take("a", 1) > 0


def test_a_lowered_rate_applies_at_once() -> None:
    limiter = RateLimiter(clock=Clock())
    limiter.take("a", 100)

    assert [limiter.take("a", 1) > 0 for _ in range(2)] == [False, True]


def test_the_name_not_seen_for_longest_is_forgotten_beyond_max_names() -> None:
    limiter = RateLimiter(max_names=2, clock=Clock())
    for name in ("a", "b", "a", "c"):
        limiter.take(name, 2)

    assert limiter.take("a", 2) > 0
    assert limiter.take("b", 2) == 0


@pytest.mark.parametrize(
    ("address", "sender"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1%eth0", "2001:db8:1:2::/64"),
        ("unix:", ""),
        (None, ""),
    ],
)
def test_a_limit_applies_to_an_ipv4_address_or_an_ipv6_network(
    address: str | None, sender: str
) -> None:
    assert sender_of(address) == sender
