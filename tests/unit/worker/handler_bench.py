"""A handler over a real folder store, and doubles of its publisher."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

from instances import uid
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, inline, record

from shared.adapters.folder.publisher import FolderEventPublisher
from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.queues import Published
from shared.dicom.structure import check_structure
from shared.instances import StoredInstance
from shared.ports import EventPublisher, Message, ObjectStore, Publication
from shared.record_store import Records
from shared.records import IngestRecord
from shared.runtime.metrics import WorkerMetrics
from shared.runtime.tracing import NO_SPANS, Tracer
from worker.handler import Handler
from worker.workflow_manager import WorkflowManager

LEASE = timedelta(seconds=60)


def stored_instance(file: bytes) -> StoredInstance:
    return StoredInstance(
        sop_class_uid=uid(file, "SOPClassUID"),
        sop_instance_uid=uid(file, "SOPInstanceUID"),
        study_uid=uid(file, "StudyInstanceUID"),
        series_uid=uid(file, "SeriesInstanceUID"),
        size_bytes=len(file),
        sha256="",
        left_out=check_structure(file).left_out,
    )


@dataclass
class Bench:
    """A handler, what it works on, and a clock that stands until it is moved."""

    folder: Path
    now: datetime = RECEIVED_AT + timedelta(seconds=1)

    def __post_init__(self) -> None:
        self.instances = FolderObjectStore(self.folder / "payloads")
        self.state = FolderObjectStore(self.folder / "state")
        self.instances.prepare()
        self.state.prepare()
        self.records = Records(self.state)
        self.requests = FolderEventPublisher(self.folder / "requests")
        self.missing: list[str] = []
        self._writers: list[ThreadPoolExecutor] = []

    def handler(
        self,
        publisher: EventPublisher | None = None,
        owner: str = "me",
        *,
        instances: ObjectStore | None = None,
        state: ObjectStore | None = None,
        tracer: Tracer = NO_SPANS,
    ) -> Handler:
        """A handler over the bench's stores, or over those given, which pass on to them."""
        self._writers.append(ThreadPoolExecutor(2))
        return Handler(
            records=Records(state or self.state),
            record_missing=lambda payload_id, _: self.missing.append(payload_id),
            instances=instances or self.instances,
            publisher=publisher or self.requests,
            workflow_manager=WorkflowManager("monaideploy", "md.workflow.request", "payloads"),
            sidecar_writers=self._writers[-1],
            owner=owner,
            lease=LEASE,
            metrics=WorkerMetrics(CollectorRegistry()),
            clock=lambda: self.now,
            tracer=tracer,
        )

    def finish_writing(self) -> None:
        """Wait for sidecars that an attempt was writing when it failed."""
        for writers in self._writers:
            writers.shutdown()

    def add(self, *files: bytes, **changes: Any) -> IngestRecord:
        added = replace(record(*map(stored_instance, files)), **changes)
        for file, instance in zip(files, inline(added), strict=True):
            key = f"{added.payload_id}/{instance.path}"
            self.instances.put(key, BytesIO(file), len(file), "application/dicom")
        self.records.add(added)
        return added

    def found(self, added: IngestRecord) -> IngestRecord:
        held = self.records.find(added.payload_id)
        assert held is not None
        return held.record

    def opened_requests(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "requests").glob("*.json"))


@dataclass
class Observed:
    """Passes messages on, and calls `look` before each."""

    publisher: EventPublisher
    look: Callable[[Message], None]

    def start(self) -> None:
        self.publisher.start()

    def begin(self, message: Message) -> Publication:
        self.look(message)
        return self.publisher.begin(message)

    def ping(self) -> None:
        self.publisher.ping()

    def close(self) -> None:
        self.publisher.close()


class SlowBroker(Published):
    """Confirms what was published once `look` has returned true, which each wait calls."""

    def __init__(self, look: Callable[[], object]) -> None:
        self.published: list[str] = []
        self.messages: list[Message] = []
        self._look = look

    def start(self) -> None: ...

    def begin(self, message: Message) -> Publication:
        self.published.append(message.message_id)
        self.messages.append(message)
        return self

    def wait(self, seconds: float) -> bool:
        assert seconds <= 1
        return bool(self._look())

    def ping(self) -> None: ...

    def close(self) -> None: ...
