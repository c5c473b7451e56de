"""Opening a workflow request, over a real folder store and a real in-memory broker."""

import json
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from instances import new_instance, one_series, real_file, uid
from observed_store import ObservedStore, once
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, inline, record
from service import wait_for

from shared import events
from shared.adapters.folder.publisher import FolderEventPublisher
from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.memory import MemoryBroker
from shared.attachments import Attachment
from shared.dicom.structure import check_structure
from shared.errors import (
    MalformedEvent,
    MessageRefused,
    ObjectMissing,
    StoreFull,
    StoreUnavailable,
    Unroutable,
    VersionConflict,
)
from shared.instances import StoredInstance
from shared.ports import EventPublisher, Message, ObjectStore, Publication, ReceivedMessage
from shared.record_store import Records
from shared.records import IngestRecord, Lease, State, encode, payload_id_of
from shared.runtime.metrics import WorkerMetrics
from worker.handler import MAX_TAKEOVERS, Handler, retry_seconds
from worker.workflow_manager import WorkflowManager

LEASE = timedelta(seconds=60)


def stored_instance(file: bytes) -> StoredInstance:
    return StoredInstance(
        sop_class_uid=uid(file, "SOPClassUID"),
        sop_instance_uid=uid(file, "SOPInstanceUID"),
        study_uid=uid(file, "StudyInstanceUID"),
        series_uid=uid(file, "SeriesInstanceUID"),
        size_bytes=len(file),
        sha256="",
        left_out=check_structure(file).left_out,
    )


@dataclass
class Bench:
    """A handler, what it works on, and a clock that stands until it is moved."""

    folder: Path
    now: datetime = RECEIVED_AT + timedelta(seconds=1)

    def __post_init__(self) -> None:
        self.instances = FolderObjectStore(self.folder / "payloads")
        self.state = FolderObjectStore(self.folder / "state")
        self.instances.prepare()
        self.state.prepare()
        self.records = Records(self.state)
        self.requests = FolderEventPublisher(self.folder / "requests")
        self.missing: list[str] = []
        self._writers: list[ThreadPoolExecutor] = []

    def handler(
        self,
        publisher: EventPublisher | None = None,
        owner: str = "me",
        *,
        instances: ObjectStore | None = None,
        state: ObjectStore | None = None,
    ) -> Handler:
        """A handler over the bench's stores, or over those given, which pass on to them."""
        self._writers.append(ThreadPoolExecutor(2))
        return Handler(
            records=Records(state or self.state),
            record_missing=lambda payload_id, _: self.missing.append(payload_id),
            instances=instances or self.instances,
            publisher=publisher or self.requests,
            workflow_manager=WorkflowManager("monaideploy", "md.workflow.request", "payloads"),
            sidecar_writers=self._writers[-1],
            owner=owner,
            lease=LEASE,
            metrics=WorkerMetrics(CollectorRegistry()),
            clock=lambda: self.now,
        )

    def finish_writing(self) -> None:
        """Wait for sidecars that an attempt was writing when it failed."""
        for writers in self._writers:
            writers.shutdown()

    def add(self, *files: bytes, **changes: Any) -> IngestRecord:
        added = replace(record(*map(stored_instance, files)), **changes)
        for file, instance in zip(files, inline(added), strict=True):
            key = f"{added.payload_id}/{instance.path}"
            self.instances.put(key, BytesIO(file), len(file), "application/dicom")
        self.records.add(added)
        return added

    def found(self, added: IngestRecord) -> IngestRecord:
        held = self.records.find(added.payload_id)
        assert held is not None
        return held.record

    def opened_requests(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "requests").glob("*.json"))


@dataclass
class Observed:
    """Passes messages on, and calls `look` before each."""

    publisher: EventPublisher
    look: Callable[[Message], None]
    overdue: str | None = None

    def begin(self, message: Message) -> Publication:
        self.look(message)
        return self.publisher.begin(message)

    def publish(self, message: Message) -> None:
        self.begin(message)

    def ping(self) -> None:
        self.publisher.ping()

    def close(self) -> None:
        self.publisher.close()


