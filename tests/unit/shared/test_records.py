"""The ingest record: its encoding, and its states over a real folder store."""

import errno
import gc
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4
from weakref import ref

import pytest
import structlog
from records_made import RECEIVED_AT, newest, record

from shared.adapters.folder.store import FolderObjectStore
from shared.dicom.left_out import NOTHING_LEFT_OUT, LeftOut
from shared.errors import (
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StowgateError,
    VersionConflict,
)
from shared.ids import PayloadIds, is_guid, minted_at, minted_before
from shared.instances import StoredInstance
from shared.ports import StoredObject
from shared.record_store import Records, UploadGivenUp, VersionedRecord
from shared.records import (
    FirstAnswer,
    IngestRecord,
    Lease,
    RecordUnreadable,
    State,
    decode,
    encode,
    newest_first,
    payload_id_of,
)

LEFT_OUT = LeftOut(((1, 2), (3, 4)), (("52009230", "SQ"),), is_explicit=True)
INSTANCE = StoredInstance("1.2.1", "1.2.2", "1.2.3", "1.2.4", 5, "ab", LEFT_OUT)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    store = FolderObjectStore(tmp_path)
    store.prepare()
    return Records(store)


def test_a_record_is_decoded_as_it_was_encoded() -> None:
    for written in (
        record(),
        replace(
            record(INSTANCE),
            workflow="w",
            vae_workflows=("a", "b"),
            lease=Lease("me", RECEIVED_AT + timedelta(microseconds=7)),
            state=State.OPENED,
            attempts=3,
            takeovers=1,
            last_error="x",
            workflows=("w",),
            route="workflow-in-url",
            opened_at=RECEIVED_AT,
            workflow_request={"payload_id": "x"},
            first_answer=FirstAnswer("ab", 200, "application/dicom+json", "{}"),
            unknown={"of_a_newer_service": [1]},
        ),
    ):
        assert decode(encode(written)) == written


NOTHING = asdict(NOTHING_LEFT_OUT)


@pytest.mark.parametrize(
    "changes",
    [
        {"payload_id": "../../etc"},
        {"correlation_id": "x" * 300},
        {"attempts": 10**30},
        {"received_at": "0001-01-01T00:00:00+23:59"},
        {"instances": [{}]},
        {"instances": [None]},
        {"study_uid": 1},
        {"study_uid": "../.."},
        {"size_bytes": "5"},
        {"left_out": {**NOTHING, "ranges": [[1]]}},
        {"left_out": {**NOTHING, "ranges": [["a", "b"]]}},
        {"left_out": {**NOTHING, "without_value": [["00100010"]]}},
        {"left_out": {**NOTHING, "is_explicit": "yes"}},
        {"left_out": {}},
    ],
    ids=str,
)
def test_a_record_with_a_value_of_the_wrong_type_is_unreadable(changes: dict[str, object]) -> None:
    """If it were accepted, it would be used, and could not be written back."""
    row = json.loads(encode(record(INSTANCE)))
    for key, value in changes.items():
        (row if key in row else row["instances"][0])[key] = value
    with pytest.raises(RecordUnreadable):
        decode(json.dumps(row).encode())


@pytest.mark.parametrize("traceparent", ["00-of another form", "x" * 5000])
def test_a_trace_context_that_is_not_valid_is_ignored(traceparent: str) -> None:
    made = replace(record(INSTANCE), traceparent=traceparent)

    assert decode(encode(made)) == replace(made, traceparent=None)


def test_a_record_without_some_of_its_instances_is_unreadable() -> None:
    with pytest.raises(RecordUnreadable, match="damaged or not written by Stowgate"):
        decode(encode(replace(record(INSTANCE), file_count=2)))


def test_payload_ids_are_uuid_version_7_in_order_of_time() -> None:
    moments = [RECEIVED_AT + timedelta(milliseconds=number) for number in range(1000)]

    ids = [PayloadIds("stowgate").mint(moment) for moment in moments]

    assert all(is_guid(i) and i[14] == "7" and i[19] in "89ab" for i in ids)
    assert ids == sorted(ids)
    assert [minted_at(i) for i in ids] == moments
    assert all(i < minted_before(moments[500]) for i in ids[:500])
    assert all(i > minted_before(moments[500]) for i in ids[500:])
    assert newest_first(ids[1]) < newest_first(ids[0])


