"""The use case of a POST where time passes in its last step, over real folder stores."""

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, NoReturn

import pytest
from instances import new_instance
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, newest
from service import wait_for

from api.http.problems import SenderTooSlow
from api.stow.early_upload import EarlyUpload
from api.stow.idempotency import ClaimedKey, IdempotencyKeys, StillRunning
from api.stow.ingest import Ingest, Keyed, Target
from api.stow.multipart import MediaType, parse_media_type
from api.stow.upload import Limits, Uploads
from shared.adapters.folder.store import FolderObjectStore
from shared.ids import PayloadIds
from shared.records import FirstAnswer, Records
from shared.runtime.metrics import ApiMetrics, WorkerMetrics
from shared.sweep_cursor import SweepCursor
from worker.sweeper import Sweeper

UPLOAD = timedelta(hours=1)
LEASE = timedelta(seconds=60)


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

    def __init__(self, folder: Path) -> None:
        self.now = RECEIVED_AT
        self.confirmable = 0
        self.before_record: Callable[[], None] = lambda: None
        self.instances = _SlowStore(folder / "payloads")
        self.state = _StateStore(folder / "state", self)
        for store in (self.instances, self.state):
            store.prepare()
        self.records = Records(self.state)
        payload_ids = PayloadIds("stowgate")
        limits = Limits(1 << 20, 10, 1 << 20, 0, UPLOAD)
        self.uploads = Uploads(self.instances, ThreadPoolExecutor(1), folder, limits)
        self.ingest = Ingest(
            uploads=self.uploads,
            records=self.records,
            recorded=self._recorded,
            metrics=ApiMetrics(CollectorRegistry()),
            mint=payload_ids.mint,
            clock=lambda: self.now,
        )
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
        self.keys = IdempotencyKeys(
            self.state, self.records, payload_ids.mint, LEASE, clock=lambda: self.now
        )

    def _recorded(self) -> None:
        self.confirmable += 1
        assert self.records.pending()

    def payloads(self) -> list[str]:
        """Those that have objects."""
        return [name for name in self.instances.folders("") if name != "stowgate"]

    def keyed(self) -> Keyed:
        claimed = self.keys.claim("127.0.0.1", "/dicomweb/studies", "k")
        assert isinstance(claimed, ClaimedKey)
        return Keyed(claimed, lambda *_: FirstAnswer("f", 200, "application/dicom+json", "{}"))

    def post(self, keyed: Keyed | None = None) -> str | None:
        receipt = self.ingest.ingest([Part(new_instance())], Target(), "127.0.0.1", "c", keyed)
        assert receipt is not None
        return receipt.payload_id


class _SlowStore(FolderObjectStore):
    """Something happens before the next instance is stored."""

    before_put: Callable[[], None] | None = None

    def put(
        self,
        key: str,
        data: BinaryIO,
        size_bytes: int,
        content_type: str,
        sha256: str | None = None,
    ) -> None:
        meanwhile, self.before_put = self.before_put, None
        if meanwhile is not None:
            meanwhile()
        super().put(key, data, size_bytes, content_type, sha256)


class _StateStore(FolderObjectStore):
    def __init__(self, root: Path, bench: Bench) -> None:
        super().__init__(root)
        self._bench = bench

    def create(self, key: str, data: bytes, content_type: str) -> str:
        if key.startswith("pending/") and data:
            self._bench.before_record()
        return super().create(key, data, content_type)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_an_api_that_stood_still_past_the_sweep_writes_no_record_and_says_so(
    bench: Bench,
) -> None:
    def stand_still() -> None:
        bench.now += 3 * UPLOAD
        bench.sweeper.sweep()

    bench.before_record = stand_still

    with pytest.raises(SenderTooSlow, match="given up"):
        bench.post()

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

    bench.before_record = stand_still

    payload_id = bench.post()
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
    keyed = bench.keyed()
    gave_up = threading.Event()
    keep = keyed.claimed.keep

    def keep_or_note(*, at_least: float = 0.5) -> None:
        try:
            keep(at_least=at_least)
        except StillRunning:
            gave_up.set()
            raise

    keyed.claimed.keep = keep_or_note  # type: ignore[method-assign]

    def lose_the_key() -> None:
        bench.now += 2 * LEASE
        bench.keyed()
        wait_for(gave_up.is_set)

    bench.instances.before_put = lose_the_key

    with pytest.raises(StillRunning):
        bench.post(keyed)

    bench.uploads.putters.shutdown()
    assert bench.payloads() == []


def test_an_upload_that_takes_longer_than_it_may_is_refused_and_removed(bench: Bench) -> None:
    class SlowPart(Part):
        def __iter__(self) -> Iterator[bytes]:
            bench.now += UPLOAD + timedelta(seconds=1)
            return super().__iter__()

    with pytest.raises(SenderTooSlow, match="longer than 3600 s; send it in several requests"):
        bench.ingest.ingest([SlowPart(new_instance())], Target(), "127.0.0.1", "c")

    assert newest(bench.records, None, 10) == ([], None)
    assert bench.payloads() == []


def test_a_key_is_kept_while_the_store_takes_its_time(bench: Bench) -> None:
    keyed = bench.keyed()

    def takes_longer_than_the_lease() -> None:
        for _ in range(3):
            claims = [bench.state.get(o.key).version for o in bench.state.list("idempotency/")]
            bench.now += LEASE * 0.6
            wait_for(
                lambda known=claims: (  # type: ignore[misc]
                    [bench.state.get(o.key).version for o in bench.state.list("idempotency/")]
                    != known
                )
            )

    bench.instances.before_put = takes_longer_than_the_lease

    assert bench.post(keyed) == keyed.claimed.payload_id


def test_a_key_is_not_taken_over_while_the_record_is_written(bench: Bench) -> None:
    """However much of its lease the body took: all of it is left to the last step."""
    keyed = bench.keyed()

    class SlowPart(Part):
        def __iter__(self) -> Iterator[bytes]:
            bench.now += LEASE * 0.4
            return super().__iter__()

    def takes_its_time() -> None:
        bench.now += LEASE * 0.9
        with pytest.raises(StillRunning):
            bench.keyed()

    bench.before_record = takes_its_time
    parts = [SlowPart(new_instance())]
    receipt = bench.ingest.ingest(parts, Target(), "127.0.0.1", "c", keyed)

    assert receipt is not None
    assert receipt.payload_id == keyed.claimed.payload_id


def test_of_an_upload_that_was_given_up_nothing_is_left_and_its_key_is_free(bench: Bench) -> None:
    keyed = bench.keyed()
    bench.records.give_up(keyed.claimed.payload_id)

    with pytest.raises(SenderTooSlow, match="given up"):
        bench.post(keyed)

    assert bench.payloads() == []
    assert isinstance(bench.keys.claim("127.0.0.1", "/dicomweb/studies", "k"), ClaimedKey)
