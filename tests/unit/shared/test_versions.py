"""An older and a newer service on one store, neither of which damages the other's objects."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path

import orjson
import pytest
import structlog
from instances import new_instance
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, newest, record

from api.stow.idempotency import ClaimedKey, ClaimUnreadable, IdempotencyKeys
from api.vae.registry import RegistryUnreadable, Vae, VaeRegistry
from shared import events
from shared.adapters.folder.publisher import FolderEventPublisher
from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.queues import Published
from shared.events import InstancesStored
from shared.ids import PayloadIds
from shared.ports import Publication, ReceivedMessage
from shared.record_store import Records, VersionedRecord
from shared.records import RecordUnreadable, State, newest_first
from shared.runtime.metrics import WorkerMetrics
from shared.sweep_cursor import CURSOR, CursorUnreadable, SweepCursor
from shared.time import utc_now
from worker.handler import Handler
from worker.relay import Relay
from worker.sweeper import Sweeper
from worker.workflow_manager import WorkflowManager

LUNG = Vae("lung", "LUNG", ("w-1",), (), RECEIVED_AT)
REGISTRY = "vae/registry.json"


@dataclass
class Bench:
    """A worker and an API of this version, on real folder stores."""

    folder: Path
    now: datetime = RECEIVED_AT

    def __post_init__(self) -> None:
        self.instances = FolderObjectStore(self.folder / "payloads")
        self.state = FolderObjectStore(self.folder / "state")
        self.instances.prepare()
        self.state.prepare()
        self.payload_ids = PayloadIds("state")
        self.records = Records(self.state)
        self.cursor = SweepCursor(
            state=self.state,
            instances=self.instances,
            payload_ids=self.payload_ids,
            clock=lambda: self.now,
        )
        self.cursor.read()
        self.now += timedelta(seconds=1)
        self.announced: list[str] = []
        self.metrics = WorkerMetrics(CollectorRegistry())
        self.vaes = VaeRegistry(self.state)

    def relay(self) -> None:
        Relay(
            records=self.records,
            announce=self._announce,
            backlog=lambda: 0,
            metrics=self.metrics,
            clock=lambda: self.now,
        ).run_once()

    def _announce(self, event: InstancesStored) -> Publication:
        self.announced.append(event.payload_id)
        return Published()

    def handle(self, body: bytes) -> None:
        Handler(
            records=self.records,
            record_missing=self.cursor.record_missing,
            instances=self.instances,
            publisher=FolderEventPublisher(self.folder / "requests"),
            workflow_manager=WorkflowManager("monaideploy", "md.workflow.request", "payloads"),
            sidecar_writers=ThreadPoolExecutor(1),
            owner="me",
            lease=timedelta(seconds=60),
            metrics=self.metrics,
            clock=lambda: self.now,
        )(ReceivedMessage(body))

    def sweep(self) -> None:
        Sweeper(
            instances=self.instances,
            state=self.state,
            records=self.records,
            cursor=self.cursor,
            payload_ids=self.payload_ids,
            grace=timedelta(hours=1),
            pause=timedelta(days=1),
            metrics=self.metrics,
            clock=lambda: self.now,
        ).sweep()

    def keys(self) -> IdempotencyKeys:
        return IdempotencyKeys(
            self.state,
            self.records,
            self.payload_ids.mint,
            timedelta(seconds=60),
            clock=lambda: self.now,
        )

    def add(self) -> VersionedRecord:
        added = replace(record(), payload_id=self.payload_ids.mint(self.now))
        key = f"{added.payload_id}/dcm/1.2/1.3/1.dcm"
        data = new_instance()
        self.instances.put(key, BytesIO(data), len(data), "application/dicom")
        self.records.add(added)
        held = self.records.find(added.payload_id)
        assert held is not None
        return held

    def rewrite(self, key: str, **fields: object) -> bytes:
        """Write these fields into an object, as a newer service would."""
        row = {**json.loads(self.state.get(key).data), **fields}
        data = json.dumps(row).encode()
        self.state.put(key, BytesIO(data), len(data), "application/json")
        return data

    def row(self, key: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.state.get(key).data)
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def event_of(payload_id: str) -> bytes:
    return events.encode(InstancesStored(payload_id, record().correlation_id), "e", "k").body


def test_every_stored_object_has_a_version(bench: Bench) -> None:
    bench.add()
    bench.vaes.add(LUNG)
    bench.keys().claim("127.0.0.1", "/dicomweb/studies", "k")
    bench.cursor.confirm()

    objects = [found.key for found in bench.state.list("")]

    assert {key.partition("/")[0] for key in objects} == {"pending", "vae", "idempotency", "sweep"}
    assert {bench.row(key)["version"] for key in objects} == {1}
    assert json.loads(bench.instances.get("stowgate/state.json").data)["version"] == 1
    assert json.loads(event_of(record().payload_id))["version"] == 1


def test_fields_of_a_newer_service_are_kept_through_all_states_of_a_record(
    bench: Bench,
) -> None:
    held = bench.add()
    bench.rewrite(held.key, priority={"of": [1, 2]})

    def found() -> VersionedRecord:
        again = bench.records.find(held.record.payload_id)
        assert again is not None
        assert bench.row(again.key)["priority"] == {"of": [1, 2]}
        return again

    bench.records.change(found(), attempts=1)
    bench.records.settle(found(), State.FAILED, last_error="x")
    bench.records.replay(found(), bench.now)
    bench.handle(event_of(held.record.payload_id))

    assert found().record.state is State.OPENED


def test_a_record_without_a_version_has_version_1(bench: Bench) -> None:
    held = bench.add()
    row = bench.row(held.key)
    del row["version"]
    data = orjson.dumps(row)
    bench.state.put(held.key, BytesIO(data), len(data), "application/json")

    assert bench.records.find(held.record.payload_id) is not None


@pytest.mark.parametrize("place", list(State))
def test_a_record_of_a_newer_version_is_unchanged_and_delays_no_other(
    bench: Bench, place: State
) -> None:
    held = bench.add()
    if place is not State.PENDING:
        bench.records.settle(held, place)
    payload_id = held.record.payload_id
    key = f"{place}/{newest_first(payload_id)}"
    written = bench.rewrite(key, version=2, instances={"in": "another shape"})
    bench.now += timedelta(seconds=1)
    other = bench.add().record.payload_id

    with structlog.testing.capture_logs() as log:
        bench.relay()
        for event in (payload_id, other):
            bench.handle(event_of(event))
        page = newest(bench.records, None, 10)[0]
        bench.now = utc_now() + timedelta(days=3)
        bench.sweep()

    assert bench.state.get(key).data == written
    assert [found.key for found in bench.state.list("") if payload_id in found.key] == [key]
    assert payload_id in bench.instances.folders("")
    assert [found.payload_id for found in page] == [other]
    assert other in bench.announced
    reopened = bench.records.find(other)
    assert reopened is not None
    assert reopened.record.state is State.OPENED
    reasons = [entry["error"] for entry in log if "error" in entry]
    assert all("written by a newer Stowgate (version 2" in reason for reason in reasons)
    assert any(key in reason for reason in reasons)
    with pytest.raises(RecordUnreadable, match="upgrade this service"):
        bench.records.give_up(payload_id)


def test_an_event_of_a_newer_version_is_neither_dead_lettered_nor_handled(bench: Bench) -> None:
    held = bench.add()

    bench.handle(json.dumps({"version": 2, "payload_id": held.record.payload_id}).encode())

    assert bench.records.find(held.record.payload_id) == held


def test_fields_of_a_newer_service_are_kept_in_the_registry_of_vaes(bench: Bench) -> None:
    bench.vaes.add(LUNG)
    rows = bench.row(REGISTRY)["vaes"]
    assert isinstance(rows, list)
    bench.rewrite(REGISTRY, vaes=[{**rows[0], "priority": 7}], defaults={"a": 1})

    bench.vaes.add(replace(LUNG, name="brain", virtual_ae_title="BRAIN"))
    bench.vaes.update("lung", workflows=("w-2",))

    row = bench.row(REGISTRY)
    assert row["defaults"] == {"a": 1}
    found = row["vaes"]
    assert isinstance(found, list)
    lung, brain = sorted(found, key=lambda vae: vae["name"], reverse=True)
    assert (lung["priority"], lung["workflows"]) == (7, ["w-2"])
    assert "priority" not in brain


def test_a_registry_of_a_newer_version_is_unchanged(bench: Bench) -> None:
    bench.vaes.add(LUNG)
    written = bench.rewrite(REGISTRY, version=2, vaes={"lung": "in another shape"})

    calls: list[Callable[[], object]] = [
        bench.vaes.all,
        lambda: bench.vaes.by_ae_title("BRAIN"),
        lambda: bench.vaes.add(replace(LUNG, name="brain", virtual_ae_title="BRAIN")),
        lambda: bench.vaes.remove("lung"),
    ]
    for call in calls:
        with pytest.raises(RegistryUnreadable, match=r"a newer Stowgate .*; leave it there"):
            call()
    assert bench.state.get(REGISTRY).data == written


def test_a_claim_of_a_newer_version_is_unchanged(bench: Bench) -> None:
    claimed = bench.keys().claim("127.0.0.1", "/dicomweb/studies", "k")
    assert isinstance(claimed, ClaimedKey)
    (key,) = [found.key for found in bench.state.list("idempotency/")]
    written = bench.rewrite(key, version=2)
    bench.now += timedelta(hours=1)

    with pytest.raises(ClaimUnreadable, match="newer Stowgate"):
        bench.keys().claim("127.0.0.1", "/dicomweb/studies", "k")

    assert bench.state.get(key).data == written


@pytest.mark.parametrize("newer", [CURSOR, "stowgate/state.json"])
def test_a_sweep_cursor_of_a_newer_version_is_unchanged_and_nothing_is_swept(
    bench: Bench, newer: str
) -> None:
    bench.cursor.confirm()
    store = bench.state if newer == CURSOR else bench.instances
    written = json.dumps({"version": 2, "confirmations": {"in": "another shape"}}).encode()
    store.put(newer, BytesIO(written), len(written), "application/json")
    died = f"{bench.payload_ids.mint(bench.now)}/dcm/1.2/1.3/1.dcm"
    bench.instances.put(died, BytesIO(b"x"), 1, "application/dicom")
    bench.state.create("idempotency/ab/x.json", b"{}", "application/json")

    bench.now = utc_now() + timedelta(days=3)
    with structlog.testing.capture_logs() as log:
        bench.sweep()
    calls: list[Callable[[], object]] = [
        bench.cursor.confirm,
        lambda: bench.cursor.move("f"),
        lambda: bench.cursor.record_missing(bench.payload_ids.mint(bench.now), "x"),
    ]
    for call in calls:
        with pytest.raises(CursorUnreadable, match="newer Stowgate"):
            call()

    assert store.get(newer).data == written
    assert bench.instances.get(died).data == b"x"
    assert list(bench.state.list("idempotency/")) == []
    assert [newer in entry["error"] for entry in log] == [True]


def test_fields_of_a_newer_service_are_kept_in_the_sweep_cursor(bench: Bench) -> None:
    bench.rewrite(CURSOR, folders=["ab"])

    bench.cursor.confirm()
    bench.cursor.move("ff")

    assert bench.row(CURSOR)["folders"] == ["ab"]