def test_a_payload_id_belongs_to_its_realm_only() -> None:
    here, there = PayloadIds("here"), PayloadIds("there")

    mine = [here.mint(RECEIVED_AT) for _ in range(200)]

    assert len(set(mine)) == 200
    assert all(map(here.minted, mine))
    assert not any(map(there.minted, mine))
    assert not any(here.minted(i) for i in ("", "x", "..", str(uuid4()), mine[0][:-1] + "g"))


def test_a_change_of_an_old_version_is_a_conflict(records: Records) -> None:
    added = record()
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None
    records.change(held, attempts=1)

    with pytest.raises(VersionConflict):
        records.change(held, attempts=2)

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record.attempts == 1


def test_a_record_that_was_changed_can_be_changed_again(records: Records) -> None:
    added = record()
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None

    held = records.change(records.change(held, attempts=1), attempts=2)

    assert records.find(added.payload_id) == held
    assert held.record.attempts == 2


@pytest.mark.parametrize("state", [State.OPENED, State.FAILED])
def test_a_settled_record_has_no_lease_and_says_what_became_of_it(
    records: Records, state: State
) -> None:
    added = replace(record(), lease=Lease("me", RECEIVED_AT))
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None

    records.settle(held, state, last_error="why")

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record == replace(added, state=state, lease=None, last_error="why")


def test_a_settled_record_cannot_be_settled_again(records: Records) -> None:
    added = record()
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None
    records.settle(held, State.OPENED)

    with pytest.raises(VersionConflict):
        records.settle(held, State.FAILED)

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record.state is State.OPENED


def test_an_opened_record_counts_even_if_another_worker_has_taken_over(
    records: Records,
) -> None:
    added = record()
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None
    failed = records.change(held, state=State.FAILED)

    records.settle(held, State.OPENED)
    records.move(failed)

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record.state is State.OPENED
    assert records.pending() == []
    assert records.failed([]) == []


def test_a_record_whose_leftover_is_removed_later_is_opened_at_once(tmp_path: Path) -> None:
    store = FolderObjectStore(tmp_path / "later")
    store.prepare()
    later: list[str] = []
    records = Records(store, later.extend)
    added = record()
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None

    records.settle(held, State.OPENED)

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record.state is State.OPENED
    assert newest(records, State.PENDING, 10) == ([], None)
    assert len(newest(records, None, 10)[0]) == 1
    assert held.key in later
    assert store.get(held.key).data


def test_the_first_of_two_workers_opens_a_record(records: Records) -> None:
    added = record()
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None
    records.settle(held, State.OPENED, route="first")

    with pytest.raises(VersionConflict):
        records.settle(held, State.OPENED, route="second")

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record.route == "first"


def test_a_record_that_is_opened_during_a_search_is_found(tmp_path: Path) -> None:
    store = _InterruptedStore(tmp_path)
    store.prepare()
    slow, quick = Records(store), Records(FolderObjectStore(tmp_path))
    added = record()
    quick.add(added)
    held = quick.find(added.payload_id)
    assert held is not None
    store.before_get_of_pending = lambda: quick.settle(held, State.OPENED)

    found = slow.find(added.payload_id)

    assert found is not None
    assert found.record.state is State.OPENED


def test_adding_an_existing_record_again_succeeds(records: Records) -> None:
    added = record()

    records.add(added)
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None
    records.settle(held, State.OPENED)
    records.add(added)

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record.state is State.OPENED


def test_a_record_in_two_places_is_listed_once_and_as_opened(tmp_path: Path) -> None:
    store = FolderObjectStore(tmp_path)
    store.prepare()
    not_cleared: list[str] = []
    records = Records(store, not_cleared.extend)
    added = record()
    records.add(added)
    held = records.find(added.payload_id)
    assert held is not None
    settled = records.settle(held, State.OPENED)

    assert held.key in not_cleared
    assert newest(records, None, 10) == ([settled.record], None)
    assert newest(records, State.PENDING, 10) == ([], None)


