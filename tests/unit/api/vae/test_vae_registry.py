"""The registry of VAEs as two replicas see it, over a real folder store."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from records_made import RECEIVED_AT

from api.vae.registry import Vae, VaeRegistry
from shared.adapters.folder.store import FolderObjectStore
from shared.ports import StoredObject

LUNG = Vae("lung", "LUNG", ("w-1",), (), RECEIVED_AT)


class _CountingStore(FolderObjectStore):
    reads = 0

    def get(self, key: str) -> StoredObject:
        self.reads += 1
        return super().get(key)


@dataclass
class Bench:
    """Two replicas on one store, and a clock in seconds that stands until it is moved."""

    folder: Path
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.store = _CountingStore(self.folder)
        self.store.prepare()
        self.here = VaeRegistry(self.store)
        self.there = VaeRegistry(FolderObjectStore(self.folder))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setattr("api.vae.registry.time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_uploads_to_one_vae_at_a_time_do_not_read_the_store_each(bench: Bench) -> None:
    bench.here.add(LUNG)
    assert bench.here.by_ae_title("LUNG") == LUNG
    reads = bench.store.reads

    assert [bench.here.by_ae_title("LUNG") for _ in range(10)] == [LUNG] * 10
    assert bench.store.reads == reads


def test_a_vae_that_another_replica_changed_is_the_new_one_before_long(bench: Bench) -> None:
    bench.here.add(LUNG)
    bench.here.by_ae_title("LUNG")
    bench.there.update("lung", workflows=("w-2",))

    bench.now += 60

    assert bench.here.by_ae_title("LUNG") == replace(LUNG, workflows=("w-2",))


def test_a_vae_that_another_replica_removed_is_gone_before_long(bench: Bench) -> None:
    bench.here.add(LUNG)
    bench.here.by_ae_title("LUNG")
    bench.there.remove("lung")

    bench.now += 60

    assert bench.here.by_ae_title("LUNG") is None


def test_a_vae_that_another_replica_added_can_be_used_at_once(bench: Bench) -> None:
    bench.here.add(LUNG)
    bench.here.by_ae_title("LUNG")
    brain = bench.there.add(replace(LUNG, name="brain", virtual_ae_title="BRAIN"))

    assert bench.here.by_ae_title("BRAIN") == brain


def test_a_registry_that_did_not_change_is_decoded_once_however_many_unknown_titles_are_asked_for(
    bench: Bench,
) -> None:
    bench.here.add(LUNG)
    decoded = bench.here.all()["lung"]

    for _ in range(3):
        assert bench.here.by_ae_title("NOBODY") is None
        bench.now += 60
        assert bench.here.by_ae_title("LUNG") is decoded
        assert bench.here.all()["lung"] is decoded


def test_what_can_be_no_ae_title_is_not_looked_up(bench: Bench) -> None:
    bench.here.add(LUNG)
    reads = bench.store.reads

    assert bench.here.by_ae_title("x" * 16) is None
    assert bench.store.reads == reads


def test_a_change_by_another_replica_is_seen_after_many_unknown_titles(bench: Bench) -> None:
    bench.here.add(LUNG)
    assert bench.here.by_ae_title("BRAIN") is None
    bench.there.add(replace(LUNG, name="brain", virtual_ae_title="BRAIN"))
    assert bench.here.by_ae_title("BRAIN") is not None
    bench.there.remove("brain")
    bench.there.remove("lung")

    assert bench.here.by_ae_title("NOBODY") is None
    assert bench.here.by_ae_title("BRAIN") is None
    assert dict(bench.here.all()) == {}


def test_what_a_replica_changed_itself_holds_there_at_once(bench: Bench) -> None:
    bench.here.add(LUNG)
    bench.here.by_ae_title("LUNG")

    changed = bench.here.update("lung", workflows=("w-2",))
    assert bench.here.by_ae_title("LUNG") == changed

    bench.here.remove("lung")
    assert bench.here.by_ae_title("LUNG") is None
