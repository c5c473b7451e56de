"""The sweep after the state bucket lost records, on the folder and on a real S3.

A restore to an earlier time, or a failover to an outdated replica, loses records. Acknowledged
payloads then look like crashed uploads.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from threading import Barrier
from typing import NoReturn

import pytest
import structlog
from engines import ObjectStoreEndpoint
from observed_store import ObservedStore, once
from prometheus_client import CollectorRegistry
from records_made import record

from api.stow.idempotency import ClaimedKey, IdempotencyKeys
from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.s3.store import MinioObjectStore
from shared.errors import StoreUnavailable
from shared.ids import PayloadIds
from shared.ports import ObjectStore
from shared.record_store import Records
from shared.runtime.metrics import WorkerMetrics
from shared.sweep_cursor import SweepCursor
from shared.time import utc_now
from worker.sweeper import Sweeper

GRACE = timedelta(hours=1)
LEASE = timedelta(seconds=60)
RESTARTS = "the sweep restarts and keeps everything that was uploaded before"

Backup = dict[str, bytes]


@dataclass
class Site:
    """Stowgate's two buckets, and what an API and a worker do there.

    Its clock begins with the real one, as the stores' own does.
    """

    state: ObjectStore
    instances: ObjectStore
    realm: str
    now: datetime = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        self.payload_ids = PayloadIds(self.realm)
        self.records = Records(self.state)
        self.cursor = self.another_cursor()
        self.keys = IdempotencyKeys(
            self.state, self.records, self.payload_ids.mint, LEASE, clock=lambda: self.now
        )
        self.cursor.read()
        self.now += timedelta(seconds=1)

    def another_cursor(
        self, *, instances: ObjectStore | None = None, state: ObjectStore | None = None
    ) -> SweepCursor:
        return SweepCursor(
            state=state or self.state,
            instances=instances or self.instances,
            payload_ids=self.payload_ids,
            clock=lambda: self.now,
        )

    def upload(self, minted: datetime | None = None) -> str:
        """An upload without its record."""
        self.now += timedelta(seconds=1)
        payload_id = self.payload_ids.mint(minted or self.now)
        self.put(f"{payload_id}/dcm/1.2/1.3/1.dcm")
        return payload_id

    def record(self, payload_id: str) -> str:
        self.records.add(replace(record(), payload_id=payload_id))
        return payload_id

    def acknowledge(self) -> str:
        """An upload with its record, which is not confirmed yet."""
        return self.record(self.upload())

    def put(self, key: str) -> None:
        self.instances.put(key, BytesIO(b"x"), 1, "application/dicom")

    def sweep(self, instances: ObjectStore | None = None) -> None:
        Sweeper(
            instances=instances or self.instances,
            state=self.state,
            records=self.records,
            cursor=self.cursor,
            payload_ids=self.payload_ids,
            grace=GRACE,
            pause=timedelta(hours=1),
            metrics=WorkerMetrics(CollectorRegistry()),
            clock=lambda: self.now,
        ).sweep()

    def sweep_for(self, hours: int) -> None:
        for _ in range(hours):
            self.now += timedelta(hours=1)
            self.sweep()

    def payloads(self) -> set[str]:
        return {name for name in self.instances.folders("") if name != "stowgate"}


def backup(store: ObjectStore) -> Backup:
    return {found.key: store.get(found.key).data for found in store.list("")}


def restore(store: ObjectStore, earlier: Backup) -> None:
    store.delete([found.key for found in store.list("")])
    for key, data in earlier.items():
        store.put(key, BytesIO(data), len(data), "application/json")


@pytest.fixture(params=["folder", "minio"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    state, instances = (_store(request, tmp_path, name) for name in ("state", "payloads"))
    return Site(state, instances, "state")


def _store(request: pytest.FixtureRequest, folder: Path, name: str) -> ObjectStore:
    store: ObjectStore = FolderObjectStore(folder / name)
    if request.param == "minio":
        endpoint: ObjectStoreEndpoint = request.getfixturevalue("object_store_endpoint")
        bucket = request.getfixturevalue("bucket" if name == "state" else "second_bucket")
        store = MinioObjectStore.connect(
            endpoint.url,
            access_key=endpoint.access_key,
            secret_key=endpoint.secret_key,
            region="us-east-1",
            bucket=bucket,
            threads=16,
        )
    store.prepare()
    return store


def test_acknowledged_payloads_survive_a_restore_to_just_before_them(site: Site) -> None:
    earlier = backup(site.state)
    acknowledged = {site.acknowledge() for _ in range(10)}
    site.cursor.confirm()
    restore(site.state, earlier)

    with structlog.testing.capture_logs() as log:
        site.sweep_for(hours=48)

    assert site.payloads() == acknowledged
    (said,) = [entry for entry in log if entry["event"] == RESTARTS]
    assert "the state bucket was restored" in said["why"]
    assert not list(site.state.list("pending/"))


def test_acknowledged_payloads_survive_a_restore_after_which_the_sweep_moved_on(
    site: Site,
) -> None:
    """No sweep runs between the restore and the next upload."""
    site.acknowledge()
    site.cursor.confirm()
    site.sweep_for(hours=3)
    earlier = backup(site.state)
    acknowledged = {site.acknowledge() for _ in range(10)}
    site.cursor.confirm()
    restore(site.state, earlier)
    acknowledged.add(site.acknowledge())
    site.cursor.confirm()

    site.sweep_for(hours=48)

    assert acknowledged < site.payloads()


def test_acknowledged_payloads_survive_a_restore_to_an_empty_bucket(site: Site) -> None:
    acknowledged = {site.acknowledge() for _ in range(10)}
    site.cursor.confirm()
    restore(site.state, {})

    with structlog.testing.capture_logs() as log:
        site.sweep_for(hours=48)

    assert site.payloads() == acknowledged
    assert [entry["event"] for entry in log if entry["log_level"] == "error"] == [RESTARTS]


def test_acknowledged_payloads_survive_a_restore_between_two_steps_of_the_sweep(
    site: Site,
) -> None:
    earlier = backup(site.state)
    acknowledged = {site.acknowledge() for _ in range(10)}
    site.cursor.confirm()
    site.now += 2 * GRACE
    restored = ObservedStore(
        site.instances, before={"folders": lambda _: restore(site.state, earlier)}
    )

    site.sweep(restored)
    site.sweep_for(hours=48)

    assert site.payloads() == acknowledged


def test_payloads_in_progress_survive_a_restore_without_any_confirmation(
    site: Site,
) -> None:
    earlier = backup(site.state)
    acknowledged = {site.acknowledge() for _ in range(10)}
    for payload_id in acknowledged:
        site.put(f"{payload_id}/dcm/1.2/1.3/1.dcm.json")
    restore(site.state, earlier)

    with structlog.testing.capture_logs() as log:
        site.sweep_for(hours=48)

    assert site.payloads() == acknowledged
    (said,) = [entry for entry in log if entry["event"] == RESTARTS]
    assert min(acknowledged) in said["why"]


def test_the_event_of_a_lost_record_reveals_a_restore(site: Site) -> None:
    earlier = backup(site.state)
    acknowledged = {site.acknowledge() for _ in range(10)}
    restore(site.state, earlier)

    site.cursor.record_missing(max(acknowledged), "an event announced it")
    site.sweep_for(hours=48)

    assert site.payloads() == acknowledged


def test_a_payload_survives_a_restore_after_which_its_key_is_used_again(
    site: Site,
) -> None:
    """The key that was claimed before the backup leads to no record, and so its upload is given
    up, which leaves a tombstone."""
    first = site.keys.claim("127.0.0.1", "/dicomweb/studies", "k")
    assert isinstance(first, ClaimedKey)
    site.put(f"{first.payload_id}/dcm/1.2/1.3/1.dcm")
    earlier = backup(site.state)
    site.record(first.payload_id)
    site.cursor.confirm()
    restore(site.state, earlier)
    site.now += 2 * LEASE

    second = site.keys.claim("127.0.0.1", "/dicomweb/studies", "k")
    assert isinstance(second, ClaimedKey)
    site.sweep_for(hours=72)

    assert site.payloads() == {first.payload_id}
    assert not list(site.state.list("pending/"))


def test_an_upload_that_crashes_after_a_restore_is_swept(site: Site) -> None:
    earlier = backup(site.state)
    acknowledged = site.acknowledge()
    site.cursor.confirm()
    restore(site.state, earlier)
    site.sweep()
    site.now += timedelta(hours=1)
    site.upload()

    site.sweep_for(hours=3)

    assert site.payloads() == {acknowledged}


def test_workers_stopped_for_a_week_sweep_crashed_uploads_only(site: Site) -> None:
    acknowledged = {site.acknowledge() for _ in range(3)}
    site.upload()
    site.cursor.confirm()
    site.now += timedelta(days=7)

    with structlog.testing.capture_logs() as log:
        site.sweep()

    assert site.payloads() == acknowledged
    assert [entry["event"] for entry in log] == ["swept"]


def test_a_restore_of_the_payloads_bucket_is_not_a_loss_of_records(site: Site) -> None:
    earlier = backup(site.instances)
    acknowledged = site.acknowledge()
    died = site.upload()
    site.cursor.confirm()
    restore(site.instances, backup(site.instances) | earlier)

    site.sweep_for(hours=3)

    assert died not in site.payloads()
    assert site.payloads() == {acknowledged}


def test_a_removed_witness_restarts_the_sweep(site: Site) -> None:
    acknowledged_before = site.acknowledge()
    site.cursor.confirm()
    earlier = backup(site.state)
    acknowledged = site.acknowledge()
    site.cursor.confirm()
    restore(site.state, earlier)
    site.instances.delete(["stowgate/state.json"])

    site.sweep_for(hours=48)

    assert site.payloads() == {acknowledged_before, acknowledged}


def test_a_restore_is_detected_with_ids_of_a_clock_that_is_ahead(site: Site) -> None:
    earlier = backup(site.state)
    acknowledged = site.record(site.upload(minted=site.now + timedelta(minutes=20)))
    site.cursor.confirm()
    restore(site.state, earlier)

    site.sweep()
    site.sweep_for(hours=48)

    assert site.payloads() == {acknowledged}


def test_two_sites_that_share_a_payloads_bucket_sweep_only_their_own(
    site: Site, tmp_path: Path
) -> None:
    other_state = FolderObjectStore(tmp_path / "other")
    other_state.prepare()
    other = Site(other_state, site.instances, "other", site.now)
    acknowledged = {site.acknowledge(), other.acknowledge()}
    site.upload()
    for one in (site, other):
        one.cursor.confirm()

    with structlog.testing.capture_logs() as log:
        for one in (other, site):
            one.sweep_for(hours=3)

    assert site.payloads() == acknowledged
    assert RESTARTS not in [entry["event"] for entry in log]


def test_concurrent_confirmations_are_not_mistaken_for_a_restore(site: Site) -> None:
    cursors = [site.another_cursor() for _ in range(8)]
    together = Barrier(len(cursors))

    def confirm(cursor: SweepCursor) -> None:
        together.wait()
        for _ in range(5):
            cursor.confirm()
            cursor.read()

    before = site.cursor.read()
    with (
        structlog.testing.capture_logs() as log,
        ThreadPoolExecutor(len(cursors)) as threads,
    ):
        list(threads.map(confirm, cursors))

    assert log == []
    assert site.cursor.read().confirmations == before.confirmations + 40


def test_a_confirmation_between_the_two_looks_does_not_look_like_a_restore(site: Site) -> None:
    late = ObservedStore(site.state, after={"get": once(site.another_cursor().confirm)})

    with structlog.testing.capture_logs() as log:
        site.another_cursor(state=late).read()

    assert log == []


def test_a_first_confirmation_between_the_two_looks_does_not_look_like_a_lost_witness(
    site: Site,
) -> None:
    site.cursor.read()
    late = ObservedStore(site.instances, after={"get": once(site.another_cursor().confirm)})

    with structlog.testing.capture_logs() as log:
        assert site.another_cursor(instances=late).read().confirmations == 1

    assert log == []


def die(_: str) -> NoReturn:
    raise StoreUnavailable("killed")


def test_a_process_that_dies_in_a_confirmation_does_not_look_like_a_restore(site: Site) -> None:
    killed = site.another_cursor(instances=ObservedStore(site.instances, before={"replace": die}))
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="killed"):
            killed.confirm()

    with structlog.testing.capture_logs() as log:
        site.another_cursor().confirm()
        site.cursor.read()

    assert log == []


def test_a_first_confirmation_that_is_interrupted_does_not_look_like_a_restore(site: Site) -> None:
    for killed in (
        site.another_cursor(state=ObservedStore(site.state, before={"replace": die})),
        site.another_cursor(instances=ObservedStore(site.instances, before={"replace": die})),
    ):
        with pytest.raises(StoreUnavailable, match="killed"):
            killed.confirm()

    with structlog.testing.capture_logs() as log:
        site.another_cursor().confirm()
        site.cursor.read()

    assert log == []


def test_an_upload_that_is_not_acknowledged_leaves_nothing_in_the_payloads_bucket(
    site: Site,
) -> None:
    site.cursor.read()
    site.sweep_for(hours=3)

    assert list(site.instances.list("")) == []
