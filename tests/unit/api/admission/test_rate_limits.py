"""How often somebody may do something."""

import pytest

from api.admission.rate_limits import Rates, sender_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_worth_may_come_at_once_and_then_as_fast_as_the_rate() -> None:
    clock = Clock()
    rates = Rates(clock=clock)

    assert [rates.take("a", 6) for _ in range(6)] == [0] * 6
    assert rates.take("a", 6) == pytest.approx(10)
    clock.now += 9
    assert rates.take("a", 6) == pytest.approx(1)
    clock.now += 1.001
    assert rates.take("a", 6) == 0
    assert rates.take("a", 6) > 9


def test_no_more_is_saved_up_than_a_minutes_worth() -> None:
    clock = Clock()
    rates = Rates(clock=clock)
    rates.take("a", 2)
    clock.now += 3600

    assert [rates.take("a", 2) > 0 for _ in range(3)] == [False, False, True]


def test_each_has_a_bucket_of_its_own() -> None:
    rates = Rates(clock=Clock())

    assert (rates.take("a", 1), rates.take("b", 1)) == (0, 0)
    assert rates.take("a", 1) > 0


def test_a_rate_that_is_lowered_counts_at_once() -> None:
    rates = Rates(clock=Clock())
    rates.take("a", 100)

    assert [rates.take("a", 1) > 0 for _ in range(2)] == [False, True]


def test_of_more_names_than_are_remembered_the_longest_unseen_is_forgotten() -> None:
    rates = Rates(most_names=2, clock=Clock())
    for name in ("a", "b", "a", "c"):
        rates.take(name, 2)

    assert rates.take("a", 2) > 0
    assert rates.take("b", 2) == 0


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
def test_a_sender_is_an_address_or_the_network_of_one_host(
    address: str | None, sender: str
) -> None:
    assert sender_of(address) == sender
