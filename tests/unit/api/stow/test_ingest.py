"""The use case of a POST where time passes in its last step, over real folder stores."""

import errno
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, NoReturn

import pytest
from instances import new_instance, one_series
from made_settings import api_settings
from observed_store import CALLS, Call, Hook, ObservedStore, once
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, newest
from service import wait_for

from api.http.problems import SenderTooSlow
from api.stow.answer import Answer
from api.stow.early_upload import EarlyUpload
from api.stow.idempotency import ClaimedKey, IdempotencyKeys, StillRunning
from api.stow.ingest import Ingest, Target
from api.stow.multipart import MediaType, parse_media_type
from api.stow.response import JSON_TYPE, Outcome, to_json
from api.stow.upload import Uploads
from shared.adapters.folder.store import FolderObjectStore
from shared.attachments import Attachment
from shared.errors import StoreFull, StoreUnavailable
from shared.ids import PayloadIds
from shared.ports import ObjectStore
from shared.record_store import Records
from shared.records import State
from shared.runtime.metrics import ApiMetrics, WorkerMetrics
from shared.sweep_cursor import SweepCursor
from worker.sweeper import Sweeper

UPLOAD = timedelta(hours=1)
LEASE = timedelta(seconds=60)
CORRELATION_ID = "0b1c2d3e-0000-4000-8000-000000000001"


@dataclass(frozen=True)
class Part:
    data: bytes
    number: int = 1

    @property
    def media_type(self) -> MediaType:
        return parse_media_type("application/dicom")

    def __iter__(self) -> Iterator[bytes]:
        return iter([self.data])


class Bench:
    """An API and a sweeper on the same two buckets, and the same clock."""

    def __init__(self, folder: Path, parts: int = 1000) -> None:
        self.now = RECEIVED_AT
        self.confirmable = 0
        self.folder = folder
        self.instances = FolderObjectStore(folder / "payloads")
        self.state = FolderObjectStore(folder / "state")
        for store in (self.instances, self.state):
            store.prepare()
        self.records = Records(self.state)
        self.payload_ids = payload_ids = PayloadIds("stowgate")
        self.settings = api_settings(
            folder,
            max_part_bytes=1 << 20,
            max_parts=parts,
            min_free_bytes=0,
            max_upload_seconds=int(UPLOAD.total_seconds()),
        )
        self.putters = ThreadPoolExecutor(1)
        self.sweeper = Sweeper(
            instances=self.instances,
            state=self.state,
            records=self.records,
            cursor=SweepCursor(
                state=self.state,
                instances=self.instances,
                payload_ids=payload_ids,
                clock=lambda: self.now,
            ),
            payload_ids=payload_ids,
            grace=2 * UPLOAD,
            pause=timedelta(days=1),
            metrics=WorkerMetrics(CollectorRegistry()),
            clock=lambda: self.now,
        )
        self.sweeper.sweep()
        self.now += timedelta(seconds=1)
        self.keys = self.another_keys(self.state)

    def another_keys(self, state: ObjectStore) -> IdempotencyKeys:
        return IdempotencyKeys(
            state, self.records, self.payload_ids.mint, LEASE, clock=lambda: self.now
        )

    def ingest(
        self, *, state: ObjectStore | None = None, instances: ObjectStore | None = None
    ) -> Ingest:
        """An API over the bench's stores, or over those given, which pass on to them."""
        return Ingest(
            uploads=Uploads(instances or self.instances, self.putters, self.settings),
            records=Records(state or self.state),
            recorded=self._recorded,
            metrics=ApiMetrics(CollectorRegistry()),
            mint=self.payload_ids.mint,
            first_lease=LEASE,
            clock=lambda: self.now,
        )

    def _recorded(self) -> None:
        self.confirmable += 1
        assert self.records.pending()

    def payloads(self) -> list[str]:
        """Those that have objects."""
        return [name for name in self.instances.folders("") if name != "stowgate"]

    def attached(self) -> list[str]:
        return [found.key.split("/")[-1] for found in self.state.list("uploads/")]

    def claim(self, keys: IdempotencyKeys | None = None) -> ClaimedKey:
        claimed = (keys or self.keys).claim("127.0.0.1", "/dicomweb/studies", "k")
        assert isinstance(claimed, ClaimedKey)
        return claimed

    def let_the_lease_of_the_key_pass(self) -> None:
        """More time than it lasts, while it is renewed."""
        for _ in range(3):
            self._wait_for_a_renewal()

    def _wait_for_a_renewal(self) -> None:
        claims = self._claim_versions()
        self.now += LEASE * 0.6
        wait_for(lambda: self._claim_versions() != claims)

    def _claim_versions(self) -> list[str]:
        return [self.state.get(found.key).version for found in self.state.list("idempotency/")]

    def post(
        self,
        claimed: ClaimedKey | None = None,
        *parts: Part,
        state: ObjectStore | None = None,
        instances: ObjectStore | None = None,
    ) -> str | None:
        receipt = self.ingest(state=state, instances=instances).ingest(
            parts or [Part(new_instance())],
            Target(),
            "127.0.0.1",
            CORRELATION_ID,
            self.render,
            claimed,
        )
        assert receipt is not None
        receipt.answer.body.close()
        return receipt.payload_id

    def render(self, outcome: Outcome, heartbeat: Callable[[], None]) -> Answer:
        return Answer.of(200, JSON_TYPE, to_json(outcome, None), self.folder, heartbeat)

    def before_record(self, action: Callable[[], None]) -> ObservedStore:
        """The state bucket, in which something happens before the record is written."""
        return ObservedStore(self.state, before={"create": once(action)})

    def before_attachment(self, action: Callable[[], None]) -> ObservedStore:
        """The state bucket, in which something happens before the first attachment is written."""
        return ObservedStore(self.state, before={"put": once(action)})

    def before_instance(self, action: Callable[[], None]) -> ObservedStore:
        """The payloads' bucket, in which something happens before the first instance is stored."""
        return ObservedStore(self.instances, before={"put": once(action)})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_an_api_that_stood_still_past_the_sweep_writes_no_record_and_says_so(
    bench: Bench,
) -> None:
    def stand_still() -> None:
        bench.now += 3 * UPLOAD
        bench.sweeper.sweep()

    with pytest.raises(SenderTooSlow, match="given up"):
        bench.post(state=bench.before_record(stand_still))

    assert newest(bench.records, None, 10) == ([], None)
    assert bench.payloads() == []
    assert bench.confirmable == 0


