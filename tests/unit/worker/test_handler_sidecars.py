"""Sidecars and attached instances of a workflow request."""

import json
import tempfile
import threading
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import orjson
import pytest
from handler_bench import Bench, Observed, SlowBroker, stored_instance
from instances import new_instance, one_series, real_file
from observed_store import ObservedStore
from records_made import inline

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.memory import MemoryBroker
from shared.attachments import Attachment
from shared.errors import ObjectMissing, StoreUnavailable, Unroutable
from shared.instances import StoredInstance
from shared.ports import Message, Publication
from shared.records import IngestRecord, State, encode, payload_id_of


def test_the_sidecars_are_there_before_the_request_is_published(bench: Bench) -> None:
    added = bench.add(real_file(), real_file("MR_small.dcm"))
    seen = []

    def look(_: Message) -> None:
        for instance in inline(added):
            found = bench.instances.get(f"{added.payload_id}/{instance.metadata_path}")
            seen.append(json.loads(found.data)["00080018"]["Value"])

    bench.handler(Observed(bench.requests, look)).open_workflow_request(added.payload_id)

    assert seen == [[instance.sop_instance_uid] for instance in inline(added)]


class SidecarPuts:
    """Counts the sidecars that are put into its `store`, and fails the one of that number."""

    def __init__(self, bench: Bench, fails_at: int | None = None) -> None:
        self.keys: list[str] = []
        self.store = ObservedStore(bench.instances, before={"put": self._count})
        self._fails_at = fails_at
        self._lock = threading.Lock()

    def _count(self, key: str) -> None:
        with self._lock:
            self.keys.append(key)
            fails = len(self.keys) == self._fails_at
        if fails:
            raise StoreUnavailable("away")


def sidecars_of_the_next_attempt(bench: Bench) -> list[str]:
    bench.finish_writing()
    added, puts = bench.records.pending()[0], SidecarPuts(bench)
    bench.handler(instances=puts.store).open_workflow_request(payload_id_of(added.key))
    return sorted(puts.keys)


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_that_waits_for_a_queue_has_its_sidecars_written_once(
    bench: Bench, count: int
) -> None:
    added = bench.add(*[new_instance() for _ in range(count)])
    puts = SidecarPuts(bench)
    no_queues = MemoryBroker().publisher()
    bench.handler(no_queues, instances=puts.store).open_workflow_request(added.payload_id)
    assert len(puts.keys) == count

    assert sidecars_of_the_next_attempt(bench) == []

    assert bench.found(added).state is State.OPENED


def test_an_attempt_continues_with_the_sidecars_after_an_outage_of_the_store(bench: Bench) -> None:
    added = bench.add(*[new_instance() for _ in range(250)])
    puts = SidecarPuts(bench, fails_at=150)
    bench.handler(instances=puts.store).open_workflow_request(added.payload_id)
    assert bench.found(added).state is State.PENDING
    bench.finish_writing()
    written = {found.key for found in bench.instances.list("") if found.key.endswith(".json")}
    assert 100 <= len(written) < 250

    missing = sidecars_of_the_next_attempt(bench)

    assert len(missing) == 250 - len(written)
    assert not written & {*missing}
    assert bench.found(added).state is State.OPENED


def test_the_sidecars_of_a_returned_payload_are_not_written_again(bench: Bench) -> None:
    added = bench.add(*[new_instance() for _ in range(120)])

    def stop(key: str) -> None:
        if key.endswith(inline(added)[110].path):
            stopping.stop()

    stopping = bench.handler(
        Observed(bench.requests, lambda _: pytest.fail("published")),
        instances=ObservedStore(bench.instances, before={"read_range": stop}),
    )
    stopping.open_workflow_request(added.payload_id)
    assert (bench.found(added).state, bench.found(added).attempts) == (State.PENDING, 0)

    assert len(sidecars_of_the_next_attempt(bench)) <= 20


def test_a_sidecar_that_was_lost_since_an_earlier_attempt_is_written_again(bench: Bench) -> None:
    added = bench.add(*[new_instance() for _ in range(3)])
    bench.handler(MemoryBroker().publisher()).open_workflow_request(added.payload_id)
    lost = f"{added.payload_id}/{inline(added)[1].metadata_path}"
    bench.instances.delete([lost])

    assert sidecars_of_the_next_attempt(bench) == [lost]


def test_a_sidecar_has_everything_but_bulk_data(bench: Bench) -> None:
    added = bench.add(real_file())

    bench.handler().open_workflow_request(added.payload_id)

    (instance,) = inline(added)
    assert instance.left_out.ranges
    found = bench.instances.get(f"{added.payload_id}/{instance.metadata_path}")
    metadata = json.loads(found.data)
    assert "7FE00010" not in metadata
    assert metadata["00280010"] == {"vr": "US", "Value": [128]}
    assert metadata["0020000E"]["Value"] == [instance.series_uid]