class SlowBroker:
    """Confirms what was published once `look` has returned true, which each wait calls."""

    def __init__(self, look: Callable[[], object]) -> None:
        self.published: list[str] = []
        self.messages: list[Message] = []
        self.overdue: str | None = None
        self._look = look

    def begin(self, message: Message) -> Publication:
        self.published.append(message.message_id)
        self.messages.append(message)
        return self

    def wait(self, seconds: float) -> bool:
        assert seconds <= 1
        return bool(self._look())

    def publish(self, message: Message) -> None:
        raise NotImplementedError

    def ping(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_sidecars_are_there_before_the_request_is_published(bench: Bench) -> None:
    added = bench.add(real_file(), real_file("MR_small.dcm"))
    seen = []

    def look(_: Message) -> None:
        for instance in inline(added):
            found = bench.instances.get(f"{added.payload_id}/{instance.metadata_path}")
            seen.append(json.loads(found.data)["00080018"]["Value"])

    bench.handler(Observed(bench.requests, look)).open_workflow_request(added.payload_id)

    assert seen == [[instance.sop_instance_uid] for instance in inline(added)]


class SidecarPuts:
    """Counts the sidecars that are put into its `store`, and fails the one of that number."""

    def __init__(self, bench: Bench, fails_at: int | None = None) -> None:
        self.keys: list[str] = []
        self.store = ObservedStore(bench.instances, before={"put": self._count})
        self._fails_at = fails_at
        self._lock = threading.Lock()

    def _count(self, key: str) -> None:
        with self._lock:
            self.keys.append(key)
            fails = len(self.keys) == self._fails_at
        if fails:
            raise StoreUnavailable("away")


def sidecars_of_the_next_attempt(bench: Bench) -> list[str]:
    bench.finish_writing()
    added, puts = bench.records.pending()[0], SidecarPuts(bench)
    bench.handler(instances=puts.store).open_workflow_request(payload_id_of(added.key))
    return sorted(puts.keys)


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_that_waits_for_a_queue_has_its_sidecars_written_once(
    bench: Bench, count: int
) -> None:
    added = bench.add(*[new_instance() for _ in range(count)])
    puts = SidecarPuts(bench)
    no_queues = MemoryBroker().publisher()
    bench.handler(no_queues, instances=puts.store).open_workflow_request(added.payload_id)
    assert len(puts.keys) == count

    assert sidecars_of_the_next_attempt(bench) == []

    assert bench.found(added).state is State.OPENED


def test_an_attempt_goes_on_with_the_sidecars_where_the_store_was_away(bench: Bench) -> None:
    added = bench.add(*[new_instance() for _ in range(250)])
    puts = SidecarPuts(bench, fails_at=150)
    bench.handler(instances=puts.store).open_workflow_request(added.payload_id)
    assert bench.found(added).state is State.PENDING
    bench.finish_writing()
    written = {found.key for found in bench.instances.list("") if found.key.endswith(".json")}
    assert 100 <= len(written) < 250

    missing = sidecars_of_the_next_attempt(bench)

    assert len(missing) == 250 - len(written)
    assert not written & {*missing}
    assert bench.found(added).state is State.OPENED


def test_a_large_payload_that_was_handed_back_is_not_described_anew(bench: Bench) -> None:
    added = bench.add(*[new_instance() for _ in range(120)])

    def stop(key: str) -> None:
        if key.endswith(inline(added)[110].path):
            stopping.stop()

    stopping = bench.handler(
        Observed(bench.requests, lambda _: pytest.fail("published")),
        instances=ObservedStore(bench.instances, before={"read_range": stop}),
    )
    stopping.open_workflow_request(added.payload_id)
    assert (bench.found(added).state, bench.found(added).attempts) == (State.PENDING, 0)

    assert len(sidecars_of_the_next_attempt(bench)) <= 20


def test_a_lease_is_renewed_while_sidecars_are_looked_up(bench: Bench) -> None:
    added = bench.add(*[new_instance() for _ in range(250)])
    bench.handler(MemoryBroker().publisher()).open_workflow_request(added.payload_id)
    has_lease = []

    def slow(_: str) -> None:
        bench.now += LEASE / 400
        lease = bench.found(added).lease
        has_lease.append(lease is not None and lease.until > bench.now)

    store = ObservedStore(bench.instances, after={"list": slow})
    bench.handler(instances=store).open_workflow_request(added.payload_id)

    assert len(has_lease) == 500
    assert all(has_lease)


def test_a_sidecar_that_was_lost_since_an_earlier_attempt_is_written_again(bench: Bench) -> None:
    added = bench.add(*[new_instance() for _ in range(3)])
    bench.handler(MemoryBroker().publisher()).open_workflow_request(added.payload_id)
    lost = f"{added.payload_id}/{inline(added)[1].metadata_path}"
    bench.instances.delete([lost])

    assert sidecars_of_the_next_attempt(bench) == [lost]


def test_a_sidecar_holds_everything_but_the_bulk(bench: Bench) -> None:
    added = bench.add(real_file())

    bench.handler().open_workflow_request(added.payload_id)

    (instance,) = inline(added)
    assert instance.left_out.ranges
    found = bench.instances.get(f"{added.payload_id}/{instance.metadata_path}")
    metadata = json.loads(found.data)
    assert "7FE00010" not in metadata
    assert metadata["00280010"] == {"vr": "US", "Value": [128]}
    assert metadata["0020000E"]["Value"] == [instance.series_uid]


def test_an_opened_record_leaves_pending_and_says_what_was_opened(bench: Bench) -> None:
    added = bench.add(real_file(), workflow="w-1")

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.route, found.workflows) == (
        State.OPENED,
        "workflow-in-url",
        ("w-1",),
    )
    assert (found.opened_at, found.lease, found.attempts) == (bench.now, None, 1)
    assert found.workflow_request is not None
    assert bench.records.pending() == []
    assert bench.opened_requests() == [added.payload_id]


