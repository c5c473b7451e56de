"""Refusals and replays, over a real folder store."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from pathlib import Path

import orjson
import pytest
import structlog.testing
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, record

from shared.adapters.folder.store import FolderObjectStore
from shared.errors import ObjectMissing, StoreUnavailable, VersionConflict
from shared.ids import PayloadIds
from shared.ports import DeadLetter, StoredObject
from shared.record_store import Records
from shared.records import IngestRecord, Lease, State
from shared.refusals import (
    NOTHING_KNOWN,
    OutcomeUnreadable,
    PayloadState,
    Refusal,
    RefusalReason,
    Refusals,
)
from shared.runtime.metrics import WorkerMetrics
from worker.refusals import RefusalNotes
from worker.workflow_manager import number_of

NOW = RECEIVED_AT + timedelta(minutes=1)


@pytest.fixture
def store(tmp_path: Path) -> FolderObjectStore:
    store = FolderObjectStore(tmp_path)
    store.prepare()
    return store


@pytest.fixture
def refusals(store: FolderObjectStore) -> Refusals:
    return Refusals(store)


def payload_id(minutes: int = 0) -> str:
    return PayloadIds("stowgate").mint(RECEIVED_AT + timedelta(minutes=minutes))


def refused(of: str, number: int = 0) -> Refusal:
    return Refusal(of, number, RefusalReason.REJECTED, NOW)


Fact = Callable[[Refusals, str], object]
FACTS: dict[str, Fact] = {
    "refused": lambda facts, of: facts.note(refused(of)),
    "replay requested": lambda facts, of: facts.request_replay(of, 1, NOW),
    "replayed": lambda facts, of: facts.note_replayed(of, 1, NOW),
    "refused again": lambda facts, of: facts.note(refused(of, 1)),
}


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ([], PayloadState.OPENED),
        (["refused"], PayloadState.REFUSED),
        (["refused", "replay requested"], PayloadState.PENDING),
        (["refused", "replay requested", "replayed"], PayloadState.OPENED),
        (["refused", "replayed", "replay requested"], PayloadState.OPENED),
        (["refused", "replay requested", "refused again"], PayloadState.REFUSED),
        (["refused", "replay requested", "replayed", "refused again"], PayloadState.REFUSED),
        (["refused", "replay requested", "refused again", "replayed"], PayloadState.REFUSED),
        (["refused", "replay requested", "replayed", "refused"], PayloadState.OPENED),
        (["refused again"], PayloadState.REFUSED),
    ],
)
def test_the_state_follows_from_the_objects_of_each_request(
    refusals: Refusals, facts: list[str], state: PayloadState
) -> None:
    of = payload_id()
    for fact in facts:
        FACTS[fact](refusals, of)

    assert refusals.outcome(of).state_when_opened is state
    assert [found for _, found in refusals.outcomes()] == ([refusals.outcome(of)] if facts else [])


def test_the_order_of_events_does_not_matter(refusals: Refusals) -> None:
    states = set()
    for minutes, order in enumerate(permutations(["refused", "replayed", "refused again"])):
        of = payload_id(minutes)
        for fact in order:
            FACTS[fact](refusals, of)
        states.add(refusals.outcome(of).state_when_opened)

    assert states == {PayloadState.REFUSED}


@pytest.mark.parametrize("state", [State.PENDING, State.FAILED])
def test_the_records_own_state_counts_until_it_is_opened(refusals: Refusals, state: State) -> None:
    of = record()
    refusals.note(refused(of.payload_id))
    outcome = refusals.outcome(of.payload_id)

    assert outcome.state(_in(of, state)) is PayloadState(state)
    assert outcome.state(_in(of, State.OPENED)) is PayloadState.REFUSED


def _in(of: IngestRecord, state: State) -> IngestRecord:
    return IngestRecord(**{**vars(of), "state": state})


def test_a_refusal_recorded_twice_counts_once_and_keeps_its_first_time(refusals: Refusals) -> None:
    of = payload_id()
    later = Refusal(of, 0, RefusalReason.DELIVERY_LIMIT, NOW + timedelta(hours=1))

    assert [refusals.note(refused(of)), refusals.note(later)] == [True, False]
    assert refusals.refusal(of, 0) == refused(of)
    assert refusals.outcome(of).refusals == 1


def test_a_replay_can_be_requested_once_per_number(refusals: Refusals) -> None:
    of = payload_id()
    refusals.request_replay(of, 1, NOW)

    with pytest.raises(VersionConflict):
        refusals.request_replay(of, 1, NOW)


def test_one_of_two_workers_leases_a_replay(refusals: Refusals) -> None:
    of = payload_id()
    refusals.request_replay(of, 1, NOW)
    one, other = refusals.replay(of, 1), refusals.replay(of, 1)
    assert one
    assert other
    taken = refusals.change(one, lease=Lease("me", NOW), attempts=1, last_error="x")

    with pytest.raises(VersionConflict):
        refusals.change(other, attempts=1)
    assert refusals.replay(of, 1) == taken


def test_payloads_are_listed_newest_first_and_after_a_cursor(refusals: Refusals) -> None:
    ids = [payload_id(minutes) for minutes in (3, 2, 1)]
    for of in ids:
        refusals.note(refused(of))
        refusals.note(refused(of, 1))

    assert [of for of, _ in refusals.outcomes()] == ids
    assert [of for of, _ in refusals.outcomes(ids[0])] == ids[1:]
    assert [outcome.refusals for _, outcome in refusals.outcomes()] == [2, 2, 2]


def test_a_page_of_outcomes_ends_before_a_payload_that_it_may_not_know_fully(
    refusals: Refusals,
) -> None:
    ids = [payload_id(minutes) for minutes in (4, 3, 2, 1)]
    for of in ids:
        refusals.note(refused(of))
        refusals.note_replayed(of, 1, NOW)
    refusals.note(refused(ids[0], 1))

    first, end = refusals.outcomes_page(4)
    assert (list(first), end) == (ids[:2], ids[1])
    assert end
    second, end = refusals.outcomes_page(4, end)

    assert (list(second), end) == (ids[2:], None)
    assert {**first, **second} == {of: refusals.outcome(of) for of in ids}


def test_a_payload_that_was_refused_more_often_than_a_page_has_names_is_a_page(
    refusals: Refusals,
) -> None:
    often, older = payload_id(2), payload_id(1)
    for number in range(3):
        refusals.note(refused(often, number))
    refusals.note(refused(older))

    first, end = refusals.outcomes_page(2)

    assert (first, end) == ({often: refusals.outcome(often)}, often)
    assert list(refusals.outcomes_page(2, often)[0]) == [older]


def test_objects_with_other_names_are_skipped(refusals: Refusals, store: FolderObjectStore) -> None:
    for key in ("refused/notes.txt", f"refused/{payload_id()}/000000.json"):
        store.create(key, b"x", "text/plain")

    assert list(refusals.outcomes()) == []
    assert refusals.outcome(payload_id()) is NOTHING_KNOWN


def test_fields_of_a_newer_service_are_kept_and_a_newer_version_is_unreadable(
    refusals: Refusals, store: FolderObjectStore
) -> None:
    of = payload_id()
    refusals.request_replay(of, 1, NOW)
    (listed,) = store.list("replays/")

    def write(**changes: object) -> None:
        found = store.get(listed.key)
        data = orjson.dumps({**orjson.loads(found.data), **changes})
        store.replace(listed.key, data, found.version, "application/json")

    write(colour="red")
    held = refusals.replay(of, 1)
    assert held
    refusals.change(held, attempts=1)
    assert orjson.loads(store.get(listed.key).data)["colour"] == "red"
    write(version=2)
    with pytest.raises(OutcomeUnreadable, match="written by a newer Stowgate"):
        refusals.replay(of, 1)


def test_a_missing_refusal_raises_object_missing(refusals: Refusals) -> None:
    with pytest.raises(ObjectMissing):
        refusals.refusal(payload_id(), 0)


class Noting:
    """Records refusals in a real folder store."""

    def __init__(self, store: FolderObjectStore) -> None:
        self.records, self.refusals = Records(store), Refusals(store)
        self.registry = CollectorRegistry()
        self.notes = RefusalNotes(
            self.records,
            self.refusals,
            PayloadIds("stowgate"),
            WorkerMetrics(self.registry),
            clock=lambda: NOW,
        )

    def counted(self) -> dict[str, float]:
        return {
            sample.labels["kind"]: sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == "stowgate_dead_letters_total"
        }


@pytest.fixture
def noting(store: FolderObjectStore) -> Noting:
    return Noting(store)


def letter(of: str, number: int = 0, reason: str = "rejected") -> DeadLetter:
    message_id = f"{of}.{number}" if number else of
    return DeadLetter(orjson.dumps({"payload_id": of}), message_id, reason, NOW)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("rejected", RefusalReason.REJECTED),
        ("delivery_limit", RefusalReason.DELIVERY_LIMIT),
        ("expired", RefusalReason.OTHER),
        ("not_sent", RefusalReason.OTHER),
        ("", RefusalReason.OTHER),
    ],
)
def test_a_dead_letter_of_ours_is_recorded_with_its_reason(
    noting: Noting, word: str, reason: RefusalReason
) -> None:
    of = record()
    noting.records.add(of)

    noting.notes(letter(of.payload_id, 2, word))

    assert noting.refusals.refusal(of.payload_id, 2) == Refusal(of.payload_id, 2, reason, NOW)
    assert noting.counted() == {"noted": 1}


def test_a_repeated_dead_letter_is_counted_separately_and_recorded_once(noting: Noting) -> None:
    of = record()
    noting.records.add(of)

    for _ in range(3):
        noting.notes(letter(of.payload_id))

    assert noting.refusals.outcome(of.payload_id).refusals == 1
    assert noting.counted() == {"noted": 1, "noted-before": 2}


def test_the_time_from_the_post_to_its_refusal_is_measured_but_not_that_of_a_replay(
    noting: Noting,
) -> None:
    of = replace(record(), received_at=NOW - timedelta(seconds=40), workflow="w")
    noting.records.add(of)

    for number in (0, 0, 1):
        noting.notes(letter(of.payload_id, number))

    name, labels = "stowgate_post_to_refused_seconds", {"route": "workflow-in-url"}
    assert noting.registry.get_sample_value(f"{name}_count", labels) == 1
    assert noting.registry.get_sample_value(f"{name}_sum", labels) == 40


def test_a_refusal_is_in_the_audit_trail_once_without_content_of_the_request(
    noting: Noting,
) -> None:
    of = record()
    noting.records.add(of)

    with structlog.testing.capture_logs() as log:
        for _ in range(2):
            noting.notes(letter(of.payload_id))

    (line,) = (line for line in log if line["event"] == "workflow request refused")
    assert line["payload_id"] == of.payload_id
    assert (line["reason"], line["replay"]) == ("rejected", 0)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b"{}", b'{"payload_id": 1}', b'{"payload_id": "x"}', b"\xff"]
)
def test_a_body_that_is_not_a_request_is_counted_and_skipped(noting: Noting, body: bytes) -> None:
    with structlog.testing.capture_logs() as log:
        noting.notes(DeadLetter(body, "", "rejected", None))

    assert noting.counted() == {"unreadable": 1}
    assert [line["event"] for line in log] == [
        "dead letter skipped: its body is not a workflow request"
    ]


def test_a_request_of_another_producer_is_skipped_without_a_log_line(noting: Noting) -> None:
    with structlog.testing.capture_logs() as log:
        noting.notes(letter("01890000-0000-7000-8000-000000000000"))

    assert noting.counted() == {"foreign": 1}
    assert log == []


def test_a_payload_id_of_ours_without_a_record_is_skipped_and_logged(noting: Noting) -> None:
    of = payload_id()

    with structlog.testing.capture_logs() as log:
        noting.notes(letter(of))

    assert noting.counted() == {"without-record": 1}
    assert [(line["log_level"], line["payload_id"]) for line in log] == [("error", of)]
    assert list(noting.refusals.outcomes()) == []


def test_the_refusal_of_a_payload_with_an_unreadable_record_is_recorded(
    noting: Noting, store: FolderObjectStore
) -> None:
    of = record()
    noting.records.add(of)
    (listed,) = store.list("pending/")
    found = store.get(listed.key)
    newer = orjson.dumps({**orjson.loads(found.data), "version": 99})
    store.replace(listed.key, newer, found.version, "application/json")

    noting.notes(letter(of.payload_id))

    assert noting.refusals.outcome(of.payload_id).refusals == 1


def test_the_dead_letter_is_tried_again_if_the_store_is_unavailable(tmp_path: Path) -> None:
    class Away(FolderObjectStore):
        def get(self, key: str) -> StoredObject:  # noqa: ARG002
            raise StoreUnavailable("away")

    store = Away(tmp_path)
    store.prepare()
    noting = Noting(store)

    with pytest.raises(StoreUnavailable):
        noting.notes(letter(payload_id()))
    assert noting.counted() == {}


@pytest.mark.parametrize(
    ("message_id", "number"),
    [
        ("{}", 0),
        ("{}.1", 1),
        ("{}.12", 12),
        ("{}.0", 0),
        ("{}.1234567", 0),
        ("other.1", 0),
        ("", 0),
    ],
)
def test_the_number_of_a_request_comes_from_its_message_id(message_id: str, number: int) -> None:
    of = payload_id()

    assert number_of(message_id.format(of), of) == number


def test_a_dead_letter_without_a_time_gets_the_time_of_receipt(noting: Noting) -> None:
    of = record()
    noting.records.add(of)

    noting.notes(DeadLetter(orjson.dumps({"payload_id": of.payload_id}), "", "rejected", None))

    assert noting.refusals.refusal(of.payload_id, 0).refused_at == NOW
