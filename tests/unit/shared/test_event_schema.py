"""The event on the wire."""

import json
from pathlib import Path

import pytest
from records_made import record

from shared.adapters.folder.store import FolderObjectStore
from shared.dicom.left_out import LeftOut
from shared.errors import MalformedEvent
from shared.events import InstancesStored, NewerEvent, decode, encode, of_new_record
from shared.instances import StoredInstance
from shared.record_store import Records, VersionedRecord

PAYLOAD_ID = "0190b2f4-7c1e-7abc-8def-0123456789ab"
CORRELATION_ID = "5f0c6f1e-6f0e-4d3c-9d64-1f2d3c4b5a69"


def test_an_event_is_decoded_as_it_was_encoded() -> None:
    event = InstancesStored(PAYLOAD_ID, CORRELATION_ID)
    assert decode(encode(event, "exchange", "key").body) == event


def test_fields_of_a_newer_service_are_ignored() -> None:
    event = InstancesStored(PAYLOAD_ID, CORRELATION_ID)
    sent = json.loads(encode(event, "exchange", "key").body)

    assert sent["version"] == 1
    assert decode(json.dumps({**sent, "priority": 7}).encode()) == event


def test_an_event_of_a_newer_version_is_not_malformed() -> None:
    with pytest.raises(NewerEvent, match=r"newer Stowgate \(version 2, this one reads up to 1"):
        decode(json.dumps({"version": 2, "payloads": [PAYLOAD_ID]}).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        b"{}",
        b'{"version": 0}',
        b'{"version": "2"}',
        b'{"version": true}',
        b'{"payload_id": "x", "correlation_id": "y"}',
        b'{"payload_id": 1, "correlation_id": null}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_any_other_body_is_malformed_and_not_repeated(body: bytes) -> None:
    with pytest.raises(MalformedEvent) as refused:
        decode(body)
    assert str(refused.value) in (
        "the body is not a valid InstancesStored event",
        "payload_id and correlation_id of an event must be GUIDs",
    )


def add(folder: Path, instance_count: int) -> VersionedRecord:
    instance = StoredInstance("1.2", "1.2.3", "1.2.4", "1.2.5", 7, "0" * 64, LeftOut(((1, 2),)))
    store = FolderObjectStore(folder)
    store.prepare()
    return Records(store).add(record(*[instance] * instance_count))


def test_the_event_of_a_small_new_record_carries_the_record_and_its_version(
    tmp_path: Path,
) -> None:
    added = add(tmp_path, 2)
    event = of_new_record(added)

    received = decode(encode(event, "exchange", "key").body)

    assert received == event
    assert received.new_record == added


def test_the_event_of_a_large_new_record_only_names_it_and_its_version(tmp_path: Path) -> None:
    added = add(tmp_path, 100)

    event = of_new_record(added)
    body = encode(event, "exchange", "key").body

    assert decode(body) == event
    assert (event.new_record, event.new_version) == (None, added.version)
    assert len(body) < 300


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("payload_id", PAYLOAD_ID),
        ("record", "{}"),
        ("record", '{"version": 2}'),
        ("record", None),
        ("record_version", None),
    ],
)
def test_a_copy_that_cannot_be_used_is_ignored(
    tmp_path: Path, field: str, value: str | None
) -> None:
    sent = json.loads(encode(of_new_record(add(tmp_path, 1)), "exchange", "key").body)

    changed = {**sent, field: value}
    received = decode(json.dumps(changed).encode())

    assert received == InstancesStored(
        changed["payload_id"], changed["correlation_id"], new_version=changed["record_version"]
    )
