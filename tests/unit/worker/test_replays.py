"""Publishing a refused request again, over real folder stores."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path

import pytest
from observed_store import ObservedStore
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, record

from shared.adapters.folder.publisher import FolderEventPublisher
from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.queues import Published
from shared.errors import MessageRefused, Unroutable, VersionConflict
from shared.ports import EventPublisher, Message, ObjectStore, Publication
from shared.record_store import Records
from shared.records import IngestRecord, Lease, State, encode, newest_first
from shared.refusals import PayloadState, Refusal, RefusalReason, Refusals
from shared.runtime.metrics import WorkerMetrics
from worker.replays import Replays
from worker.workflow_manager import WorkflowManager

LEASE = timedelta(seconds=60)
REQUEST = {"payload_id": "as it was sent"}


class Bench:
    """Refused payloads, a manual clock, and workers that replay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = RECEIVED_AT + timedelta(minutes=1)
        self.state = FolderObjectStore(folder / "state")
        self.instances = FolderObjectStore(folder / "payloads")
        for store in (self.state, self.instances):
            store.prepare()
        self.refusals = Refusals(self.state)
        self.requests = FolderEventPublisher(folder / "requests")
        self.registry = CollectorRegistry()
        self._metrics = WorkerMetrics(self.registry)

    def replays(
        self,
        publisher: EventPublisher | None = None,
        owner: str = "me",
        state: ObjectStore | None = None,
    ) -> Replays:
        """A worker's replays over the bench's state, or over the one given, which passes on to
        it."""
        return Replays(
            records=Records(self.state),
            refusals=Refusals(state) if state else self.refusals,
            instances=self.instances,
            publisher=publisher or self.requests,
            workflow_manager=WorkflowManager("monaideploy", "md.workflow.request", "payloads"),
            owner=owner,
            lease=LEASE,
            metrics=self._metrics,
            clock=lambda: self.now,
        )

    def refused(self, *, replayed: bool = True) -> str:
        """A refused payload, whose replay was requested."""
        found: IngestRecord = replace(record(), state=State.OPENED, workflow_request=REQUEST)
        of = found.payload_id
        self.state.create(f"opened/{newest_first(of)}", encode(found), "application/json")
        self.instances.put(f"{of}/dcm/1/2/3.dcm", BytesIO(b"x"), 1, "application/dicom")
        self.refusals.note(Refusal(of, 0, RefusalReason.REJECTED, self.now))
        if replayed:
            self.refusals.request_replay(of, 1, self.now)
        return of

    def sent(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "requests").glob("*.json"))

    def state_of(self, of: str) -> PayloadState:
        return self.refusals.outcome(of).state_when_opened


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@dataclass
class Failing:
    """A publisher that raises a given error."""

    error: Exception
    begun: int = 0

    def start(self) -> None: ...

    def begin(self, message: Message) -> Publication:  # noqa: ARG002
        self.begun += 1
        raise self.error

    def ping(self) -> None: ...

    def close(self) -> None: ...


def test_a_replay_publishes_the_recorded_request_with_the_next_number(
    bench: Bench,
) -> None:
    of = bench.refused()

    bench.replays().publish(of)

    assert bench.sent() == [f"{of}.1"]
    sent = json.loads((bench.folder / "requests" / f"{of}.1.json").read_text())
    assert sent["body"] == {**REQUEST, "payload": []}
    assert bench.state_of(of) is PayloadState.OPENED
    assert bench.refusals.last_replay(of) is None


def test_a_payload_without_a_replay_publishes_nothing(bench: Bench) -> None:
    of = bench.refused(replayed=False)

    bench.replays().publish(of)

    assert bench.sent() == []
    assert bench.state_of(of) is PayloadState.REFUSED


def test_a_replay_leased_by_another_worker_is_published_after_the_lease(bench: Bench) -> None:
    of = bench.refused()
    held = bench.refusals.replay(of, 1)
    assert held
    bench.refusals.change(held, lease=Lease("other", bench.now + LEASE), attempts=1)

    bench.replays().publish(of)
    assert bench.sent() == []

    bench.now += LEASE
    bench.replays().publish_due()
    assert bench.sent() == [f"{of}.1"]


def test_a_transient_failure_is_recorded_and_tried_again_when_due(bench: Bench) -> None:
    of = bench.refused()
    failing = Failing(Unroutable("no queue"))
    replays = bench.replays(failing)

    replays.publish(of)
    replays.publish_due()

    held = bench.refusals.replay(of, 1)
    assert held
    assert (held.replay.last_error, held.replay.attempts, failing.begun) == ("no queue", 1, 1)
    assert held.replay.lease is None
    assert bench.state_of(of) is PayloadState.PENDING
    bench.now += timedelta(seconds=1)
    bench.replays().publish_due()
    assert bench.state_of(of) is PayloadState.OPENED


def test_a_permanent_failure_makes_the_payload_refused_with_the_reason(bench: Bench) -> None:
    of = bench.refused()

    bench.replays(Failing(MessageRefused("too large"))).publish(of)

    found = bench.refusals.refusal(of, 1)
    assert (found.reason, found.detail) == (RefusalReason.NOT_SENT, "too large")
    assert bench.state_of(of) is PayloadState.REFUSED
    assert bench.refusals.outcome(of).next_replay == 2


def test_a_payload_without_objects_is_not_published(bench: Bench) -> None:
    of = bench.refused()
    bench.instances.delete([f"{of}/dcm/1/2/3.dcm"])

    bench.replays().publish(of)

    assert bench.sent() == []
    assert "objects are gone" in (bench.refusals.refusal(of, 1).detail or "")