def test_an_unreadable_record_is_missing_from_the_list(tmp_path: Path) -> None:
    store = FolderObjectStore(tmp_path)
    store.prepare()
    records = Records(store)
    broken, good = record(), record()
    records.add(broken)
    records.add(good)
    (tmp_path / "pending" / newest_first(broken.payload_id)).write_bytes(b"{")

    assert newest(records, None, 10) == ([good], None)


def test_pages_follow_each_other_without_gap_or_overlap(records: Records) -> None:
    ids = [f"0189{number:04x}-0000-7000-8000-000000000000" for number in range(10)]
    for payload_id in ids:
        records.add(replace(record(), payload_id=payload_id))

    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page, cursor = newest(records, None, 3, cursor)
        seen += [found.payload_id for found in page]

    assert seen == ids[::-1]


def test_pages_have_the_newest_first_whatever_the_states(records: Records) -> None:
    ids = [f"0189{number:04x}-0000-7000-8000-000000000000" for number in range(6)]
    for number, payload_id in enumerate(ids):
        records.add(replace(record(), payload_id=payload_id))
        state = (State.OPENED, State.PENDING, State.FAILED)[number % 3]
        held = records.find(payload_id)
        assert held is not None
        if state is not State.PENDING:
            records.settle(held, state)

    page, _ = newest(records, None, 10)

    assert [found.payload_id for found in page] == ids[::-1]


def test_pending_records_are_listed_with_the_oldest_first(records: Records) -> None:
    ids = [f"0189{number:04x}-0000-7000-8000-000000000000" for number in range(3)]
    for payload_id in ids:
        records.add(replace(record(), payload_id=payload_id))

    assert [payload_id_of(listed.key) for listed in records.pending()] == ids


def test_a_page_holds_one_record_at_a_time(records: Records) -> None:
    for _ in range(3):
        records.add(record(INSTANCE))

    page, _ = records.newest(None, 10)
    seen: list[ref[IngestRecord]] = []
    for found in page:
        # Since Python 3.12 an error that a context manager translates keeps its frames until then.
        gc.collect()
        assert not any(earlier() for earlier in seen)
        seen.append(ref(found))

    assert len(seen) == 3


def test_an_upload_that_was_given_up_cannot_write_its_record(records: Records) -> None:
    late = record()

    assert records.give_up(late.payload_id)
    assert records.give_up(late.payload_id)

    with pytest.raises(UploadGivenUp):
        records.add(late)
    assert records.find(late.payload_id) is None


@pytest.mark.parametrize("state", list(State))
def test_an_upload_with_a_record_cannot_be_given_up(records: Records, state: State) -> None:
    added = record()
    records.add(added)
    if state is not State.PENDING:
        held = records.find(added.payload_id)
        assert held is not None
        records.settle(held, state)

    assert not records.give_up(added.payload_id)

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record.state is state


