"""The least that API and worker can do with the same parts, so what Flask, gunicorn, pika, the
stores and the broker cost.

The API reads a body whole, looks for the boundaries, checks the structure of each part as Stowgate
does, puts it and then a record, and announces that. The worker writes the sidecars, publishes the
request and writes the opened record. There is nothing around: no limits, no deadlines, no turns, no
lease, no second attempt, no removal, no metrics, no log.
"""

import hashlib
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from io import BytesIO
from threading import Event
from uuid import uuid4

from flask import Flask, Response, request
from loads import END, PART_HEAD
from subjects import RAW_THREADS

from shared.dicom.identity import identify
from shared.dicom.structure import check_structure
from shared.events import decode, of_new_record
from shared.ids import PayloadIds
from shared.instances import StoredInstance
from shared.ports import ReceivedMessage
from shared.record_store import Records
from shared.records import FIRST_DELIVERY, IngestRecord, Lease, State, first_lease
from shared.runtime.backends import Backends, open_backends
from shared.runtime.logs import configure_logs
from shared.settings.loader import load
from shared.time import utc_now
from worker.routing import resolve
from worker.settings import WorkerSettings
from worker.sidecars import Sidecars
from worker.workflow_manager import WorkflowManager

_STORE_THREADS = 64
_CONFIRM_SECONDS = 30


def make_app() -> Flask:
    """`open_requests` runs beside it in a process of its own, with the same settings."""
    settings, backends = _prepared()
    return _app(settings, backends)


def make_embedded_app() -> Flask:
    """Requests are opened in the same process, as by `stowgate run`."""
    settings, backends = _prepared()
    _open_requests(settings, backends)
    return _app(settings, backends)


def open_requests() -> None:
    """Open requests until the process is terminated."""
    _open_requests(*_prepared())
    signal.pause()


def _prepared() -> tuple[WorkerSettings, Backends]:
    settings = load(WorkerSettings)
    configure_logs(settings.log)
    backends = open_backends(settings, store_threads=_STORE_THREADS, openings=settings.openings)
    backends.prepare()
    return settings, backends


def _open_requests(settings: WorkerSettings, backends: Backends) -> None:
    records = Records(backends.state, clean_up=lambda _: None)
    sidecars = Sidecars(backends.instances, ThreadPoolExecutor(RAW_THREADS), Event())
    workflow_manager = WorkflowManager(
        exchange=settings.workflow_manager_exchange,
        routing_key=settings.workflow_manager_routing_key,
        bucket=settings.bucket,
    )

    def handle(message: ReceivedMessage) -> None:
        event = decode(message.body)
        versioned = event.new_record or records.find(event.payload_id)
        assert versioned is not None
        record = versioned.record
        sidecars.write(
            record.payload_id,
            records.instances(record),
            record.file_count,
            lambda: None,
            again=False,
        )
        request = workflow_manager.request(record, resolve(record))
        request_message = workflow_manager.message(record, request, records.instances(record))
        if not backends.requests.begin(request_message).wait(_CONFIRM_SECONDS):
            raise TimeoutError
        records.settle(versioned, State.OPENED, workflow_request=request)

    backends.consumer.start(handle)


def _app(settings: WorkerSettings, backends: Backends) -> Flask:
    app = Flask(__name__)
    threads = ThreadPoolExecutor(RAW_THREADS)
    payload_ids, records = PayloadIds(settings.state_bucket), Records(backends.state)

    def put_checked(payload_id: str, part: bytes) -> StoredInstance:
        structure = check_structure(part)
        identity = identify(structure)
        instance = StoredInstance(
            identity.sop_class_uid,
            identity.sop_instance_uid,
            identity.study_uid,
            identity.series_uid,
            len(part),
            hashlib.sha256(part).hexdigest(),
            structure.left_out,
        )
        key, data = f"{payload_id}/{instance.path}", BytesIO(part)
        backends.instances.put(key, data, len(part), "application/dicom", instance.sha256)
        return instance

    @app.post("/dicomweb/studies")
    def take() -> Response:
        now = utc_now()
        payload_id = payload_ids.mint(now)
        parts = request.get_data().removesuffix(END).split(PART_HEAD)[1:]
        each = threads.map if len(parts) > 1 else map
        stored: tuple[StoredInstance, ...] = tuple(each(partial(put_checked, payload_id), parts))
        added = records.add(
            IngestRecord(
                payload_id=payload_id,
                correlation_id=str(uuid4()),
                received_at=now,
                source="127.0.0.1",
                destination="default",
                workflow=None,
                vae_workflows=None,
                file_count=len(stored),
                instances=stored,
                due_at=now,
                lease=Lease(FIRST_DELIVERY, now + first_lease(timedelta(seconds=60))),
            )
        )
        # As in Stowgate, the answer does not wait for the broker.
        backends.announce(of_new_record(added))
        return Response(headers={"X-Payload-ID": payload_id})

    @app.get("/ready")
    def ready() -> Response:
        return Response()

    return app


if __name__ == "__main__":
    open_requests()
