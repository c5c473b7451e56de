"""The first delivery of the event of a new record: the worker holds its first lease."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from handler_bench import LEASE, Bench, Observed
from instances import new_instance, one_series, real_file
from observed_store import CALLS, Call, ObservedStore

from shared import events
from shared.adapters.memory import MemoryBroker
from shared.errors import StoreUnavailable
from shared.ports import Message, ObjectStore, ReceivedMessage
from shared.record_store import VersionedRecord
from shared.records import FIRST_DELIVERY, Lease, State, first_lease

FIRST_LEASE = first_lease(LEASE)


def add(bench: Bench, file: bytes | None = None) -> VersionedRecord:
    """A record as the API adds it now."""
    lease = Lease(FIRST_DELIVERY, bench.now + FIRST_LEASE)
    added = bench.add(file or new_instance(), due_at=bench.now, lease=lease)
    found = bench.records.find(added.payload_id)
    assert found is not None
    return found


def event(added: VersionedRecord, *, redelivered: bool = False) -> ReceivedMessage:
    message = events.encode(events.of_new_record(added), "e", "k")
    return ReceivedMessage(message.body, redelivered=redelivered)


def opened(bench: Bench, added: VersionedRecord) -> bool:
    return bench.found(added.record).state is State.OPENED


class Calls:
    """Counts the calls to a store."""

    def __init__(self, store: ObjectStore) -> None:
        self.made: Counter[str] = Counter()
        self.store = ObservedStore(store, before={call: self._count(call) for call in CALLS})

    def _count(self, call: Call) -> Callable[[str], None]:
        return lambda _: self.made.update([call])


def test_the_first_delivery_reads_no_record_and_writes_no_lease(bench: Bench) -> None:
    added = add(bench, real_file())
    state, instances = Calls(bench.state), Calls(bench.instances)

    bench.handler(state=state.store, instances=instances.store)(event(added))

    assert opened(bench, added)
    assert state.made == {"create": 1, "delete": 1}
    assert instances.made == {"read_range": 1, "put": 1}
    found = bench.found(added.record)
    assert (found.attempts, found.lease, found.opened_at) == (1, None, bench.now)


@pytest.mark.parametrize(("left", "leases_written"), [(0.8, 0), (0.7, 1)])
def test_three_quarters_of_a_first_lease_are_enough_to_publish(
    bench: Bench, left: float, leases_written: int
) -> None:
    added = add(bench)
    state = Calls(bench.state)
    bench.now += FIRST_LEASE * (1 - left)

    bench.handler(state=state.store)(event(added))

    assert opened(bench, added)
    assert state.made["replace"] == leases_written


def _large(bench: Bench) -> VersionedRecord:
    """A record that is too large for its event."""
    lease = Lease(FIRST_DELIVERY, bench.now + FIRST_LEASE)
    added = bench.add(*one_series(80), due_at=bench.now, lease=lease)
    found = bench.records.find(added.payload_id)
    assert found is not None
    assert events.of_new_record(found).new_record is None
    return found


def test_the_first_delivery_of_a_large_record_reads_it_and_writes_no_lease(bench: Bench) -> None:
    added = _large(bench)
    state = Calls(bench.state)

    bench.handler(state=state.store)(event(added))

    assert opened(bench, added)
    assert state.made["replace"] == 0
    assert bench.found(added.record).attempts == 1


def test_a_redelivered_event_of_a_large_record_waits_for_the_end_of_its_first_lease(
    bench: Bench,
) -> None:
    added = _large(bench)

    bench.handler()(event(added, redelivered=True))

    assert not opened(bench, added)


def test_a_first_delivery_of_a_large_record_that_was_changed_leaves_it_alone(
    bench: Bench,
) -> None:
    added = _large(bench)
    bench.records.change(added, last_error="changed by another worker")

    bench.handler()(event(added))

    assert not opened(bench, added)


def test_a_redelivered_event_waits_for_the_end_of_the_first_lease(bench: Bench) -> None:
    added = add(bench)

    bench.handler()(event(added, redelivered=True))
    assert not opened(bench, added)

    bench.now += FIRST_LEASE
    bench.handler()(event(added, redelivered=True))
    assert opened(bench, added)


def test_an_event_of_the_relay_waits_for_the_end_of_the_first_lease(bench: Bench) -> None:
    added = add(bench)
    bare = events.InstancesStored(added.record.payload_id, added.record.correlation_id)

    bench.handler()(ReceivedMessage(events.encode(bare, "e", "k").body))

    assert not opened(bench, added)


def test_a_late_first_delivery_writes_a_lease_before_it_publishes(bench: Bench) -> None:
    added = add(bench)
    bench.now += FIRST_LEASE * 0.3
    leases = []

    def look(_: Message) -> None:
        leases.append(bench.found(added.record).lease)

    bench.handler(Observed(bench.requests, look))(event(added))

    assert leases == [Lease("me", bench.now + LEASE)]
    assert opened(bench, added)


def test_a_first_delivery_after_the_first_lease_leaves_the_record_to_its_owner(
    bench: Bench,
) -> None:
    added = add(bench)
    bench.now += FIRST_LEASE
    bench.records.change(added, lease=Lease("other", bench.now + LEASE), attempts=1)

    bench.handler()(event(added))

    assert not opened(bench, added)


def test_a_first_delivery_does_not_publish_after_another_worker_took_over(
    bench: Bench,
) -> None:
    """Its clock is behind, and the sidecar takes until the first lease is nearly over."""
    added = add(bench)

    def take_over(_: str) -> None:
        bench.now += FIRST_LEASE * 0.9
        bench.records.change(added, lease=Lease("other", bench.now + LEASE), attempts=1)

    slow = ObservedStore(bench.instances, before={"put": take_over})
    published: list[str] = []
    publisher = Observed(bench.requests, lambda m: published.append(m.message_id))
    bench.handler(publisher, instances=slow)(event(added))

    assert published == []
    lease = bench.found(added.record).lease
    assert lease is not None
    assert lease.owner == "other"


def test_a_first_lease_longer_than_its_duration_is_replaced_before_publishing(
    bench: Bench,
) -> None:
    added = add(bench)
    bench.now -= timedelta(seconds=1)
    leases = []

    def look(_: Message) -> None:
        leases.append(bench.found(added.record).lease)

    bench.handler(Observed(bench.requests, look))(event(added))

    assert leases == [Lease("me", bench.now + LEASE)]


def test_a_first_delivery_that_fails_counts_as_an_attempt_and_is_tried_again(
    bench: Bench,
) -> None:
    added = add(bench)

    bench.handler(MemoryBroker().publisher())(event(added))

    found = bench.found(added.record)
    assert (found.state, found.attempts, found.lease) == (State.PENDING, 1, None)
    bench.now = found.due_at
    bench.handler().open_workflow_request(found.payload_id)
    assert opened(bench, added)
    assert bench.found(added.record).attempts == 2


def test_an_opened_payload_whose_pending_record_is_left_over_is_not_opened_again(
    bench: Bench,
) -> None:
    """The leftover looks like a record that no worker has processed."""
    added = add(bench)

    def away(_: str) -> None:
        raise StoreUnavailable("away")

    state = ObservedStore(bench.state, before={"delete": away})
    bench.handler(state=state)(event(added))
    assert opened(bench, added)
    assert bench.records.pending()
    published: list[str] = []
    publisher = Observed(bench.requests, lambda m: published.append(m.message_id))

    bench.now += FIRST_LEASE
    bench.handler(publisher)(event(added, redelivered=True))
    bench.handler(publisher).open_workflow_request(added.record.payload_id)

    assert published == []
    assert bench.records.pending() == []


def test_a_lease_after_the_first_one_does_not_count_as_a_takeover(bench: Bench) -> None:
    added = add(bench)
    bench.now += FIRST_LEASE

    bench.handler(MemoryBroker().publisher()).open_workflow_request(added.record.payload_id)

    found = bench.found(added.record)
    assert (found.attempts, found.takeovers) == (1, 0)


@pytest.mark.parametrize("state", [State.OPENED, State.FAILED])
def test_a_settled_record_in_an_event_is_not_opened(bench: Bench, state: State) -> None:
    added = add(bench)
    settled = replace(added, record=replace(added.record, state=state))
    published: list[str] = []
    publisher = Observed(bench.requests, lambda m: published.append(m.message_id))
    handler = bench.handler(publisher)

    handler.open_workflow_request(added.record.payload_id, settled)

    assert published == []
