"""The lease on a record while its workflow request is opened."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from handler_bench import LEASE, Bench, Observed, SlowBroker
from instances import new_instance, real_file
from observed_store import ObservedStore
from service import wait_for

from shared import events
from shared.adapters.memory import MemoryBroker
from shared.errors import VersionConflict
from shared.ports import Message, ReceivedMessage
from shared.records import IngestRecord, Lease, State, encode
from worker.handler import MAX_TAKEOVERS


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


def test_a_worker_that_lost_its_lease_leaves_the_payload_to_the_new_owner(
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


def test_a_record_under_another_workers_lease_is_left_alone(bench: Bench) -> None:
    lease = Lease("another", bench.now + timedelta(seconds=1))
    added = bench.add(real_file(), lease=lease)

    bench.handler().open_workflow_request(added.payload_id)

    assert bench.opened_requests() == []
    assert bench.found(added) == added


def test_an_expired_lease_is_taken_over(bench: Bench) -> None:
    added = bench.add(real_file(), lease=Lease("dead", bench.now - timedelta(seconds=1)))

    bench.handler().open_workflow_request(added.payload_id)

    assert bench.opened_requests() == [added.payload_id]
    assert bench.found(added).takeovers == 1


def test_a_lease_of_a_clock_that_was_ahead_is_taken_over(bench: Bench) -> None:
    added = bench.add(real_file(), lease=Lease("dead", bench.now + timedelta(days=365)))

    bench.handler().open_workflow_request(added.payload_id)

    assert bench.opened_requests() == [added.payload_id]


def test_a_worker_whose_clock_is_set_back_renews_its_lease_before_it_publishes(
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


def test_an_expired_lease_of_its_own_is_not_a_takeover(bench: Bench) -> None:
    added = bench.add(real_file(), lease=Lease("me", bench.now), takeovers=MAX_TAKEOVERS)

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.takeovers) == (State.OPENED, MAX_TAKEOVERS)


def test_a_payload_that_crashes_workers_fails_with_the_reason(bench: Bench) -> None:
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


def test_an_orderly_end_of_an_attempt_resets_the_takeovers(bench: Bench) -> None:
    added = bench.add(real_file(), takeovers=MAX_TAKEOVERS - 1)

    bench.handler(MemoryBroker().publisher()).open_workflow_request(added.payload_id)

    assert bench.found(added).takeovers == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_lease_is_renewed_during_the_work_and_before_a_request_is_published(
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


def test_an_error_after_a_renewal_is_recorded_too(bench: Bench) -> None:
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