def test_the_same_event_at_the_same_time_opens_one_request(bench: Bench) -> None:
    added = bench.add(real_file())
    published: list[str] = []
    start = threading.Barrier(8)

    def handle(number: int) -> None:
        observed = Observed(bench.requests, lambda m: published.append(m.message_id))
        handler = bench.handler(observed, owner=f"worker {number}")
        start.wait()
        handler(ReceivedMessage(events.encode(_event(added), "e", "k").body))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(handle, range(8)))

    assert published == [added.payload_id]
    assert bench.found(added).state is State.OPENED


def _event(added: IngestRecord) -> events.InstancesStored:
    return events.InstancesStored(added.payload_id, added.correlation_id)


def test_an_opened_record_is_not_opened_again(bench: Bench) -> None:
    added = bench.add(real_file())
    published: list[str] = []
    handler = bench.handler(Observed(bench.requests, lambda m: published.append(m.message_id)))

    handler.open_workflow_request(added.payload_id)
    handler.open_workflow_request(added.payload_id)

    assert len(published) == 1


def test_an_opened_record_that_did_not_leave_pending_leaves_it_once_the_lease_has_ended(
    bench: Bench,
) -> None:
    added = bench.add(real_file())
    pending = bench.records.read(bench.records.pending()[0].key)
    assert pending is not None
    bench.handler().open_workflow_request(added.payload_id)
    # As a worker leaves it that dies in between, its lease and all.
    left = replace(pending.record, attempts=1, lease=Lease("dead", bench.now + LEASE))
    bench.state.create(pending.key, encode(left), "application/json")

    again = Observed(bench.requests, lambda _: pytest.fail("opened again"))
    bench.handler(again).open_workflow_request(added.payload_id)
    assert len(bench.records.pending()) == 1
    bench.now += LEASE
    bench.handler(again).open_workflow_request(added.payload_id)

    assert bench.records.pending() == []
    assert bench.found(added).state is State.OPENED


