"""Announcements whose events the broker does not accept, or not yet."""

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from api.stow.announcements import Announcements
from shared.adapters.queues import Published
from shared.errors import BrokerUnavailable, MessageRefused, StowgateError, Unroutable
from shared.events import InstancesStored
from shared.ports import Publication
from shared.runtime.metrics import ApiMetrics

EVENT = InstancesStored("a payload", "a correlation")


class Bench:
    def __init__(self, announce: Callable[[InstancesStored], Publication]) -> None:
        self.registry = CollectorRegistry()
        self.announcements = Announcements(announce, ApiMetrics(self.registry))

    def left_to_relay(self) -> float | None:
        return self.registry.get_sample_value("stowgate_announcements_failed_total")


class UnderWay(Published):
    """A publication whose confirm nobody may wait for."""

    def __init__(self) -> None:
        self.settled: list[Callable[[BaseException | None], None]] = []

    def wait(self, seconds: float) -> bool:
        raise AssertionError(f"waits {seconds} s")

    def on_settled(self, settled: Callable[[BaseException | None], None]) -> None:
        self.settled.append(settled)


def test_an_event_that_cannot_be_sent_is_counted_and_logged_with_the_reason() -> None:
    def announce(_: InstancesStored) -> Publication:
        raise BrokerUnavailable("not connected")

    bench = Bench(announce)
    with capture_logs() as logged:
        bench.announcements.make(EVENT)

    assert bench.left_to_relay() == 1
    (line,) = logged
    assert (line["payload_id"], line["correlation_id"]) == ("a payload", "a correlation")
    assert line["error"] == "not connected"


@pytest.mark.parametrize("error", [BrokerUnavailable(""), Unroutable(""), MessageRefused("")])
def test_nothing_waits_for_a_confirm_and_an_event_that_gets_none_is_counted(
    error: StowgateError,
) -> None:
    under_way = UnderWay()
    bench = Bench(lambda _: under_way)
    bench.announcements.make(EVENT)
    bench.announcements.make(EVENT)
    assert bench.left_to_relay() == 0

    first, second = under_way.settled
    first(None)
    assert bench.left_to_relay() == 0
    second(error)
    assert bench.left_to_relay() == 1
