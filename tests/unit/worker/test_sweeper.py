"""The sweep, over real folder stores."""

import errno
import os
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import pytest
import structlog
from observed_store import ObservedStore
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, record

from shared.adapters.folder.store import FolderObjectStore
from shared.attachments import Attachment
from shared.errors import StoreUnavailable
from shared.ids import PayloadIds
from shared.ports import ObjectStore
from shared.record_store import Records, UploadGivenUp
from shared.records import State
from shared.runtime.metrics import WorkerMetrics
from shared.sweep_cursor import CURSOR, SweepCursor
from shared.time import utc_now
from worker.sweeper import Sweeper

GRACE = timedelta(hours=1)


@dataclass
class Bench:
    folder: Path
    now: datetime = RECEIVED_AT + 2 * GRACE
    pause: timedelta = timedelta(days=1)

    def __post_init__(self) -> None:
        self.instances = FolderObjectStore(self.folder / "payloads")
        self.state = FolderObjectStore(self.folder / "state")
        self.instances.prepare()
        self.state.prepare()
        self.records = Records(self.state)
        self.payload_ids = PayloadIds("stowgate")
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(self.registry)
        self.cursor = SweepCursor(
            state=self.state,
            instances=self.instances,
            payload_ids=self.payload_ids,
            clock=lambda: self.now,
        )
        self.sweeper = self.another_sweeper()
        now, self.now = self.now, RECEIVED_AT - timedelta(days=1)
        self.sweeper.sweep()
        self.now = now

    def another_sweeper(
        self, *, state: ObjectStore | None = None, instances: ObjectStore | None = None
    ) -> Sweeper:
        """A sweeper of the bench's stores, or of those given, which pass on to them."""
        state = state or self.state
        return Sweeper(
            instances=instances or self.instances,
            state=state,
            records=Records(state),
            cursor=self.cursor,
            payload_ids=self.payload_ids,
            grace=GRACE,
            pause=self.pause,
            metrics=self.metrics,
            clock=lambda: self.now,
        )

    def upload(self, payload_id: str) -> str:
        for name in ("1.dcm", "2.dcm"):
            key = f"{payload_id}/dcm/1.2/1.3/{name}"
            self.instances.put(key, BytesIO(b"x"), 1, "application/dicom")
        for attachment in Attachment:
            self.records.attachments.put(payload_id, attachment, BytesIO(b"x"), 1, "")
        return payload_id

    def left_attached(self) -> set[str]:
        """The payloads that have attachments."""
        return {found.key.split("/")[1] for found in self.state.list("uploads/")}

    def left(self) -> set[str]:
        return set(self.instances.folders("")) - {"stowgate"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_an_upload_without_a_record_is_removed_after_its_grace(bench: Bench) -> None:
    bench.upload(bench.payload_ids.mint(bench.now - GRACE - timedelta(seconds=1)))
    young = bench.upload(bench.payload_ids.mint(bench.now - GRACE + timedelta(seconds=1)))

    bench.sweeper.sweep()

    assert bench.left() == bench.left_attached() == {young}
    assert bench.registry.get_sample_value("stowgate_swept_objects_total") == 2

    bench.now += timedelta(seconds=2)
    bench.sweeper.sweep()

    assert bench.left() == bench.left_attached() == set()
    assert bench.registry.get_sample_value("stowgate_swept_objects_total") == 4


@pytest.mark.parametrize("state", list(State))
def test_an_upload_with_a_record_stays_whatever_its_state(bench: Bench, state: State) -> None:
    added = record()
    bench.records.add(added)
    if state is not State.PENDING:
        held = bench.records.find(added.payload_id)
        assert held is not None
        bench.records.settle(held, state)
    bench.upload(added.payload_id)

    bench.sweeper.sweep()

    assert bench.left() == bench.left_attached() == {added.payload_id}
    assert len(list(bench.state.list("uploads/"))) == len(Attachment)


def test_payloads_of_other_producers_are_never_touched(bench: Bench) -> None:
    foreign = {
        bench.upload(name)
        for name in (
            str(uuid4()),
            PayloadIds("another stowgate").mint(RECEIVED_AT),
            "not-a-payload",
            "00000000-0000-0000-0000-000000000000",
        )
    }

    bench.sweeper.sweep()

    assert bench.left() == bench.left_attached() == foreign


def test_a_sweep_looks_only_at_what_is_new_since_the_last(bench: Bench) -> None:
    for number in range(5):
        added = replace(
            record(), payload_id=bench.payload_ids.mint(RECEIVED_AT + timedelta(seconds=number))
        )
        bench.records.add(added)
        bench.upload(added.payload_id)
    looked_at: list[str] = []
    state = ObservedStore(bench.state, before={"get": looked_at.append})
    sweeper = bench.another_sweeper(state=state)
    sweeper.sweep()
    assert len(looked_at) >= 5
    looked_at.clear()

    bench.now += GRACE
    sweeper.sweep()

    assert looked_at == []


def test_without_its_state_the_sweep_takes_nothing_for_abandoned(bench: Bench) -> None:
    """Neither at once nor when its grace is over, which those just before are still in."""
    kept = {
        bench.upload(bench.payload_ids.mint(minted))
        for minted in (RECEIVED_AT, bench.now - GRACE / 2)
    }
    bench.state.delete([found.key for found in bench.state.list("")])

    bench.sweeper.sweep()
    bench.now += GRACE / 10
    bench.sweeper.sweep()
    bench.now += 10 * GRACE
    bench.sweeper.sweep()

    assert bench.left() == kept


def test_two_sweepers_at_once_do_no_harm(bench: Bench) -> None:
    bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    other = Bench(bench.folder, bench.now)
    state = ObservedStore(bench.state, before={"get": lambda _: other.sweeper.sweep()})

    bench.another_sweeper(state=state).sweep()

    assert bench.left() == set()


def test_idempotency_keys_are_removed_after_a_day(bench: Bench) -> None:
    bench.state.create("idempotency/ab/x.json", b"{}", "application/json")
    bench.now = utc_now() + timedelta(hours=23)
    bench.sweeper.sweep()
    assert [found.key for found in bench.state.list("idempotency/")] == ["idempotency/ab/x.json"]

    bench.now = utc_now() + timedelta(hours=25)
    bench.sweeper.sweep()
    assert list(bench.state.list("idempotency/")) == []


def test_a_sweep_looks_at_the_claims_of_a_few_folders_and_in_a_day_at_all(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, pause=timedelta(minutes=10))
    for number in range(256):
        bench.state.create(f"idempotency/{number:02x}/x.json", b"{}", "application/json")
    bench.now = utc_now() + timedelta(hours=25)
    listed: list[str] = []
    sweeper = bench.another_sweeper(state=ObservedStore(bench.state, after={"list": listed.append}))

    sweeper.sweep()
    assert sum(key.startswith("idempotency/") for key in listed) == 2

    for _ in range(24 * 6 - 1):
        sweeper.sweep()
    assert list(bench.state.list("idempotency/")) == []


@pytest.fixture
def kept_by_the_disk(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Words in the paths of files that may not be removed."""
    words: set[str] = set()
    unlink = os.unlink

    def refuse(path: str) -> None:
        if any(word in path for word in words):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path)

    monkeypatch.setattr("shared.adapters.folder.store.os.unlink", refuse)
    return words


def test_one_object_that_may_not_be_removed_is_named_and_keeps_nothing_else(
    bench: Bench, kept_by_the_disk: set[str]
) -> None:
    locked = bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    bench.upload(bench.payload_ids.mint(RECEIVED_AT + timedelta(seconds=1)))
    kept_by_the_disk.add(f"{locked}/dcm/1.2/1.3/1.dcm")

    with structlog.testing.capture_logs() as log:
        for _ in range(3):
            bench.sweeper.sweep()

    assert [found.key for found in bench.instances.list("")] == [f"{locked}/dcm/1.2/1.3/1.dcm"]
    assert bench.cursor.read().after > locked
    (said,) = [entry["error"] for entry in log if entry["log_level"] == "error"]
    assert f"cannot delete {locked}/dcm/1.2/1.3/1.dcm" in said


def test_an_object_that_may_be_removed_after_all_is_removed_a_day_later(
    bench: Bench, kept_by_the_disk: set[str]
) -> None:
    locked = bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    kept_by_the_disk.add(locked)
    bench.sweeper.sweep()
    bench.now = utc_now() + timedelta(hours=25) + GRACE
    bench.sweeper.sweep()
    assert bench.left() == {locked}

    kept_by_the_disk.clear()
    bench.sweeper.sweep()

    assert bench.left() == set()
    assert list(bench.state.list("pending/")) == []


def test_attachments_that_may_not_be_removed_leave_the_instances_by_which_they_are_found(
    bench: Bench, kept_by_the_disk: set[str]
) -> None:
    locked = bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    kept_by_the_disk.add(f"uploads/{locked}")
    bench.sweeper.sweep()
    bench.now = utc_now() + timedelta(hours=25) + GRACE
    bench.sweeper.sweep()
    assert bench.left() == bench.left_attached() == {locked}

    kept_by_the_disk.clear()
    bench.sweeper.sweep()

    assert bench.left() == bench.left_attached() == set()


def test_what_an_api_attaches_after_it_was_given_up_is_removed_with_its_tombstone(
    bench: Bench,
) -> None:
    late = bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    bench.sweeper.sweep()
    bench.records.attachments.put(late, Attachment.INSTANCES, BytesIO(b"x"), 1, "")

    bench.now = utc_now() + timedelta(hours=25) + GRACE
    bench.sweeper.sweep()

    assert bench.left_attached() == set()


def test_a_tombstone_and_a_claim_that_may_not_be_removed_keep_nothing_else(
    bench: Bench, kept_by_the_disk: set[str]
) -> None:
    for second in range(2):
        bench.upload(bench.payload_ids.mint(RECEIVED_AT + timedelta(seconds=second)))
    bench.sweeper.sweep()
    tombstones = [found.key for found in bench.state.list("pending/")]
    for name in ("idempotency/00/x.json", "idempotency/00/y.json", "idempotency/ff/z.json"):
        bench.state.create(name, b"{}", "application/json")
    bench.now = utc_now() + timedelta(hours=25) + GRACE
    young = bench.upload(bench.payload_ids.mint(bench.now - 1.5 * GRACE))
    kept_by_the_disk |= {tombstones[0], "idempotency/00/x.json"}

    bench.sweeper.sweep()

    assert young not in bench.left()
    left = {found.key for found in bench.state.list("")}
    assert left & {*tombstones} == {tombstones[0]}
    assert {key for key in left if "idempotency" in key} == {"idempotency/00/x.json"}


def test_a_store_that_is_away_ends_the_sweep(bench: Bench) -> None:
    def be_gone(_: str) -> NoReturn:
        raise StoreUnavailable("gone")

    bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    gone = ObservedStore(bench.instances, before={"delete": be_gone, "ping": be_gone})

    with structlog.testing.capture_logs() as log:
        bench.another_sweeper(instances=gone).sweep()

    assert [entry["error"] for entry in log] == ["gone"]
    assert bench.cursor.read().after < bench.payload_ids.mint(RECEIVED_AT)


def _written_next_year(bench: Bench, key: str) -> None:
    next_year = (utc_now() + timedelta(days=365)).timestamp()
    os.utime(bench.folder / "state" / key, (next_year, next_year))


def test_what_a_clock_that_was_ahead_wrote_is_kept_a_day_from_now(bench: Bench) -> None:
    late = bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    bench.sweeper.sweep()
    (tombstone,) = [found.key for found in bench.state.list("pending/")]
    key = "idempotency/ab/x.json"
    bench.state.create(key, b"{}", "application/json")
    _written_next_year(bench, key)
    _written_next_year(bench, tombstone)

    bench.now = utc_now()
    bench.sweeper.sweep()
    bench.now += timedelta(hours=23)
    bench.sweeper.sweep()
    assert bench.state.get(key).data == b"{}"
    assert bench.state.get(tombstone).data == b""

    bench.now += timedelta(hours=1) + GRACE * 1.1
    bench.sweeper.sweep()
    assert list(bench.state.list("idempotency/")) == []
    assert list(bench.state.list("pending/")) == []
    assert late not in bench.left()


def test_a_cursor_of_a_clock_that_was_ahead_does_not_end_all_sweeping(bench: Bench) -> None:
    bench.now += timedelta(days=365)
    bench.sweeper.sweep()
    bench.now -= timedelta(days=365)
    kept = bench.upload(bench.payload_ids.mint(bench.now))

    with structlog.testing.capture_logs() as log:
        bench.sweeper.sweep()
    bench.now += timedelta(hours=1)
    bench.upload(bench.payload_ids.mint(bench.now))
    bench.now += 2 * GRACE
    bench.sweeper.sweep()

    assert [entry["why"] for entry in log] == [f"a clock was ahead when {CURSOR} was written"]
    assert bench.left() == {kept}


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"{}", b'{"after":null}'])
def test_a_damaged_cursor_is_named_and_keeps_nothing_else_from_being_swept(
    bench: Bench, damaged: bytes
) -> None:
    bench.state.put(CURSOR, BytesIO(damaged), len(damaged), "application/json")
    bench.state.create("idempotency/ab/x.json", b"{}", "application/json")
    bench.now = utc_now() + timedelta(hours=25)

    with structlog.testing.capture_logs() as log:
        bench.sweeper.sweep()

    (entry,) = log
    assert f"{CURSOR} in the state bucket is damaged" in entry["error"]
    assert "move it out of the bucket" in entry["error"]
    assert list(bench.state.list("idempotency/")) == []


def test_an_upload_that_comes_late_to_its_record_finds_itself_given_up(bench: Bench) -> None:
    late = replace(record(), payload_id=bench.upload(bench.payload_ids.mint(RECEIVED_AT)))
    bench.sweeper.sweep()

    with pytest.raises(UploadGivenUp):
        bench.records.add(late)


def test_what_an_upload_stores_after_it_was_given_up_is_removed_a_day_later(bench: Bench) -> None:
    late = bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    bench.sweeper.sweep()
    bench.upload(late)

    bench.now = utc_now() + timedelta(hours=24) + GRACE * 0.9
    bench.sweeper.sweep()
    assert bench.left() == {late}
    assert len(list(bench.state.list("pending/"))) == 1

    bench.now = utc_now() + timedelta(hours=24) + GRACE * 1.1
    bench.sweeper.sweep()
    assert bench.left() == set()
    assert list(bench.state.list("pending/")) == []


def test_a_record_on_a_bad_sector_is_passed_over(bench: Bench) -> None:
    kept = bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    bench.upload(bench.payload_ids.mint(RECEIVED_AT + timedelta(seconds=1)))

    def fail(key: str) -> None:
        if kept in key:
            raise StoreUnavailable("bad sector")

    state = ObservedStore(bench.state, before={"get": fail})

    bench.another_sweeper(state=state).sweep()

    assert bench.left() == {kept}


def test_an_unreadable_record_is_skipped_and_delays_no_other(bench: Bench) -> None:
    unreadable = bench.upload(bench.payload_ids.mint(RECEIVED_AT))
    bench.records.add(replace(record(), payload_id=unreadable))
    (key,) = [found.key for found in bench.state.list("pending/")]
    bench.state.put(key, BytesIO(b"{"), 1, "application/json")
    bench.upload(bench.payload_ids.mint(RECEIVED_AT + timedelta(seconds=1)))
    bench.state.create("idempotency/ab/x.json", b"{}", "application/json")

    bench.now = utc_now() + timedelta(hours=48)
    bench.sweeper.sweep()
    bench.now += timedelta(hours=48)
    bench.sweeper.sweep()

    assert bench.left() == {unreadable}
    assert [found.key for found in bench.state.list("pending/")] == [key]
    assert list(bench.state.list("idempotency/")) == []