def test_a_request_without_a_queue_is_noted_and_due_again_later(bench: Bench) -> None:
    added = bench.add(real_file())
    no_queues = MemoryBroker().publisher()

    bench.handler(no_queues).open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.attempts, found.lease) == (State.PENDING, 1, None)
    assert "md.workflow.request" in (found.last_error or "")
    assert found.due_at > bench.now

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.attempts, found.last_error) == (State.OPENED, 2, None)


def test_a_confirm_is_awaited_under_the_lease_for_as_long_as_it_takes(bench: Bench) -> None:
    added = bench.add(real_file())
    ends = bench.now + 10 * LEASE

    def look() -> bool:
        bench.now += LEASE / 8
        lease = bench.found(added).lease
        assert lease is not None
        assert lease.until > bench.now
        return bench.now > ends

    broker = SlowBroker(look)
    bench.handler(broker).open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.attempts, broker.published) == (
        State.OPENED,
        1,
        [added.payload_id],
    )


def test_a_confirm_that_is_overdue_is_told_of_the_payload_until_it_comes(bench: Bench) -> None:
    added = bench.add(real_file())
    told: list[str | None] = []

    def look() -> bool:
        bench.now += LEASE * 0.6
        broker.overdue = "not confirmed for 40 s"
        told.append(bench.found(added).last_error)
        return len(told) == 3

    broker = SlowBroker(look)
    bench.handler(broker).open_workflow_request(added.payload_id)

    assert told == [None, broker.overdue, broker.overdue]
    found = bench.found(added)
    assert (found.state, found.last_error) == (State.OPENED, None)


def test_a_store_that_blinks_does_not_end_the_wait_for_a_confirm(bench: Bench) -> None:
    looks = 0
    added = bench.add(real_file())

    def blink(_: str) -> None:
        if looks in (1, 2):
            raise StoreUnavailable("blink")

    def look() -> bool:
        nonlocal looks
        looks += 1
        bench.now += LEASE * 0.6
        return looks == 5

    broker = SlowBroker(look)
    state = ObservedStore(bench.state, before={"replace": blink})
    bench.handler(broker, state=state).open_workflow_request(added.payload_id)

    assert bench.found(added).state is State.OPENED
    assert broker.published == [added.payload_id]


def test_a_worker_that_lost_its_lease_leaves_the_payload_to_the_one_that_has_it(
    bench: Bench,
) -> None:
    added = bench.add(real_file())
    theirs = Lease("another", bench.now + 9 * LEASE)

    def look() -> bool:
        held = bench.records.find(added.payload_id)
        assert held is not None
        bench.records.change(held, lease=theirs)
        bench.now += LEASE * 0.6
        return False

    with pytest.raises(VersionConflict):
        bench.handler(SlowBroker(look)).open_workflow_request(added.payload_id)

    assert bench.found(added).lease == theirs


def test_a_worker_that_stops_waits_a_little_for_a_confirm_and_hands_back(bench: Bench) -> None:
    added = bench.add(real_file())
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        handler.stop()
        return False

    handler = bench.handler(SlowBroker(look))
    handler.open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.lease, found.attempts) == (State.PENDING, None, 1)
    assert "may have arrived" in (found.last_error or "")
    assert 2 <= looks <= 10


def test_a_confirm_that_comes_while_the_worker_stops_counts(bench: Bench) -> None:
    added = bench.add(real_file())
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        handler.stop()
        return looks == 2

    handler = bench.handler(SlowBroker(look))
    handler.open_workflow_request(added.payload_id)

    assert bench.found(added).state is State.OPENED


