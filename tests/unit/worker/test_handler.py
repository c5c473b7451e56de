"""Opening a workflow request, over a real folder store and a real in-memory broker."""

from datetime import timedelta
from itertools import pairwise

import pytest
from handler_bench import LEASE, Bench, Observed, SlowBroker
from instances import new_instance, real_file
from observed_store import ObservedStore, once
from records_made import inline, record
from structlog.testing import capture_logs

from shared.adapters.memory import MemoryBroker
from shared.errors import MalformedEvent, MessageRefused, StoreFull, StoreUnavailable
from shared.ports import Message, ReceivedMessage
from shared.record_store import Records
from shared.records import State
from worker.handler import retry_seconds


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


def test_an_opened_record_is_not_opened_again(bench: Bench) -> None:
    added = bench.add(real_file())
    published: list[str] = []
    handler = bench.handler(Observed(bench.requests, lambda m: published.append(m.message_id)))

    handler.open_workflow_request(added.payload_id)
    handler.open_workflow_request(added.payload_id)

    assert len(published) == 1


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


def test_an_overdue_confirm_is_the_last_error_of_the_payload_until_it_arrives(bench: Bench) -> None:
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


def test_a_brief_outage_of_the_store_does_not_end_the_wait_for_a_confirm(bench: Bench) -> None:
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


def test_a_stopping_worker_waits_briefly_for_a_confirm_and_returns_the_payload(
    bench: Bench,
) -> None:
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


def test_a_published_request_is_recorded_despite_a_brief_outage_of_the_store(bench: Bench) -> None:
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


def test_a_request_that_another_worker_opened_meanwhile_keeps_its_record(bench: Bench) -> None:
    added = bench.add(real_file())

    def open_elsewhere() -> None:
        held = bench.records.find(added.payload_id)
        assert held
        earlier = bench.now - timedelta(seconds=1)
        Records(bench.state, lambda _: None).settle(held, State.OPENED, opened_at=earlier)

    state = ObservedStore(bench.state, before={"create": once(open_elsewhere)})
    with capture_logs() as log:
        bench.handler(state=state).open_workflow_request(added.payload_id)

    assert "error" not in [line["log_level"] for line in log]
    found = bench.found(added)
    assert (found.state, found.last_error) == (State.OPENED, None)
    assert found.opened_at == bench.now - timedelta(seconds=1)
    assert bench.records.pending() == []


def test_a_published_request_is_not_published_again_while_its_record_cannot_be_written(
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


def test_a_missing_instance_fails_the_payload_with_the_reason(bench: Bench) -> None:
    added = bench.add(real_file())
    bench.instances.delete([f"{added.payload_id}/{inline(added)[0].path}"])

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert found.state is State.FAILED
    assert inline(added)[0].sop_instance_uid in (found.last_error or "")
    assert bench.opened_requests() == []


def test_an_internal_error_fails_the_payload_and_is_not_quoted(bench: Bench) -> None:
    added = bench.add(real_file())

    def trip(_: Message) -> None:
        raise ZeroDivisionError("Citizen^Jan")

    bench.handler(Observed(bench.requests, trip)).open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert found.state is State.FAILED
    assert f"ZeroDivisionError at {__file__}:" in (found.last_error or "")
    assert "Citizen" not in (found.last_error or "")


def test_a_worker_that_is_out_of_memory_tries_again_later(bench: Bench) -> None:
    added = bench.add(real_file())

    def run_out(_: Message) -> None:
        raise MemoryError

    bench.handler(Observed(bench.requests, run_out)).open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.lease) == (State.PENDING, None)
    assert "out of memory" in (found.last_error or "")


def test_a_stopping_worker_returns_its_payload(bench: Bench) -> None:
    added = bench.add(real_file())
    handler = bench.handler()
    handler.stop()

    handler.open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.lease, found.attempts) == (State.PENDING, None, 0)
    assert found.due_at == bench.now
    assert bench.opened_requests() == []


def test_a_stopping_worker_reads_no_more_instances(bench: Bench) -> None:
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


def test_an_internal_error_while_the_worker_stops_does_not_fail_the_payload(bench: Bench) -> None:
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
def test_a_body_that_is_not_an_event_is_malformed(bench: Bench, body: bytes) -> None:
    with pytest.raises(MalformedEvent):
        bench.handler()(ReceivedMessage(body))


def test_retries_double_up_to_two_minutes() -> None:
    waits = [retry_seconds(attempts) for attempts in range(1, 40)]

    assert 0.5 <= waits[0] <= 1
    assert all(later > earlier for earlier, later in pairwise(waits[:7]))
    assert 90 <= max(waits) <= 120