def test_an_attempt_after_one_that_failed_writes_no_sidecars_while_the_queue_is_missing(
    bench: Bench,
) -> None:
    added = bench.add(real_file())
    sidecar = f"{added.payload_id}/{inline(added)[0].metadata_path}"

    class Missing(SlowBroker):
        def ping(self) -> None:
            raise Unroutable("no queue")

        def begin(self, _: Message) -> Publication:
            raise Unroutable("no queue")

    handler = bench.handler(Missing(lambda: True))
    handler.open_workflow_request(added.payload_id)
    bench.instances.delete([sidecar])
    bench.now = bench.found(added).due_at
    handler.open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.attempts, found.last_error) == (State.PENDING, 2, "no queue")
    with pytest.raises(ObjectMissing):
        bench.instances.get(sidecar)


def test_a_full_disk_while_a_dataset_is_inflated_is_a_transient_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = bench.add(real_file("image_dfl.dcm"))
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert (found.state, found.lease) == (State.PENDING, None)
    assert found.last_error is not None
    assert found.last_error.startswith(f"no room to inflate {added.payload_id}/")


def _attach(
    bench: Bench,
    added: IngestRecord,
    instances: Iterable[StoredInstance] = (),
    count: int = 0,
) -> IngestRecord:
    """The same record as if its instances, or those given, were too many for it."""
    rows = added.instances or instances
    lines = b"".join(orjson.dumps(instance) + b"\n" for instance in rows)
    bench.records.attachments.put(
        added.payload_id, Attachment.INSTANCES, BytesIO(lines), len(lines), ""
    )
    held = bench.records.find(added.payload_id)
    assert held is not None
    file_count = added.file_count or count
    return bench.records.change(held, instances=None, file_count=file_count).record


def _published(bench: Bench, payload_id: str) -> bytes:
    messages: list[Message] = []
    bench.handler(Observed(bench.requests, messages.append)).open_workflow_request(payload_id)
    (message,) = messages
    return message.body


@pytest.mark.parametrize("count", [1, 150])
def test_attached_instances_get_the_same_message_and_sidecars_as_those_in_a_record(
    bench: Bench, tmp_path: Path, count: int
) -> None:
    files = list(one_series(count))
    inline = bench.add(*files)
    expected = _published(bench, inline.payload_id)
    other = Bench(tmp_path / "other")
    attached = _attach(other, other.add(*files, payload_id=inline.payload_id))

    assert _published(other, attached.payload_id) == expected

    assert json.loads(expected)["file_count"] == len(json.loads(expected)["payload"]) == count
    assert [(o.key, o.size_bytes) for o in other.instances.list("")] == [
        (o.key, o.size_bytes) for o in bench.instances.list("")
    ]
    assert other.found(attached).workflow_request == bench.found(inline).workflow_request


def test_the_message_of_attached_instances_is_the_same_on_every_attempt(bench: Bench) -> None:
    added = _attach(bench, bench.add(*one_series(150)))
    messages: list[Message] = []
    lost = Observed(MemoryBroker().publisher(), messages.append)
    for _ in range(2):
        bench.handler(lost).open_workflow_request(added.payload_id)
        bench.now = bench.found(added).due_at

    assert _published(bench, added.payload_id) == messages[0].body == messages[1].body


def test_the_record_of_an_opened_payload_stays_small_with_many_instances(bench: Bench) -> None:
    added = _attach(bench, bench.add(*one_series(150)))

    bench.handler().open_workflow_request(added.payload_id)

    assert len(encode(bench.found(added))) < 2000


def test_a_payload_whose_attached_instances_are_missing_fails_with_the_reason(bench: Bench) -> None:
    added = _attach(bench, bench.add(new_instance()))
    bench.records.attachments.remove(added.payload_id)

    bench.handler().open_workflow_request(added.payload_id)

    found = bench.found(added)
    assert found.state is State.FAILED
    assert "instances.jsonl in the state bucket is missing; restore it" in (found.last_error or "")


class _OneFileStore(FolderObjectStore):
    """Has `file` under every key, and keeps nothing that is put."""

    def __init__(self, root: Path, file: bytes) -> None:
        super().__init__(root)
        self._file = file

    def read_range(self, *_: object) -> bytes:
        return self._file

    def put(self, *_: object) -> None: ...


def _beside_the_message(bench: Bench, count: int) -> int:
    """Bytes at the peak of an opening, without its message."""
    file = new_instance(PixelData=None)
    one = stored_instance(file)
    rows = (replace(one, sop_instance_uid=f"1.2.{number}") for number in range(count))
    added = _attach(bench, bench.add(), rows, count)
    published = SlowBroker(lambda: True)
    handler = bench.handler(published, instances=_OneFileStore(bench.folder / "payloads", file))
    tracemalloc.start()
    try:
        handler.open_workflow_request(added.payload_id)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (message,) = published.messages
    return peak - len(message.body)


def test_ten_times_the_instances_take_hardly_more_memory_beside_the_message(
    bench: Bench,
) -> None:
    few = _beside_the_message(bench, 150)

    many = _beside_the_message(bench, 1500)

    assert many - few < 1350 * 200