def test_a_request_that_the_broker_refuses_for_good_fails_the_payload(bench: Bench) -> None:
    added = bench.add(real_file())

    def look() -> bool:
        raise MessageRefused("too large")

    bench.handler(SlowBroker(look)).open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.last_error) == (State.FAILED, "too large")


def test_an_attempt_after_one_that_failed_writes_no_sidecars_while_the_queue_is_missing(
    bench: Bench,
) -> None:
    added = bench.add(real_file())
    sidecar = f"{added.payload_id}/{inline(added)[0].metadata_path}"

    class Missing(SlowBroker):
        def ping(self) -> None:
            raise Unroutable("no queue")

        def begin(self, _: Message) -> Publication:
            raise Unroutable("no queue")

    handler = bench.handler(Missing(lambda: True))
    handler.open_workflow_request(added.payload_id)
    bench.instances.delete([sidecar])
    bench.now = bench.found(added).due_at
    handler.open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.attempts, found.last_error) == (State.PENDING, 2, "no queue")
    with pytest.raises(ObjectMissing):
        bench.instances.get(sidecar)


def test_a_record_under_another_workers_lease_is_left_alone(bench: Bench) -> None:
    lease = Lease("another", bench.now + timedelta(seconds=1))
    added = bench.add(real_file(), lease=lease)

    bench.handler().open_workflow_request(added.payload_id)

    assert bench.opened_requests() == []
    assert bench.found(added) == added


def test_a_lease_that_ran_out_is_taken_over(bench: Bench) -> None:
    added = bench.add(real_file(), lease=Lease("dead", bench.now - timedelta(seconds=1)))

    bench.handler().open_workflow_request(added.payload_id)

    assert bench.opened_requests() == [added.payload_id]
    assert bench.found(added).takeovers == 1


def test_a_lease_of_a_clock_that_was_ahead_is_taken_over(bench: Bench) -> None:
    added = bench.add(real_file(), lease=Lease("dead", bench.now + timedelta(days=365)))

    bench.handler().open_workflow_request(added.payload_id)

    assert bench.opened_requests() == [added.payload_id]


def test_a_worker_whose_clock_is_set_back_renews_its_lease_before_a_request_goes_out(
    bench: Bench,
) -> None:
    """The others take its lease for one that has ended."""
    added = bench.add(real_file())
    leases: list[Lease | None] = []
    observed = Observed(bench.requests, lambda _: leases.append(bench.found(added).lease))

    def set_back(_: str) -> None:
        bench.now -= timedelta(days=1)

    store = ObservedStore(bench.instances, before={"read_range": set_back})
    bench.handler(observed, instances=store).open_workflow_request(added.payload_id)

    assert leases == [Lease("me", bench.now + LEASE)]


def test_a_lease_of_its_own_that_ran_out_is_no_takeover(bench: Bench) -> None:
    added = bench.add(real_file(), lease=Lease("me", bench.now), takeovers=MAX_TAKEOVERS)

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.takeovers) == (State.OPENED, MAX_TAKEOVERS)


def test_a_payload_that_workers_do_not_survive_fails_with_words(bench: Bench) -> None:
    added = bench.add(
        real_file(),
        takeovers=MAX_TAKEOVERS,
        lease=Lease("dead", bench.now - timedelta(seconds=1)),
    )

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert found.state is State.FAILED
    assert "workers crashed" in (found.last_error or "")
    assert bench.opened_requests() == []


def test_an_orderly_end_of_an_attempt_forgives_earlier_takeovers(bench: Bench) -> None:
    added = bench.add(real_file(), takeovers=MAX_TAKEOVERS - 1)

    bench.handler(MemoryBroker().publisher()).open_workflow_request(added.payload_id)

    assert bench.found(added).takeovers == 0