def test_a_record_is_left_to_be_confirmed_once_it_is_written(bench: Bench) -> None:
    bench.post()

    assert bench.confirmable == 1


def test_an_api_that_stood_still_and_was_not_given_up_keeps_its_word(bench: Bench) -> None:
    def stand_still() -> None:
        bench.now += 1.5 * UPLOAD
        bench.sweeper.sweep()

    payload_id = bench.post(state=bench.before_record(stand_still))
    bench.now += 3 * UPLOAD
    bench.sweeper.sweep()

    assert payload_id is not None
    assert bench.records.find(payload_id) is not None
    assert bench.payloads() == [payload_id]


def test_a_part_that_cannot_be_cleared_away_costs_no_later_upload_its_turn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: EarlyUpload) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    posted: list[str | None] = []

    def post_again_and_again() -> None:
        with monkeypatch.context() as broken:
            broken.setattr(EarlyUpload, "close", fail)
            for _ in range(20):
                bench.post()
        posted.append(bench.post())

    threading.Thread(target=post_again_and_again, daemon=True).start()

    (payload_id,) = wait_for(lambda: posted)
    assert payload_id is not None


def test_what_is_stored_late_of_an_upload_that_is_given_up_is_removed_with_the_rest(
    bench: Bench,
) -> None:
    gave_up = threading.Event()
    claimed = bench.claim(
        bench.another_keys(ObservedStore(bench.state, after={"replace": lambda _: gave_up.set()}))
    )

    def lose_the_key() -> None:
        bench.now += 2 * LEASE
        bench.claim()
        wait_for(gave_up.is_set)

    with pytest.raises(StillRunning):
        bench.post(claimed, instances=bench.before_instance(lose_the_key))

    bench.putters.shutdown()
    assert bench.payloads() == []


def test_an_upload_that_takes_longer_than_it_may_is_refused_and_removed(bench: Bench) -> None:
    class SlowPart(Part):
        def __iter__(self) -> Iterator[bytes]:
            bench.now += UPLOAD + timedelta(seconds=1)
            return super().__iter__()

    with pytest.raises(SenderTooSlow, match="longer than 3600 s; send it in several requests"):
        bench.post(None, SlowPart(new_instance()))

    assert newest(bench.records, None, 10) == ([], None)
    assert bench.payloads() == []


def test_a_key_is_kept_while_the_store_takes_its_time(bench: Bench) -> None:
    claimed = bench.claim()
    slow = bench.before_instance(bench.let_the_lease_of_the_key_pass)

    assert bench.post(claimed, instances=slow) == claimed.payload_id


def test_a_key_is_not_taken_over_while_the_record_is_written(bench: Bench) -> None:
    """However much of its lease the body took: all of it is left to the last step."""
    claimed = bench.claim()

    class SlowPart(Part):
        def __iter__(self) -> Iterator[bytes]:
            bench.now += LEASE * 0.4
            return super().__iter__()

    def takes_its_time() -> None:
        bench.now += LEASE * 0.9
        with pytest.raises(StillRunning):
            bench.claim()

    slow = bench.before_record(takes_its_time)

    assert bench.post(claimed, SlowPart(new_instance()), state=slow) == claimed.payload_id


