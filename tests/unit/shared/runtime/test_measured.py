"""Calls to the store and to the broker, as their metrics have them."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.memory import MemoryBroker, MemoryEventPublisher
from shared.adapters.queues import EventQueue, Published
from shared.errors import BrokerUnavailable, ObjectMissing, Unroutable, VersionConflict
from shared.ports import Message
from shared.runtime.measured import Calls, MeasuredEventPublisher, MeasuredObjectStore
from shared.runtime.metrics import BackendMetrics

QUEUE = EventQueue(exchange="e", routing_key="k", queue="q", dead_letter="d")


class Bench:
    def __init__(self, folder: Path) -> None:
        self._registry = CollectorRegistry()
        metrics = BackendMetrics(self._registry)
        self.store = MeasuredObjectStore(
            FolderObjectStore(folder), Calls(metrics.store_call_seconds)
        )
        self.store.prepare()
        self.publisher = MeasuredEventPublisher(
            MemoryBroker(QUEUE).publisher(), Calls(metrics.broker_call_seconds), "publish_event"
        )

    def counted(self) -> dict[tuple[str, str], float]:
        """The number of calls by operation and outcome."""
        return {
            (sample.labels["operation"], sample.labels["outcome"]): sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if sample.name.endswith("_count")
        }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "bucket")


def _message(exchange: str = "e") -> Message:
    return Message(exchange, "k", b"{}", "m", "c", "t", "a", 0)


def test_each_call_to_the_store_is_counted_with_its_outcome(bench: Bench) -> None:
    bench.store.put("a/1", BytesIO(b"x"), 1, "text/plain")
    bench.store.create("b", b"x", "text/plain")
    with pytest.raises(VersionConflict):
        bench.store.create("b", b"x", "text/plain")
    with pytest.raises(ObjectMissing):
        bench.store.get("c")
    with pytest.raises(ValueError, match="key"):
        bench.store.get("/")

    assert bench.counted() == {
        ("put", "ok"): 1,
        ("create", "ok"): 1,
        ("create", "conflict"): 1,
        ("get", "missing"): 1,
        ("get", "error"): 1,
    }


def test_an_upload_that_began_early_is_counted_when_it_ends(bench: Bench) -> None:
    writing = bench.store.begin("a", BytesIO(b"x"), "text/plain", 10)
    assert bench.counted() == {}

    writing.finish(1)

    assert bench.counted() == {("finish", "ok"): 1}
    assert bench.store.get("a").data == b"x"


def test_a_listing_is_counted_when_its_reader_stops(bench: Bench) -> None:
    for number in range(3):
        bench.store.create(f"a/{number}", b"x", "text/plain")
    listing = bench.store.list("a/")
    assert next(listing).key == "a/0"
    assert ("list", "ok") not in bench.counted()

    assert [found.key for found in listing] == ["a/1", "a/2"]

    assert bench.counted()["list", "ok"] == 1


def test_publications_are_counted_with_their_outcome(bench: Bench) -> None:
    assert bench.publisher.begin(_message()).wait(1)
    bench.publisher.begin(_message()).on_settled(lambda _: None)
    with pytest.raises(Unroutable):
        bench.publisher.begin(_message("another"))

    assert bench.counted() == {("publish_event", "ok"): 2, ("publish_event", "unroutable"): 1}


def test_a_publication_that_nobody_waits_for_is_counted_with_its_late_error() -> None:
    class Late(Published):
        def on_settled(self, settled: Callable[[BaseException | None], None]) -> None:
            settled(BrokerUnavailable("gone"))

    class Publisher(MemoryEventPublisher):
        def begin(self, message: Message) -> Published:  # noqa: ARG002
            return Late()

    registry = CollectorRegistry()
    calls = Calls(BackendMetrics(registry).broker_call_seconds)
    told: list[BaseException | None] = []

    publisher = MeasuredEventPublisher(Publisher([]), calls, "publish_event")
    publisher.begin(_message()).on_settled(told.append)

    assert [str(error) for error in told] == ["gone"]
    labels = {"operation": "publish_event", "outcome": "unavailable"}
    assert registry.get_sample_value("stowgate_broker_call_seconds_count", labels) == 1