def test_a_request_that_is_out_is_noted_although_the_store_blinks(bench: Bench) -> None:
    added = bench.add(real_file())
    published: list[str] = []

    def lose_the_answer() -> None:
        raise StoreUnavailable("blink")

    handler = bench.handler(
        Observed(bench.requests, lambda m: published.append(m.message_id)),
        state=ObservedStore(bench.state, after={"create": once(lose_the_answer)}),
    )

    handler.open_workflow_request(added.payload_id)
    assert bench.found(added).state is State.OPENED
    assert bench.records.pending() == []

    handler.open_workflow_request(added.payload_id)
    assert published == [added.payload_id]


def test_a_request_that_is_out_is_published_once_however_long_its_record_cannot_be_written(
    bench: Bench,
) -> None:
    added = bench.add(real_file())
    published: list[str] = []
    publisher = Observed(bench.requests, lambda m: published.append(m.message_id))

    def be_full(_: str) -> None:
        bench.now += LEASE / 2
        raise StoreFull("the store is full")

    full = ObservedStore(bench.state, before={"create": be_full})
    handler = bench.handler(publisher, state=full)
    for _ in range(3):
        handler.open_workflow_request(added.payload_id)
        bench.now = bench.found(added).due_at
    waiting = bench.found(added)
    bench.handler(publisher).open_workflow_request(added.payload_id)

    assert (waiting.state, waiting.last_error) == (
        State.PENDING,
        "the request was published, but the store is full",
    )
    assert published == [added.payload_id]
    found = bench.found(added)
    assert (found.state, found.opened_at) == (State.OPENED, waiting.opened_at)
    assert found.workflow_request is not None


def test_an_instance_that_is_gone_fails_the_payload_with_words(bench: Bench) -> None:
    added = bench.add(real_file())
    bench.instances.delete([f"{added.payload_id}/{inline(added)[0].path}"])

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert found.state is State.FAILED
    assert inline(added)[0].sop_instance_uid in (found.last_error or "")
    assert bench.opened_requests() == []


def test_an_error_of_our_own_fails_the_payload_without_quoting_it(bench: Bench) -> None:
    added = bench.add(real_file())

    def trip(_: Message) -> None:
        raise ZeroDivisionError("Citizen^Jan")

    bench.handler(Observed(bench.requests, trip)).open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert found.state is State.FAILED
    assert f"ZeroDivisionError at {__file__}:" in (found.last_error or "")
    assert "Citizen" not in (found.last_error or "")


def test_a_worker_without_memory_leaves_the_payload_for_another_time(bench: Bench) -> None:
    added = bench.add(real_file())

    def run_out(_: Message) -> None:
        raise MemoryError

    bench.handler(Observed(bench.requests, run_out)).open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.lease) == (State.PENDING, None)
    assert "out of memory" in (found.last_error or "")


@pytest.mark.parametrize("count", [1, 3])
def test_a_lease_is_renewed_while_there_is_work_and_before_a_request_goes_out(
    bench: Bench, count: int
) -> None:
    added = bench.add(*[new_instance() for _ in range(count)])
    untils: list[datetime] = []

    def look(_: Message) -> None:
        lease = bench.found(added).lease
        assert lease is not None
        untils.append(lease.until)

    def slow(_: str) -> None:
        bench.now += LEASE / 8

    store = ObservedStore(bench.instances, before={"read_range": slow})
    handler = bench.handler(Observed(bench.requests, look), instances=store)
    handler.open_workflow_request(added.payload_id)

    (until,) = untils
    assert until >= bench.now + LEASE * 0.9


