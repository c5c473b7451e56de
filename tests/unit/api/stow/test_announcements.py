"""Announcements to a slow broker."""

import threading
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry
from service import wait_for

from api.stow.announcements import Announcements
from shared.events import InstancesStored
from shared.runtime.metrics import ApiMetrics


def test_the_events_that_wait_for_a_hanging_broker_are_bounded() -> None:
    goes_on, announced = threading.Event(), []

    def announce(event: InstancesStored) -> None:
        goes_on.wait(60)
        announced.append(event.payload_id)

    registry = CollectorRegistry()
    announcements = Announcements(announce, ThreadPoolExecutor(1), ApiMetrics(registry))
    for number in range(150):
        announcements.make(InstancesStored(str(number), "c"))

    left = registry.get_sample_value("stowgate_announcements_failed_total")
    goes_on.set()

    assert left == 50
    wait_for(lambda: len(announced) == 100)
    announcements.make(InstancesStored("late", "c"))
    wait_for(lambda: announced[-1] == "late")
