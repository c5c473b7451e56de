"""The relay, over a real folder store."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import pytest
from observed_store import ObservedStore
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, newest, record

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.queues import Published
from shared.errors import BrokerUnavailable, StoreRefused, StoreUnavailable, StowgateError
from shared.events import InstancesStored
from shared.ports import ListedObject, ObjectStore, Publication
from shared.record_store import Records, VersionedRecord
from shared.records import FIRST_DELIVERY, IngestRecord, Lease, State, newest_first
from shared.runtime.metrics import WorkerMetrics
from shared.time import utc_now
from worker.relay import Relay


@dataclass
class Bench:
    folder: Path
    now: datetime = RECEIVED_AT + timedelta(minutes=1)
    backlog: int = 0
    broken: bool = False
    publication: Publication = field(default_factory=Published)
    announced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = FolderObjectStore(self.folder)
        self.store.prepare()
        self.records = Records(self.store)
        self.registry = CollectorRegistry()
        self.relay = self.another_relay(self.registry)

    def another_relay(self, registry: CollectorRegistry, store: ObjectStore | None = None) -> Relay:
        """A relay over the bench's store, or over the one given, which passes on to it."""
        return Relay(
            records=Records(store or self.store),
            announce=self._announce,
            backlog=lambda: self.backlog,
            metrics=WorkerMetrics(registry, lambda: self.now),
            clock=lambda: self.now,
        )

    def _announce(self, event: InstancesStored) -> Publication:
        if self.broken:
            raise BrokerUnavailable("gone")
        self.announced.append(event.payload_id)
        return self.publication

    def add(self, **changes: Any) -> IngestRecord:
        added = replace(record(), **changes)
        self.records.add(added)
        return added

    def fail(self) -> VersionedRecord:
        held = self.records.find(self.add().payload_id)
        assert held is not None
        self.records.settle(held, State.FAILED)
        failed = self.records.find(held.record.payload_id)
        assert failed is not None
        return failed


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_record_is_announced_when_it_is_due(bench: Bench) -> None:
    added = bench.add(due_at=bench.now + timedelta(seconds=1))

    bench.relay.run_once()
    assert bench.announced == []

    bench.now += timedelta(seconds=2)
    bench.relay.run_once()
    assert bench.announced == [added.payload_id]


def test_a_leased_record_is_due_when_its_lease_expires(bench: Bench) -> None:
    added = bench.add(lease=Lease("worker", bench.now + timedelta(seconds=5)))

    bench.relay.run_once()
    assert bench.announced == []

    bench.now += timedelta(seconds=6)
    bench.relay.run_once()
    assert bench.announced == [added.payload_id]


def test_a_record_written_by_a_clock_that_was_far_ahead_is_due(bench: Bench) -> None:
    added = bench.add(due_at=bench.now + timedelta(days=1))

    bench.relay.run_once()

    assert bench.announced == [added.payload_id]


def test_a_record_with_a_lease_of_a_clock_that_was_far_ahead_is_due(bench: Bench) -> None:
    added = bench.add(lease=Lease("worker", bench.now + timedelta(days=365)))

    bench.relay.run_once()

    assert bench.announced == [added.payload_id]


def test_a_lease_of_a_clock_that_is_slightly_ahead_is_respected(bench: Bench) -> None:
    bench.add(lease=Lease("worker", bench.now + timedelta(hours=1)))

    bench.relay.run_once()

    assert bench.announced == []


def test_a_clock_that_is_set_back_delays_no_record(bench: Bench) -> None:
    bench.now += timedelta(days=1)
    added = bench.add(due_at=bench.now + timedelta(minutes=1))
    bench.relay.run_once()
    assert bench.announced == []

    bench.now -= timedelta(days=1)
    bench.relay.run_once()

    assert bench.announced == [added.payload_id]


def test_an_announced_record_is_announced_again_only_after_a_pause(bench: Bench) -> None:
    added = bench.add()

    bench.relay.run_once()
    bench.relay.run_once()
    assert bench.announced == [added.payload_id]

    bench.now += timedelta(minutes=1)
    bench.relay.run_once()
    assert bench.announced == [added.payload_id] * 2


def test_a_change_within_the_listed_second_is_noticed(bench: Bench) -> None:
    class FullSeconds(ObservedStore):
        """Lists times as Amazon S3 does."""

        def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
            return (replace(o, modified_at=RECEIVED_AT) for o in super().list(prefix, after))

    relay = bench.another_relay(CollectorRegistry(), FullSeconds(bench.store))
    added = bench.add(lease=Lease(FIRST_DELIVERY, bench.now + timedelta(seconds=30)))
    relay.run_once()
    assert bench.announced == []

    found = bench.records.find(added.payload_id)
    assert found is not None
    bench.records.change(found, lease=None, attempts=1, last_error="no queue")
    relay.run_once()

    assert bench.announced == [added.payload_id]