@pytest.mark.parametrize(
    "instances",
    [[real_file(), real_file("MR_small.dcm")], [new_instance(TextValue="a" * 100_000)]],
    ids=["two", "one that is not soon read"],
)
def test_a_lease_is_renewed_while_sidecars_wait_for_the_store(
    bench: Bench, instances: list[bytes]
) -> None:
    added = bench.add(*instances)
    may_go_on = threading.Event()
    store = ObservedStore(bench.instances, before={"read_range": lambda _: may_go_on.wait(60)})
    handler = bench.handler(instances=store)

    def lease_ends() -> datetime | None:
        lease = bench.found(added).lease
        return lease.until if lease else None

    opening = threading.Thread(target=handler.open_workflow_request, args=[added.payload_id])
    opening.start()
    first_end = wait_for(lease_ends)
    bench.now += LEASE * 0.6
    wait_for(lambda: (lease_ends() or first_end) > first_end)
    may_go_on.set()
    opening.join(60)

    assert bench.found(added).state is State.OPENED


def test_no_room_to_inflate_in_is_a_failure_that_passes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = bench.add(real_file("image_dfl.dcm"))
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.lease) == (State.PENDING, None)
    assert found.last_error is not None
    assert found.last_error.startswith(f"no room to inflate {added.payload_id}/")


def test_what_went_wrong_after_a_renewal_is_noted_too(bench: Bench) -> None:
    added = bench.add(real_file())

    def slow(_: str) -> None:
        bench.now += LEASE * 0.6

    store = ObservedStore(bench.instances, before={"read_range": slow})
    leases: list[Lease | None] = []
    no_queues = Observed(
        MemoryBroker().publisher(), lambda _: leases.append(bench.found(added).lease)
    )
    first_end = bench.now + LEASE
    bench.handler(no_queues, instances=store).open_workflow_request(added.payload_id)

    (renewed,) = leases
    assert renewed is not None
    assert renewed.until > first_end
    found = bench.found(added)
    assert (found.state, found.lease) == (State.PENDING, None)
    assert "md.workflow.request" in (found.last_error or "")


def test_a_worker_that_stops_hands_back_what_it_has_in_hand(bench: Bench) -> None:
    added = bench.add(real_file())
    handler = bench.handler()
    handler.stop()

    handler.open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.lease, found.attempts) == (State.PENDING, None, 0)
    assert found.due_at == bench.now
    assert bench.opened_requests() == []


def test_a_worker_that_stops_reads_no_further(bench: Bench) -> None:
    pixels = new_instance(PixelData=bytes(1 << 17), DataSetTrailingPadding=bytes(1 << 10))
    added = bench.add(pixels)
    reads: list[str] = []

    def stop(key: str) -> None:
        handler.stop()
        reads.append(key)

    store = ObservedStore(bench.instances, before={"read_range": stop})
    handler = bench.handler(instances=store)
    handler.open_workflow_request(added.payload_id)

    assert len(reads) == 1
    found = bench.found(added)
    assert (found.state, found.lease, found.attempts) == (State.PENDING, None, 0)


def test_an_error_of_our_own_while_the_worker_stops_is_no_failure(bench: Bench) -> None:
    added = bench.add(real_file())

    def refuse(_: Message) -> None:
        handler.stop()
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    handler = bench.handler(Observed(bench.requests, refuse))
    handler.open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.lease, found.attempts) == (State.PENDING, None, 0)


def test_an_event_without_a_record_opens_nothing_and_shows_that_a_record_is_lost(
    bench: Bench,
) -> None:
    lost = record()

    bench.handler().open_workflow_request(lost.payload_id)

    assert bench.opened_requests() == []
    assert bench.missing == [lost.payload_id]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"payload_id": "x"}', b"\xff"])
def test_a_body_that_is_no_event_is_malformed(bench: Bench, body: bytes) -> None:
    with pytest.raises(MalformedEvent):
        bench.handler()(ReceivedMessage(body))


def test_retries_double_up_to_two_minutes() -> None:
    waits = [retry_seconds(attempts) for attempts in range(1, 40)]

    assert 0.5 <= waits[0] <= 1
    assert all(later > earlier for earlier, later in pairwise(waits[:7]))
    assert 90 <= max(waits) <= 120


