"""The state in a versioned bucket."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from engines import ObjectStoreEndpoint
from object_stores import minio_store
from records_made import RECEIVED_AT, newest, record
from structlog.testing import capture_logs
from versioning import clear_versions, versioned

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.s3.store import MinioObjectStore
from shared.record_store import Records
from shared.records import State
from shared.runtime.backends import open_backends
from shared.settings.loader import load
from worker.settings import WorkerSettings


@pytest.fixture
def state_bucket(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    with versioned(object_store_endpoint) as name:
        yield name


@pytest.fixture
def store(object_store_endpoint: ObjectStoreEndpoint, state_bucket: str) -> MinioObjectStore:
    return minio_store(object_store_endpoint, state_bucket)


def test_records_pass_through_their_states_in_a_versioned_bucket(store: MinioObjectStore) -> None:
    records = Records(store)
    opened, failed = record(), record()
    for added in (opened, failed):
        records.add(added)
        held = records.find(added.payload_id)
        assert held is not None
        held = records.change(held, attempts=1)
        records.settle(held, State.OPENED if added is opened else State.FAILED)
    settled = records.find(failed.payload_id)
    assert settled is not None
    records.replay(settled, RECEIVED_AT + timedelta(hours=1))
    given_up = record()
    assert records.give_up(given_up.payload_id)
    store.delete([tombstone.key for tombstone in records.tombstones()])

    assert [held.payload_id for held in newest(records, State.OPENED, 9)[0]] == [opened.payload_id]
    assert [held.payload_id for held in newest(records, State.PENDING, 9)[0]] == [failed.payload_id]
    assert len(records.pending()) == 1
    records.add(given_up)


def test_a_store_reports_whether_it_keeps_removed_objects(
    store: MinioObjectStore,
    object_store_endpoint: ObjectStoreEndpoint,
    state_bucket: str,
    bucket: str,
    tmp_path: Path,
) -> None:
    assert store.keeps_removed()
    clear_versions(object_store_endpoint, state_bucket)
    assert not store.keeps_removed()

    plain = minio_store(object_store_endpoint, bucket)
    assert not plain.keeps_removed()
    plain.prepare()
    assert not plain.keeps_removed()
    assert not FolderObjectStore(tmp_path).keeps_removed()


def test_a_versioned_state_bucket_is_reported_at_start(
    object_store_endpoint: ObjectStoreEndpoint,
    state_bucket: str,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "OBJECT_STORE": object_store_endpoint.url,
        "OBJECT_STORE_ACCESS_KEY": object_store_endpoint.access_key,
        "OBJECT_STORE_SECRET_KEY": object_store_endpoint.secret_key,
        "BUCKET": bucket,
        "STATE_BUCKET": state_bucket,
    }.items():
        monkeypatch.setenv(f"STOWGATE_{name}", value)
    backends = open_backends(load(WorkerSettings), store_threads=4)
    with capture_logs() as logs:
        backends.prepare()
        clear_versions(object_store_endpoint, state_bucket)
        backends.prepare()
    backends.close()

    named = [log for log in logs if "is versioned" in log["event"]]
    assert [log["log_level"] for log in named] == ["warning"]
    assert "noncurrent versions" in named[0]["event"]
