"""Attachments of a record, over a real folder store."""

from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import orjson
import pytest
from observed_store import ObservedStore
from records_made import record

from shared.adapters.folder.store import FolderObjectStore
from shared.attachments import Attachment, AttachmentUnreadable
from shared.dicom.left_out import LeftOut
from shared.instances import StoredInstance
from shared.record_store import Records
from shared.records import IngestRecord

INSTANCES = [
    StoredInstance("1.2.1", f"1.2.2.{number}", "1.2.3", "1.2.4", number, "ab" * 32, left_out)
    for number, left_out in enumerate([LeftOut(((1, 2),), (("00100010", "PN"),))] * 3000)
]
LINES = [orjson.dumps(instance) + b"\n" for instance in INSTANCES]


@pytest.fixture
def store(tmp_path: Path) -> FolderObjectStore:
    store = FolderObjectStore(tmp_path)
    store.prepare()
    return store


@pytest.fixture
def records(store: FolderObjectStore) -> Records:
    return Records(store)


def _attach(records: Records, data: bytes, name: Attachment = Attachment.INSTANCES) -> IngestRecord:
    added = replace(record(), file_count=len(INSTANCES), instances=None)
    records.attachments.put(added.payload_id, name, BytesIO(data), len(data), "")
    return added


def test_attached_instances_equal_those_in_a_record(records: Records) -> None:
    attached = _attach(records, b"".join(LINES))

    assert [*records.instances(attached)] == INSTANCES
    assert [*records.instances(attached)] == [*records.instances(record(*INSTANCES))]


def test_attached_instances_are_read_in_pieces(records: Records, store: FolderObjectStore) -> None:
    attached = _attach(records, b"".join(LINES))
    read: list[str] = []
    observed = Records(ObservedStore(store, before={"read_range": read.append}))
    instances: Iterator[StoredInstance] = observed.instances(attached)
    next(instances)
    assert len(read) == 1

    assert len([*instances]) == len(INSTANCES) - 1
    assert len(read) == -(-len(b"".join(LINES)) // (256 << 10))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"".join(LINES[:-1]),
        b"".join(LINES)[:-10],
        b"".join([*LINES, LINES[0]]),
        b"".join([*LINES[:-1], b"{}\n"]),
        b"".join([*LINES[:-1], b"\n"]),
        b"".join([*LINES[:-1], LINES[-1].replace(b"1.2.3", b"../..")]),
    ],
    ids=["empty", "one less", "cut", "one more", "no fields", "no JSON", "no UID"],
)
def test_a_damaged_attachment_of_instances_is_unreadable(records: Records, data: bytes) -> None:
    attached = _attach(records, data)

    with pytest.raises(AttachmentUnreadable, match=r"instances\.jsonl .* damaged; restore"):
        list(records.instances(attached))


def test_a_missing_attachment_is_reported_before_the_iteration(records: Records) -> None:
    with pytest.raises(AttachmentUnreadable, match=r"instances\.jsonl .* missing; restore"):
        records.instances(replace(record(), file_count=1, instances=None))
    with pytest.raises(AttachmentUnreadable, match=r"answer .* missing; restore"):
        records.attachments.read(record().payload_id, Attachment.ANSWER)


@pytest.mark.parametrize("size_bytes", [0, 1, 256 << 10, (256 << 10) + 1])
def test_an_attached_answer_is_read_back_unchanged(records: Records, size_bytes: int) -> None:
    answer = bytes(range(256)) * (size_bytes // 256) + b"x" * (size_bytes % 256)
    attached = _attach(records, answer, Attachment.ANSWER)

    read = records.attachments.read(attached.payload_id, Attachment.ANSWER)

    assert b"".join(read) == answer


def test_only_the_attachments_of_one_payload_are_removed(
    records: Records, store: FolderObjectStore
) -> None:
    doomed, kept = _attach(records, b"x"), _attach(records, b"y")
    records.attachments.put(doomed.payload_id, Attachment.ANSWER, BytesIO(b"z"), 1, "")

    records.attachments.remove(doomed.payload_id)
    records.attachments.remove(record().payload_id)

    assert [found.key for found in store.list("")] == [f"uploads/{kept.payload_id}/instances.jsonl"]


def test_a_copy_of_the_bucket_in_the_order_of_keys_has_the_attachments_of_its_records(
    records: Records, store: FolderObjectStore
) -> None:
    """Attachments are written before the record, so a backup must copy them after it."""
    attached = _attach(records, b"x")
    records.add(attached)

    record_key, attachment_key = (found.key for found in store.list(""))

    assert record_key.startswith("pending/")
    assert attachment_key.startswith("uploads/")