@pytest.mark.parametrize("state", list(State))
def test_a_record_written_while_its_upload_is_given_up_counts(tmp_path: Path, state: State) -> None:
    added = record()
    store = _InterruptedStore(tmp_path)
    store.prepare()
    records = Records(store)

    def write_and_settle() -> None:
        records.add(added)
        held = records.find(added.payload_id)
        assert held is not None
        if state is not State.PENDING:
            records.settle(held, state)

    store.before_create = write_and_settle

    assert not records.give_up(added.payload_id)

    found = records.find(added.payload_id)
    assert found is not None
    assert found.record.state is state
    assert list(records.tombstones()) == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, StoreUnavailable),
        (errno.ENOSPC, StoreFull),
        (errno.EROFS, StoreRefused),
    ],
)
def test_a_record_that_is_not_durable_yet_does_not_count(
    records: Records, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StowgateError]
) -> None:
    added = record()

    def broken(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("shared.adapters.folder.store.sync_folder", broken)

    with pytest.raises(kind):
        records.add(added)

    assert records.find(added.payload_id) is None


def test_a_record_that_is_neither_durable_nor_removable_is_not_acknowledged(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: object) -> None:
        raise OSError(errno.EIO, f"{path}")

    monkeypatch.setattr("shared.adapters.folder.store.sync_folder", broken)
    monkeypatch.setattr("shared.adapters.folder.store.os.unlink", broken)

    with pytest.raises(StoreRefused, match="cannot be removed again"):
        records.add(record())


def test_an_upload_that_was_given_up_is_neither_listed_nor_counted(records: Records) -> None:
    given_up, added = record(), record()
    records.give_up(given_up.payload_id)
    records.add(added)

    assert [added.payload_id in listed.key for listed in records.pending()] == [True]
    assert newest(records, None, 1) == ([added], None)


def test_an_upload_stays_given_up_until_its_tombstone_is_removed(
    records: Records, tmp_path: Path
) -> None:
    late = record()
    records.give_up(late.payload_id)

    (tombstone,) = records.tombstones()
    assert payload_id_of(tombstone.key) == late.payload_id

    (tmp_path / tombstone.key).unlink()
    records.add(late)


ODD_NAMES = {
    "of the year 10889": newest_first("ffffffff-ffff-7000-8000-000000000000"),
    "of the year 10000": newest_first("e677d21f-dc00-7000-8000-000000000000"),
    "of two moments": "ff0123456789.01890000-0000-7000-8000-000000000000.json",
    "in a folder": f"copies/{newest_first('01890000-0000-7000-8000-000000000000')}",
    "of somebody's copy": "copy.json",
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_an_object_with_another_name_is_skipped_in_every_list_and_logged_once(
    records: Records, tmp_path: Path, name: str
) -> None:
    failed, added = _failed(records).record, record()
    records.add(added)
    for state in State:
        for data in (b"", encode(added)):
            place = tmp_path / state / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)

    with structlog.testing.capture_logs() as log:
        for _ in range(2):
            assert [payload_id_of(found.key) for found in records.pending()] == [added.payload_id]
            assert records.failed([]) == [failed.payload_id]
            assert list(records.tombstones()) == []
            assert newest(records, State.FAILED, 10)[0][0].payload_id == failed.payload_id
            assert len(newest(records, None, 10)[0]) == 2

    assert {entry["key"] for entry in log} == {f"{state}/{name}" for state in State}
    assert len(log) == len(State)


def test_the_name_of_the_latest_possible_record_is_valid(records: Records) -> None:
    last = replace(record(), payload_id="e677d21f-dbff-7000-8000-000000000000")
    records.add(last)

    assert len(records.pending()) == 1
    assert minted_at(last.payload_id).year == 9999


def test_a_record_under_the_name_of_another_payload_is_unreadable(
    records: Records, tmp_path: Path
) -> None:
    here, there = record(), record()
    records.add(here)
    (key,) = [found.key for found in records.pending()]
    (tmp_path / key).write_bytes(encode(there))

    with pytest.raises(RecordUnreadable, match="another payload"):
        records.find(here.payload_id)


def _failed(records: Records) -> VersionedRecord:
    added = record()
    records.add(added)
    return _fail(records, added.payload_id)


def _fail(records: Records, payload_id: str) -> VersionedRecord:
    held = records.find(payload_id)
    assert held is not None
    records.settle(held, State.FAILED, last_error="x")
    failed = records.find(payload_id)
    assert failed is not None
    return failed


def test_a_replayed_record_is_pending_without_attempts(records: Records) -> None:
    added = replace(record(), attempts=7, takeovers=5)
    records.add(added)
    failed = _fail(records, added.payload_id)
    due_at = RECEIVED_AT + timedelta(hours=1)

    replayed = records.replay(failed, due_at)

    expected = replace(failed.record, state=State.PENDING, attempts=0, takeovers=0, due_at=due_at)
    assert replayed.record == expected
    assert records.find(added.payload_id) == replayed


def test_a_replayed_record_that_fails_again_at_once_is_there_and_failed(tmp_path: Path) -> None:
    store = _InterruptedStore(tmp_path)
    store.prepare()
    slow, quick = Records(store), Records(FolderObjectStore(tmp_path))
    failed = _failed(quick)
    payload_id = failed.record.payload_id
    # The rest of a replay, after which a worker can take the record.
    store.before_delete = lambda: _fail(quick, payload_id)

    replayed = slow.replay(failed, RECEIVED_AT)
    if store.before_delete is not None:
        _fail(quick, replayed.record.payload_id)

    assert newest(quick, State.FAILED, 10)[0][0].payload_id == payload_id


def test_a_move_paused_during_a_replay_loses_nothing(tmp_path: Path) -> None:
    store = _InterruptedStore(tmp_path)
    store.prepare()
    slow, quick = Records(store), Records(FolderObjectStore(tmp_path))
    added = record()
    quick.add(added)
    held = quick.find(added.payload_id)
    assert held is not None
    settled = quick.change(held, state=State.FAILED, last_error="x")

    def another_moves_it_and_it_is_replayed() -> None:
        quick.move(settled)
        failed = quick.find(added.payload_id)
        assert failed is not None
        quick.replay(failed, RECEIVED_AT)

    store.before_delete = another_moves_it_and_it_is_replayed
    slow.move(settled)

    found = quick.find(added.payload_id)
    assert found is not None
    assert found.record.state is State.FAILED


def test_a_record_that_was_opened_by_another_replay_is_not_replayed(tmp_path: Path) -> None:
    store = _InterruptedStore(tmp_path)
    store.prepare()
    slow, quick = Records(store), Records(FolderObjectStore(tmp_path))
    failed = _failed(quick)

    def another_replays_and_opens_it() -> None:
        quick.settle(quick.replay(failed, RECEIVED_AT), State.OPENED)

    store.before_create = another_replays_and_opens_it

    with pytest.raises(VersionConflict):
        slow.replay(failed, RECEIVED_AT)
    found = quick.find(failed.record.payload_id)
    assert found is not None
    assert found.record.state is State.OPENED


def test_a_replayed_record_is_listed_only_as_pending(records: Records) -> None:
    failed = _failed(records)

    records.replay(failed, RECEIVED_AT)

    assert newest(records, State.FAILED, 10) == ([], None)
    assert [r.payload_id for r in newest(records, State.PENDING, 10)[0]] == [
        failed.record.payload_id
    ]
    assert [r.state for r in newest(records, None, 10)[0]] == [State.PENDING]


def test_a_leftover_tombstone_does_not_prevent_a_replay(
    tmp_path: Path,
) -> None:
    store = _InterruptedStore(tmp_path)
    store.prepare()
    late = Records(FolderObjectStore(tmp_path))
    added = record()

    def written_and_failed() -> None:
        late.add(added)
        _fail(late, added.payload_id)

    def killed() -> None:
        raise KeyboardInterrupt

    store.before_create, store.before_delete = written_and_failed, killed
    with pytest.raises(KeyboardInterrupt):
        Records(store).give_up(added.payload_id)
    failed = late.find(added.payload_id)
    assert failed is not None

    late.replay(failed, RECEIVED_AT)

    found = late.find(added.payload_id)
    assert found is not None
    assert found.record.state is State.PENDING


class _InterruptedStore(FolderObjectStore):
    """Runs a callback just before the next create, delete, or read from pending/."""

    before_create: Callable[[], object] | None = None
    before_delete: Callable[[], object] | None = None
    before_get_of_pending: Callable[[], object] | None = None

    def get(self, key: str) -> StoredObject:
        if key.startswith("pending/"):
            callback, self.before_get_of_pending = self.before_get_of_pending, None
            if callback is not None:
                callback()
        return super().get(key)

    def create(self, key: str, data: bytes, content_type: str) -> str:
        callback, self.before_create = self.before_create, None
        if callback is not None:
            callback()
        return super().create(key, data, content_type)

    def delete(self, keys: Iterable[str]) -> None:
        callback, self.before_delete = self.before_delete, None
        if callback is not None:
            callback()
        super().delete(keys)
