"""Early upload of a large instance, with a real folder store."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
from instances import new_instance, uid
from made_settings import api_settings
from observed_store import Hook, ObservedStore
from prometheus_client import CollectorRegistry

from api.http.problems import BadRequest
from api.stow.answer import Answer
from api.stow.ingest import Ingest, Receipt, Target
from api.stow.multipart import MediaType, parse_media_type
from api.stow.response import JSON_TYPE, Outcome, to_json
from api.stow.upload import Uploads
from shared.adapters.folder.store import FolderObjectStore
from shared.errors import StoreUnavailable
from shared.ids import PayloadIds
from shared.ports import Writing
from shared.record_store import Records
from shared.runtime.metrics import ApiMetrics

MIB = 1 << 20


@dataclass
class Begun:
    """A writing that records its progress."""

    key: str
    writing: Writing
    has_failed: bool = False
    proceeded: list[int] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def proceed(self, size_bytes: int) -> None:
        self.proceeded.append(size_bytes)

    def finish(self, size_bytes: int) -> None:
        self.ended.append("finished")
        self.writing.finish(size_bytes)

    def abandon(self) -> None:
        self.ended.append("abandoned")


class Store(FolderObjectStore):
    def __init__(self, root: Path, *, fails: bool) -> None:
        super().__init__(root)
        self._fails = fails
        self.begun: list[Begun] = []

    def begin(self, key: str, data: BinaryIO, content_type: str, max_bytes: int) -> Writing:
        self.begun.append(
            Begun(key, super().begin(key, data, content_type, max_bytes), self._fails)
        )
        return self.begun[-1]


@dataclass(frozen=True)
class Part:
    """Arrives in pieces of 1 MiB; `before_piece` is called before each with the bytes so far."""

    data: bytes
    before_piece: Callable[[int], None] = lambda _: None
    number: int = 1

    @property
    def media_type(self) -> MediaType:
        return parse_media_type("application/dicom")

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), MIB):
            self.before_piece(start)
            yield self.data[start : start + MIB]


@dataclass
class Bench:
    folder: Path
    spool_memory_bytes: int = MIB
    fails: bool = False
    before_put: Hook = lambda _: None

    def __post_init__(self) -> None:
        self.store = Store(self.folder / "payloads", fails=self.fails)
        observed = ObservedStore(self.store, before={"put": self.before_put})
        state = FolderObjectStore(self.folder / "state")
        self.store.prepare()
        state.prepare()
        settings = api_settings(
            self.folder, min_free_bytes=0, spool_memory_bytes=self.spool_memory_bytes
        )
        self.ingest = Ingest(
            uploads=Uploads(observed, ThreadPoolExecutor(1), settings),
            records=Records(state),
            recorded=lambda: None,
            metrics=ApiMetrics(CollectorRegistry()),
            mint=PayloadIds("stowgate").mint,
            first_lease=timedelta(seconds=30),
        )

    def post(self, *parts: Part) -> Receipt:
        receipt = self.ingest.ingest(parts, Target(), "127.0.0.1", "c", self._render)
        assert receipt is not None
        receipt.answer.body.close()
        return receipt

    def _render(self, outcome: Outcome, heartbeat: Callable[[], None]) -> Answer:
        self.failed = list(outcome.failed())
        return Answer.of(200, JSON_TYPE, to_json(outcome, None), self.folder, heartbeat)

    def stored(self) -> list[bytes]:
        return [self.store.get(found.key).data for found in self.store.list("")]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_large_instance_is_uploaded_while_it_arrives(bench: Bench) -> None:
    data = new_instance(PixelData=bytes(24 * MIB))

    def before_piece(come_bytes: int) -> None:
        if come_bytes >= 18 * MIB:
            (begun,) = bench.store.begun
            assert begun.proceeded[-1] == come_bytes
            assert bench.stored() == []

    receipt = bench.post(Part(data, before_piece))

    assert receipt.stored == 1
    (begun,) = bench.store.begun
    study, series, instance = (
        uid(data, f"{level}InstanceUID") for level in ("Study", "Series", "SOP")
    )
    assert begun.key == f"{receipt.payload_id}/dcm/{study}/{series}/{instance}.dcm"
    assert begun.ended[0] == "finished"
    assert bench.stored() == [data]


def test_a_small_instance_is_not_uploaded_early(bench: Bench) -> None:
    bench.post(Part(new_instance(PixelData=bytes(12 * MIB))))

    assert bench.store.begun == []
    assert len(bench.stored()) == 1


def test_an_upload_is_abandoned_if_the_complete_instance_is_rejected(bench: Bench) -> None:
    data = new_instance(PixelData=bytes(24 * MIB))

    bench.post(Part(data[:-9]))

    assert "is truncated" in bench.failed[0].detail
    assert [begun.ended for begun in bench.store.begun] == [["abandoned"]]
    assert bench.stored() == []


def test_an_upload_is_abandoned_if_the_body_is_truncated(bench: Bench) -> None:
    def before_piece(come_bytes: int) -> None:
        if come_bytes >= 18 * MIB:
            raise BadRequest("the sender is gone")

    with pytest.raises(BadRequest):
        bench.post(Part(new_instance(PixelData=bytes(24 * MIB)), before_piece))

    assert [begun.ended for begun in bench.store.begun] == [["abandoned"]]
    assert bench.stored() == []


def test_an_upload_is_abandoned_after_another_instance_could_not_be_stored(
    tmp_path: Path,
) -> None:
    small = [Part(new_instance()) for _ in range(8)]
    large = new_instance(PixelData=bytes(24 * MIB))

    def refuse(key: str) -> None:
        if uid(large, "SOPInstanceUID") not in key:
            raise StoreUnavailable("gone")

    bench = Bench(tmp_path, before_put=refuse)

    with pytest.raises(StoreUnavailable):
        bench.post(*small, Part(large))

    assert [begun.ended for begun in bench.store.begun] == [["abandoned"]]


def test_an_instance_is_stored_at_its_end_if_the_early_upload_failed(tmp_path: Path) -> None:
    data = new_instance(PixelData=bytes(24 * MIB))
    bench = Bench(tmp_path, fails=True)

    receipt = bench.post(Part(data))

    assert receipt.stored == 1
    assert [begun.ended[0] for begun in bench.store.begun] == ["abandoned"]
    assert bench.stored() == [data]


def test_a_duplicate_instance_is_not_uploaded_early(bench: Bench) -> None:
    data = new_instance(PixelData=bytes(24 * MIB))
    part = partial(Part, data)

    bench.post(part(), part(number=2))

    assert len(bench.store.begun) == 1
    assert bench.stored() == [data]


def test_an_instance_without_uids_at_its_start_is_stored_at_its_end(
    bench: Bench,
) -> None:
    # The element precedes the study and series UIDs, and fills the part that is read early.
    file = new_instance()
    at = file.index(b"\x20\x00\x0d\x00UI")
    large = b"\x19\x00\x10\x11OB\0\0" + (20 * MIB).to_bytes(4, "little") + bytes(20 * MIB)
    data = file[:at] + large + file[at:]

    receipt = bench.post(Part(data))

    assert receipt.stored == 1
    assert bench.store.begun == []
    assert bench.stored() == [data]


def test_an_instance_in_memory_is_stored_at_its_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, spool_memory_bytes=64 * MIB)

    bench.post(Part(new_instance(PixelData=bytes(24 * MIB))))

    assert bench.store.begun == []
    assert len(bench.stored()) == 1