def test_of_an_upload_that_was_given_up_nothing_is_left_and_its_key_is_free(bench: Bench) -> None:
    claimed = bench.claim()
    bench.records.give_up(claimed.payload_id)

    with pytest.raises(SenderTooSlow, match="given up"):
        bench.post(claimed)

    assert bench.payloads() == []
    assert isinstance(bench.keys.claim("127.0.0.1", "/dicomweb/studies", "k"), ClaimedKey)


def parts(count: int) -> list[Part]:
    return list(map(Part, one_series(count)))


def test_few_instances_are_in_the_record_and_cost_no_further_request(bench: Bench) -> None:
    requests: list[Call] = []

    def count(name: Call) -> Hook:
        return lambda _: requests.append(name)

    counted: dict[Call, Hook] = {name: count(name) for name in CALLS if name != "check_room"}

    payload_id = bench.post(
        state=ObservedStore(bench.state, before=counted),
        instances=ObservedStore(bench.instances, before=counted),
    )

    assert requests == ["put", "create"]
    assert payload_id is not None
    held = bench.records.find(payload_id)
    assert held is not None
    assert held.record.instances is not None
    assert len(held.record.instances) == held.record.file_count == 1


def test_many_instances_are_attached_and_leave_the_record_small(bench: Bench) -> None:
    payload_id = bench.post(None, *parts(400))

    assert payload_id is not None
    held = bench.records.find(payload_id)
    assert held is not None
    assert len(held.data) < 1000
    assert (held.record.file_count, held.record.instances) == (400, None)
    found = [*bench.records.instances(held.record)]
    assert [instance.sop_instance_uid for instance in found] == [
        f"2.25.{10**29 + number}" for number in range(400)
    ]
    stored = [listed.key for listed in bench.instances.list(f"{payload_id}/")]
    assert stored == [f"{payload_id}/{instance.path}" for instance in found]
    assert bench.attached() == ["instances.jsonl"]


def test_a_long_answer_is_attached_where_it_may_be_asked_for_again(bench: Bench) -> None:
    claimed = bench.claim()
    payload_id = bench.post(claimed, *parts(600))

    held = bench.records.find(claimed.payload_id)
    assert held is not None
    assert held.record.first_answer is not None
    assert held.record.first_answer.body is None
    assert len(held.data) < 1000
    answer = b"".join(bench.records.attachments.read(claimed.payload_id, Attachment.ANSWER))
    assert len(json.loads(answer)["00081199"]["Value"]) == 600
    assert payload_id == claimed.payload_id
    assert bench.attached() == ["answer", "instances.jsonl"]


@pytest.mark.parametrize("is_keyed", [False, True])
def test_of_an_upload_that_is_refused_behind_its_attachments_nothing_is_left(
    bench: Bench, is_keyed: bool
) -> None:
    def takes_too_long() -> None:
        bench.now += UPLOAD + timedelta(seconds=1)

    claimed = bench.claim() if is_keyed else None

    with pytest.raises((SenderTooSlow, StillRunning)):
        bench.post(claimed, *parts(600), state=bench.before_attachment(takes_too_long))

    assert bench.payloads() == bench.attached() == []


def test_of_an_upload_that_is_given_up_behind_its_attachments_nothing_is_left(
    bench: Bench,
) -> None:
    def stand_still() -> None:
        bench.now += 3 * UPLOAD
        bench.sweeper.sweep()

    with pytest.raises(SenderTooSlow, match="given up"):
        bench.post(bench.claim(), *parts(600), state=bench.before_record(stand_still))

    assert bench.payloads() == bench.attached() == []


def test_attachments_that_cannot_be_removed_leave_the_instances_to_the_sweep_too(
    bench: Bench,
) -> None:
    """By which it finds them."""

    def take_too_long(_: str) -> None:
        bench.now += UPLOAD + timedelta(seconds=1)

    def be_away(_: str) -> NoReturn:
        raise StoreUnavailable("away")

    state = ObservedStore(bench.state, before={"put": take_too_long, "delete": be_away})
    with pytest.raises(SenderTooSlow):
        bench.post(None, *parts(600), state=state)
    assert len(bench.payloads()) == len(bench.attached()) == 1

    bench.now += 3 * UPLOAD
    bench.sweeper.sweep()

    assert bench.payloads() == bench.attached() == []