def test_a_permanently_long_queue_starves_no_retry(bench: Bench) -> None:
    retry = bench.add(attempts=1)
    bench.backlog = 150
    # The queued records are due too, and more arrive than are announced.
    for number in range(500):
        bench.add(payload_id=f"0189{number:04x}-0000-7000-8000-000000000000")

    bench.relay.run_once()

    assert retry.payload_id in bench.announced


def test_repeated_announcements_do_not_delay_first_ones(
    bench: Bench,
) -> None:
    bench.backlog = 150
    for number in range(100):
        bench.add(payload_id=f"0189{number:04x}-0000-7000-8000-000000000000")
    for _ in range(10):
        bench.relay.run_once()
        bench.now += timedelta(seconds=40)

    assert len(set(bench.announced)) == 100


def test_a_long_queue_hardly_grows_by_records_that_wait_in_it(bench: Bench) -> None:
    bench.backlog = 150
    for number in range(10):
        bench.add(payload_id=f"0189{number:04x}-0000-7000-8000-000000000000")
    for _ in range(6 * 60):
        bench.relay.run_once()
        bench.now += timedelta(minutes=1)

    # After 0.5, 1, 2 minutes, and so on up to an hour.
    assert 10 < max(Counter(bench.announced).values()) < 20


def test_a_record_is_announced_again_soon_once_a_long_queue_is_short(bench: Bench) -> None:
    bench.backlog = 150
    added = bench.add()
    for _ in range(60):
        bench.relay.run_once()
        bench.now += timedelta(minutes=1)
    bench.announced.clear()

    bench.backlog = 0
    bench.relay.run_once()

    assert bench.announced == [added.payload_id]


def test_the_pause_of_a_record_is_reset_when_a_worker_has_tried_it(
    bench: Bench,
) -> None:
    bench.backlog = 150
    added = bench.add()
    for _ in range(60):
        bench.relay.run_once()
        bench.now += timedelta(minutes=1)
    bench.announced.clear()

    held = bench.records.find(added.payload_id)
    assert held is not None
    bench.records.change(held, attempts=1, due_at=bench.now)
    bench.relay.run_once()

    assert bench.announced == [added.payload_id]


def test_a_pass_announces_all_before_it_waits_for_the_broker(bench: Bench) -> None:
    for _ in range(20):
        bench.add()
    seen: list[int] = []

    class Slow(Published):
        def wait(self, seconds: float) -> bool:
            seen.append(len(bench.announced))
            return super().wait(seconds)

    bench.publication = Slow()
    bench.relay.run_once()

    assert seen == [20] * 20


def test_an_overdue_announcement_is_not_repeated_at_once(bench: Bench) -> None:
    added = bench.add()

    class Overdue(Published):
        overdue = "for 40 s"

        def wait(self, seconds: float) -> bool:  # noqa: ARG002
            return False

    bench.publication = Overdue()
    assert bench.relay.run_once()
    assert bench.relay.run_once()

    assert bench.announced == [added.payload_id]


def test_an_announcement_with_an_unknown_result_is_repeated(bench: Bench) -> None:
    added = bench.add()

    class Lost(Published):
        def wait(self, seconds: float) -> bool:
            raise BrokerUnavailable(f"lost within {seconds} s")

    bench.publication = Lost()
    assert not bench.relay.run_once()
    bench.publication = Published()
    assert bench.relay.run_once()

    assert bench.announced == [added.payload_id] * 2


def test_a_pass_fills_the_queue_up_to_the_short_length(bench: Bench) -> None:
    for _ in range(150):
        bench.add()
    bench.backlog = 40

    bench.relay.run_once()

    assert len(bench.announced) == 60


def test_the_oldest_record_is_announced_first(bench: Bench) -> None:
    older = bench.add(payload_id="01890000-0000-7000-8000-000000000000")
    newer = bench.add(payload_id="01990000-0000-7000-8000-000000000000")

    bench.relay.run_once()

    assert bench.announced == [older.payload_id, newer.payload_id]


def test_repeatedly_failing_records_do_not_delay_new_ones(bench: Bench) -> None:
    for number in range(150):
        bench.add(payload_id=f"0189{number:04x}-0000-7000-8000-000000000000", attempts=9)
    new = bench.add(due_at=bench.now + timedelta(seconds=1))
    for _ in range(2):
        bench.relay.run_once()
    assert len(bench.announced) == 150

    bench.now += timedelta(minutes=1)
    bench.announced.clear()
    bench.relay.run_once()

    assert len(bench.announced) == 100
    assert bench.announced[0] == new.payload_id


def test_a_relay_on_standby_exports_no_measurements(bench: Bench) -> None:
    bench.add()
    bench.relay.run_once()
    assert bench.registry.get_sample_value("stowgate_pending") == 1

    bench.relay.stand_by()

    for name in ("stowgate_pending", "stowgate_failed", "stowgate_oldest_pending_seconds"):
        assert bench.registry.get_sample_value(name) is None