def _attach(
    bench: Bench,
    added: IngestRecord,
    instances: Iterable[StoredInstance] = (),
    count: int = 0,
) -> IngestRecord:
    """The same record as if its instances, or those given, were too many for it."""
    rows = added.instances or instances
    lines = b"".join(orjson.dumps(instance) + b"\n" for instance in rows)
    bench.records.attachments.put(
        added.payload_id, Attachment.INSTANCES, BytesIO(lines), len(lines), ""
    )
    held = bench.records.find(added.payload_id)
    assert held is not None
    file_count = added.file_count or count
    return bench.records.change(held, instances=None, file_count=file_count).record


def _published(bench: Bench, payload_id: str) -> bytes:
    messages: list[Message] = []
    bench.handler(Observed(bench.requests, messages.append)).open_workflow_request(payload_id)
    (message,) = messages
    return message.body


@pytest.mark.parametrize("count", [1, 150])
def test_attached_instances_get_the_same_message_and_sidecars_as_those_in_a_record(
    bench: Bench, tmp_path: Path, count: int
) -> None:
    files = list(one_series(count))
    inline = bench.add(*files)
    expected = _published(bench, inline.payload_id)
    other = Bench(tmp_path / "other")
    attached = _attach(other, other.add(*files, payload_id=inline.payload_id))

    assert _published(other, attached.payload_id) == expected

    assert json.loads(expected)["file_count"] == len(json.loads(expected)["payload"]) == count
    assert [(o.key, o.size_bytes) for o in other.instances.list("")] == [
        (o.key, o.size_bytes) for o in bench.instances.list("")
    ]
    assert other.found(attached).workflow_request == bench.found(inline).workflow_request


def test_the_message_of_attached_instances_is_the_same_on_every_attempt(bench: Bench) -> None:
    added = _attach(bench, bench.add(*one_series(150)))
    messages: list[Message] = []
    lost = Observed(MemoryBroker().publisher(), messages.append)
    for _ in range(2):
        bench.handler(lost).open_workflow_request(added.payload_id)
        bench.now = bench.found(added).due_at

    assert _published(bench, added.payload_id) == messages[0].body == messages[1].body


def test_a_record_says_little_however_many_instances_were_opened(bench: Bench) -> None:
    added = _attach(bench, bench.add(*one_series(150)))

    bench.handler().open_workflow_request(added.payload_id)

    assert len(encode(bench.found(added))) < 2000


def test_a_payload_whose_attached_instances_are_missing_fails_in_words(bench: Bench) -> None:
    added = _attach(bench, bench.add(new_instance()))
    bench.records.attachments.remove(added.payload_id)

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert found.state is State.FAILED
    assert "instances.jsonl in the state bucket is missing; restore it" in (found.last_error or "")


class _OneFileStore(FolderObjectStore):
    """Has `file` under every key, and keeps nothing that is put."""

    def __init__(self, root: Path, file: bytes) -> None:
        super().__init__(root)
        self._file = file

    def read_range(self, *_: object) -> bytes:
        return self._file

    def put(self, *_: object) -> None: ...


def _beside_the_message(bench: Bench, count: int) -> int:
    """Bytes at the peak of an opening, without its message."""
    file = new_instance(PixelData=None)
    one = stored_instance(file)
    rows = (replace(one, sop_instance_uid=f"1.2.{number}") for number in range(count))
    added = _attach(bench, bench.add(), rows, count)
    published = SlowBroker(lambda: True)
    handler = bench.handler(published, instances=_OneFileStore(bench.folder / "payloads", file))
    tracemalloc.start()
    try:
        handler.open_workflow_request(added.payload_id)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (message,) = published.messages
    return peak - len(message.body)


def test_ten_times_the_instances_take_hardly_more_memory_beside_the_message(
    bench: Bench,
) -> None:
    few = _beside_the_message(bench, 300)

    many = _beside_the_message(bench, 3000)

    assert many - few < 2700 * 200