def test_a_crash_between_attachments_and_record_leaves_what_the_sweep_removes(
    bench: Bench,
) -> None:
    class Killed(BaseException):
        pass

    def die() -> NoReturn:
        raise Killed

    with pytest.raises(Killed):
        bench.post(bench.claim(), *parts(600), state=bench.before_record(die))
    assert bench.attached() == ["answer", "instances.jsonl"]

    bench.now += 3 * UPLOAD
    bench.sweeper.sweep()

    assert bench.payloads() == bench.attached() == []
    assert newest(bench.records, None, 10) == ([], None)


def test_the_attachments_of_a_record_are_never_swept(bench: Bench) -> None:
    claimed = bench.claim()
    bench.post(claimed, *parts(600))
    for state in (None, State.OPENED):
        held = bench.records.find(claimed.payload_id)
        assert held is not None
        if state:
            bench.records.settle(held, state)
        for _ in range(3):
            bench.now += 3 * UPLOAD
            bench.sweeper.sweep()

        assert bench.payloads() == [claimed.payload_id]
        assert bench.attached() == ["answer", "instances.jsonl"]


def test_a_key_is_kept_while_attachments_take_their_time(bench: Bench) -> None:
    claimed = bench.claim()
    slow = bench.before_attachment(bench.let_the_lease_of_the_key_pass)

    assert bench.post(claimed, *parts(600), state=slow) == claimed.payload_id


def test_a_full_store_fails_what_it_did_not_take_in_the_order_of_the_request(
    bench: Bench,
) -> None:
    def refuse(key: str) -> None:
        if key.removesuffix(".dcm")[-1] in ("3", "5"):
            raise StoreFull("the store is full")

    full = ObservedStore(bench.instances, before={"put": refuse})
    outcomes: list[tuple[list[str], list[str]]] = []

    def render(outcome: Outcome, heartbeat: Callable[[], None]) -> Answer:
        stored = [one.sop_instance_uid[-1] for one in outcome.stored()]
        outcomes.append((stored, [(one.sop_instance_uid or "x")[-1] for one in outcome.failed()]))
        return bench.render(outcome, heartbeat)

    sent = parts(8)
    sent.insert(4, Part(b"no DICOM"))
    sent.append(sent[1])
    receipt = bench.ingest(instances=full).ingest(
        sent, Target(), "127.0.0.1", CORRELATION_ID, render
    )

    assert outcomes == [(["0", "1", "2", "4", "6", "7"], ["3", "x", "5"])]
    assert receipt is not None
    assert (receipt.stored, receipt.failed) == (6, 3)
    receipt.answer.body.close()


def test_a_failure_by_a_full_store_names_its_part(bench: Bench) -> None:
    def refuse(key: str) -> None:
        if key.removesuffix(".dcm").endswith("3"):
            raise StoreFull("the store is full")

    details: list[str] = []

    def render(outcome: Outcome, heartbeat: Callable[[], None]) -> Answer:
        details.extend(one.detail for one in outcome.failed())
        return bench.render(outcome, heartbeat)

    full = ObservedStore(bench.instances, before={"put": refuse})
    sent = [Part(part.data, number) for number, part in enumerate(parts(5), start=1)]
    receipt = bench.ingest(instances=full).ingest(
        sent, Target(), "127.0.0.1", CORRELATION_ID, render
    )

    assert details == ["part 4: the store is full; then send it again"]
    assert receipt is not None
    receipt.answer.body.close()


class _Swallowing(FolderObjectStore):
    """Accepts objects, in small pieces, and keeps nothing: only memory is looked at."""

    def put(self, key: str, data: BinaryIO, *_: object) -> None:  # noqa: ARG002
        while data.read(1 << 12):
            pass


def _peak_bytes(tmp_path: Path, count: int, *, is_dicom: bool) -> int:
    bench = Bench(tmp_path / f"{count}", parts=count)
    ingest = bench.ingest(
        state=_Swallowing(bench.folder / "state"), instances=_Swallowing(bench.folder / "payloads")
    )
    files = one_series(count, PixelData=None) if is_dicom else repeat(b"no DICOM", count)
    claimed = bench.claim()
    tracemalloc.start()
    try:
        receipt = ingest.ingest(
            map(Part, files), Target(), "127.0.0.1", CORRELATION_ID, bench.render, claimed
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert receipt is not None
    assert receipt.stored + receipt.failed == count
    receipt.answer.body.close()
    return peak


@pytest.mark.parametrize("is_dicom", [True, False], ids=["stored", "failed"])
def test_ten_times_the_parts_take_hardly_more_memory(tmp_path: Path, is_dicom: bool) -> None:
    few = _peak_bytes(tmp_path, 100, is_dicom=is_dicom)

    many = _peak_bytes(tmp_path, 1000, is_dicom=is_dicom)

    # Of each part a little is kept, which tells whether an instance comes twice.
    assert many - few < 900 * 400