def test_an_unavailable_broker_ends_the_pass_and_the_next_one_continues(bench: Bench) -> None:
    added = bench.add()
    bench.broken = True
    bench.relay.run_once()

    bench.broken = False
    bench.relay.run_once()

    assert bench.announced == [added.payload_id]


def test_a_record_settled_by_a_crashed_worker_is_moved_to_its_place(bench: Bench) -> None:
    added = bench.add()
    held = bench.records.find(added.payload_id)
    assert held is not None
    bench.records.change(held, state=State.FAILED)

    bench.now = utc_now()
    bench.relay.run_once()
    assert len(bench.records.pending()) == 1

    bench.now += timedelta(minutes=2)
    bench.relay.run_once()
    assert bench.records.pending() == []
    found = bench.records.find(added.payload_id)
    assert found is not None
    assert found.key.startswith("failed/")
    assert bench.announced == []


def test_a_settled_record_written_by_a_clock_that_was_ahead_is_moved_to_its_place(
    bench: Bench,
) -> None:
    held = bench.records.find(bench.add().payload_id)
    assert held is not None
    bench.records.change(held, state=State.FAILED)
    bench.now = utc_now()
    next_year = bench.now.timestamp() + 365 * 86400
    os.utime(bench.folder / held.key, (next_year, next_year))

    bench.relay.run_once()

    assert bench.records.pending() == []


def test_a_pass_reads_only_due_or_changed_records(bench: Bench) -> None:
    for _ in range(20):
        bench.add(due_at=bench.now + timedelta(hours=1))
    reads: list[str] = []
    store = ObservedStore(bench.store, before={"get": reads.append})
    relay = bench.another_relay(CollectorRegistry(), store)
    relay.run_once()
    assert len(reads) == 20

    relay.run_once()

    assert len(reads) == 20


def test_a_record_that_becomes_due_earlier_is_announced_earlier(bench: Bench) -> None:
    added = bench.add(due_at=bench.now + timedelta(hours=1))
    bench.relay.run_once()
    held = bench.records.find(added.payload_id)
    assert held is not None
    # A stopping worker returns it to the queue, some time after the relay has read it.
    bench.records.change(held, due_at=bench.now)
    later = bench.records.pending()[0].modified_at.timestamp() + 1
    os.utime(bench.folder / held.key, (later, later))

    bench.relay.run_once()

    assert bench.announced == [added.payload_id]


def test_an_unreadable_record_is_skipped(bench: Bench) -> None:
    unreadable = f"pending/{newest_first('01890000-0000-7000-8000-000000000000')}"
    bench.store.put(unreadable, BytesIO(b"{}"), 2, "application/json")
    added = bench.add()

    bench.relay.run_once()

    assert bench.announced == [added.payload_id]


@pytest.mark.parametrize("error", [StoreRefused("not for you"), StoreUnavailable("bad sector")])
def test_a_record_that_the_store_does_not_return_is_skipped(
    bench: Bench, error: StowgateError
) -> None:
    kept = bench.add(payload_id="01890000-0000-7000-8000-000000000000")
    added = bench.add()

    def refuse(key: str) -> None:
        if kept.payload_id in key:
            raise error

    store = ObservedStore(bench.store, before={"get": refuse})

    bench.another_relay(CollectorRegistry(), store).run_once()

    assert bench.announced == [added.payload_id]


def test_an_unavailable_store_is_not_asked_for_each_record(bench: Bench) -> None:
    asked: list[str] = []

    def be_gone(key: str) -> NoReturn:
        asked.append(key)
        raise StoreUnavailable("gone")

    for _ in range(5):
        bench.add()
    gone = ObservedStore(bench.store, before={"get": be_gone, "ping": be_gone})

    bench.another_relay(CollectorRegistry(), gone).run_once()

    assert len(asked) == 2


@pytest.mark.parametrize("name", ["zz-backup", "ffffffffffff.json.orig", "00.notes.txt", "~"])
def test_objects_with_other_names_than_records_are_skipped(bench: Bench, name: str) -> None:
    for state in State:
        bench.store.put(f"{state}/{name}", BytesIO(b"{}"), 2, "application/json")
    added = bench.add()

    bench.relay.run_once()

    assert bench.announced == [added.payload_id]
    assert bench.registry.get_sample_value("stowgate_pending") == 1
    assert bench.registry.get_sample_value("stowgate_failed") == 0
    assert newest(bench.records, None, 10) == ([added], None)


def test_a_pass_measures_pending_and_failed_payloads(bench: Bench) -> None:
    bench.add()
    bench.fail()
    replayed = bench.fail()
    bench.records.replay(replayed, bench.now)
    bench.now = RECEIVED_AT + timedelta(seconds=90)

    bench.relay.run_once()

    assert bench.registry.get_sample_value("stowgate_pending") == 2
    assert bench.registry.get_sample_value("stowgate_failed") == 1
    for state in ("pending", "failed"):
        assert bench.registry.get_sample_value(f"stowgate_oldest_{state}_seconds") == 90