@pytest.mark.parametrize("is_refused_again", [False, True])
def test_the_leftover_of_a_published_replay_is_removed_and_not_published(
    bench: Bench, is_refused_again: bool
) -> None:
    of = bench.refused()
    if is_refused_again:
        bench.refusals.note(Refusal(of, 1, RefusalReason.REJECTED, bench.now))
    else:
        bench.refusals.note_replayed(of, 1, bench.now)
        bench.refusals.request_replay(of, 1, bench.now)

    bench.replays().publish_due()

    assert bench.sent() == []
    assert bench.refusals.last_replay(of) is None
    expected = PayloadState.REFUSED if is_refused_again else PayloadState.OPENED
    assert bench.state_of(of) is expected


def test_a_worker_that_loses_the_race_for_a_replay_does_not_publish(bench: Bench) -> None:
    of = bench.refused()

    def be_overtaken(_: str) -> None:
        held = bench.refusals.replay(of, 1)
        assert held
        bench.refusals.change(held, lease=Lease("other", bench.now + LEASE), attempts=1)

    state = ObservedStore(bench.state, before={"replace": be_overtaken})

    with pytest.raises(VersionConflict):
        bench.replays(state=state).publish(of)
    assert bench.sent() == []


@dataclass
class Late(Published):
    """A publication whose confirm arrives after some polls, each of which takes time."""

    polls: int
    on_poll: Callable[[], None]
    overdue: str | None = "the broker is slow"

    def wait(self, seconds: float) -> bool:  # noqa: ARG002
        self.polls -= 1
        self.on_poll()
        return self.polls == 0


def test_the_lease_is_renewed_during_the_wait_for_the_confirm(bench: Bench) -> None:
    of = bench.refused()
    seen: list[datetime] = []

    def on_poll() -> None:
        bench.now += LEASE / 3
        held = bench.refusals.replay(of, 1)
        assert held
        assert held.replay.lease
        seen.append(held.replay.lease.until)
        assert held.replay.lease.until > bench.now

    class Slow(Failing):
        def begin(self, message: Message) -> Publication:  # noqa: ARG002
            return Late(6, on_poll)

    bench.replays(Slow(Unroutable(""))).publish(of)

    assert len(set(seen)) > 1
    assert bench.state_of(of) is PayloadState.OPENED


@pytest.mark.parametrize(
    ("overdue", "expected"),
    [(None, "no queue"), ("the broker is slow", "the broker is slow")],
)
def test_a_renewed_lease_keeps_the_last_error_until_the_confirm_is_overdue(
    bench: Bench, overdue: str | None, expected: str
) -> None:
    of = bench.refused()
    held = bench.refusals.replay(of, 1)
    assert held
    bench.refusals.change(held, last_error="no queue")
    seen: list[str | None] = []

    def on_poll() -> None:
        bench.now += LEASE
        found = bench.refusals.replay(of, 1)
        assert found
        seen.append(found.replay.last_error)

    class Slow(Failing):
        def begin(self, message: Message) -> Publication:  # noqa: ARG002
            return Late(3, on_poll, overdue)

    bench.replays(Slow(Unroutable(""))).publish(of)

    assert seen == ["no queue", expected, expected]


def test_the_lease_is_renewed_when_the_clock_is_set_back(bench: Bench) -> None:
    of = bench.refused()
    seen: list[datetime] = []

    def on_poll() -> None:
        held = bench.refusals.replay(of, 1)
        assert held
        assert held.replay.lease
        seen.append(held.replay.lease.until)
        bench.now = RECEIVED_AT - timedelta(days=1)

    class Slow(Failing):
        def begin(self, message: Message) -> Publication:  # noqa: ARG002
            return Late(3, on_poll)

    bench.replays(Slow(Unroutable(""))).publish(of)

    assert seen[-1] == bench.now + LEASE


def test_a_stopping_worker_leaves_an_unconfirmed_replay_to_another_one(
    bench: Bench,
) -> None:
    of = bench.refused()

    class Silent(Failing):
        def begin(self, message: Message) -> Publication:  # noqa: ARG002
            return Late(-1, lambda: None)

    replays = bench.replays(Silent(Unroutable("")))
    replays.stop()
    replays.publish(of)

    assert bench.state_of(of) is PayloadState.PENDING
    bench.now += timedelta(seconds=1)
    bench.replays(owner="other").publish_due()
    assert bench.state_of(of) is PayloadState.OPENED


def test_an_unreadable_replay_does_not_delay_the_others(bench: Bench) -> None:
    broken, other = bench.refused(), bench.refused()
    for listed in list(bench.state.list("replays/")):
        if broken in listed.key:
            found = bench.state.get(listed.key)
            bench.state.replace(listed.key, b"{", found.version, "application/json")

    bench.replays().publish_due()

    assert bench.sent() == [f"{other}.1"]


def test_refused_payloads_are_counted(bench: Bench) -> None:
    bench.refused(replayed=False)
    bench.refused()

    bench.replays(Failing(Unroutable(""))).publish_due()

    assert bench.registry.get_sample_value("stowgate_refused") == 1


def test_a_pass_lists_each_kind_of_object_once(bench: Bench) -> None:
    bench.refused(replayed=False)
    listed: list[str] = []

    bench.replays(state=ObservedStore(bench.state, before={"list": listed.append})).publish_due()

    assert sorted(listed) == ["refused/", "replayed/", "replays/"]


def test_a_replay_without_a_recorded_refusal_is_published(bench: Bench) -> None:
    """A state bucket that was restored from a backup may lack the refusal."""
    of = bench.refused()
    bench.state.delete([listed.key for listed in bench.state.list("refused/")])

    bench.replays().publish_due()

    assert bench.sent() == [f"{of}.1"]
    assert bench.refusals.last_replay(of) is None
