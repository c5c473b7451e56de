"""The concurrency of large bodies to the object store, which depends on their duration."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from threading import Barrier, BrokenBarrierError

import pytest
from service import wait_for
from urllib3.exceptions import HTTPError, ProtocolError

from shared.adapters.s3.concurrency import ConcurrencyLimit
from shared.adapters.s3.connections import NoProgress


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limit(clock: Clock) -> ConcurrencyLimit:
    return ConcurrencyLimit(16, clock)


def send_together(limit: ConcurrencyLimit, count: int, on_the_way: Callable[[], None]) -> None:
    with ExitStack() as turns:
        for _ in range(count):
            turns.enter_context(limit.turn())
        on_the_way()


def run_at_once(limit: ConcurrencyLimit, count: int) -> bool:
    """Whether that many run concurrently."""
    all_run = Barrier(count)

    def body() -> bool:
        with limit.turn():
            try:
                all_run.wait(0.5)
            except BrokenBarrierError:
                return False
            return True

    with ThreadPoolExecutor(count) as threads:
        return all(sent.result() for sent in [threads.submit(body) for _ in range(count)])


def be_slow(clock: Clock) -> Callable[[], None]:
    def pass_ten_seconds() -> None:
        clock.seconds += 10

    return pass_ten_seconds


def test_fast_bodies_soon_all_run_concurrently(limit: ConcurrencyLimit) -> None:
    assert not run_at_once(limit, 5)
    for _ in range(12):
        send_together(limit, 1, lambda: None)
    assert run_at_once(limit, 16)


def test_slow_bodies_reduce_the_concurrency(limit: ConcurrencyLimit, clock: Clock) -> None:
    send_together(limit, 4, be_slow(clock))
    assert not run_at_once(limit, 2)


def test_at_least_one_body_runs_however_slow_all_are(limit: ConcurrencyLimit, clock: Clock) -> None:
    for _ in range(5):
        send_together(limit, 1, be_slow(clock))


def test_fast_bodies_raise_the_concurrency_again(limit: ConcurrencyLimit, clock: Clock) -> None:
    send_together(limit, 4, be_slow(clock))
    for _ in range(16):
        send_together(limit, 1, lambda: None)
    assert run_at_once(limit, 16)


def outcomes_behind(
    limit: ConcurrencyLimit, error: HTTPError, after: Callable[[], None]
) -> list[BaseException | None]:
    """The outcomes of waiting bodies when the one before them fails."""

    def fail() -> None:
        wait_for(lambda: limit.waiting == 4)
        after()
        raise error

    with ThreadPoolExecutor(4) as threads:
        with suppress(type(error)), limit.turn():
            waiting = [threads.submit(send_together, limit, 1, lambda: None) for _ in range(4)]
            fail()
        return [sent.exception() for sent in waiting]


def test_waiting_bodies_fail_with_the_one_that_made_no_progress(
    limit: ConcurrencyLimit, clock: Clock
) -> None:
    """With a silent store, none of them then waits for its own deadline."""
    send_together(limit, 2, be_slow(clock))
    outcomes = outcomes_behind(limit, NoProgress("no bytes in either direction"), be_slow(clock))
    assert [type(outcome) for outcome in outcomes] == [NoProgress] * 4


def test_waiting_bodies_continue_after_a_lost_connection(
    limit: ConcurrencyLimit, clock: Clock
) -> None:
    send_together(limit, 2, be_slow(clock))
    assert outcomes_behind(limit, ProtocolError("reset by peer"), lambda: None) == [None] * 4
