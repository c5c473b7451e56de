"""The least that a service of the same parts can do, so what Flask, gunicorn and the stores cost.

Both read a body whole, look for the boundaries, check the structure of each part as Stowgate does,
and put it and then a record. There is nothing in front: no limits, no deadlines, no turns, no
second thought for a sender that misbehaves.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from io import BytesIO
from uuid import uuid4

from flask import Flask, Response, request
from loads import END, PART_HEAD
from prometheus_client import CollectorRegistry
from subjects import RAW_THREADS

from shared.adapters.s3.store import MinioObjectStore
from shared.dicom.identity import identify
from shared.dicom.structure import check_structure
from shared.events import of_new_record
from shared.ids import PayloadIds
from shared.instances import StoredInstance
from shared.ports import ObjectStore
from shared.record_store import Records
from shared.records import FIRST_DELIVERY, IngestRecord, Lease, first_lease
from shared.runtime.backends import open_backends
from shared.runtime.logs import configure_logs
from shared.settings.loader import load
from shared.time import utc_now
from worker.main import compose
from worker.settings import WorkerSettings


def make_app(url: str, access_key: str, secret_key: str, bucket: str) -> Flask:
    """On the store and records of `stowgate api`. Nothing is announced."""
    store = MinioObjectStore.connect(
        url,
        access_key=access_key,
        secret_key=secret_key,
        region="us-east-1",
        bucket=bucket,
        threads=64,
    )
    return _app(PayloadIds(bucket), store, Records(store).add)


def make_embedded_app() -> Flask:
    """On the stores, records and worker of `stowgate run`, by its settings."""
    settings = load(WorkerSettings)
    configure_logs(settings.log)
    backends = open_backends(
        settings, store_threads=RAW_THREADS + settings.openings, openings=settings.openings
    )
    backends.prepare()
    compose(settings, backends, CollectorRegistry()).start()
    records = Records(backends.state)

    def add(record: IngestRecord) -> None:
        backends.announce(of_new_record(records.add(record)))

    return _app(PayloadIds(settings.state_bucket), backends.instances, add)


def _app(
    payload_ids: PayloadIds, store: ObjectStore, add: Callable[[IngestRecord], object]
) -> Flask:
    app = Flask(__name__)
    threads = ThreadPoolExecutor(RAW_THREADS)

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
        store.put(key, data, len(part), "application/dicom", instance.sha256)
        return instance

    @app.post("/dicomweb/studies")
    def take() -> Response:
        now = utc_now()
        payload_id = payload_ids.mint(now)
        parts = request.get_data().removesuffix(END).split(PART_HEAD)[1:]
        each = threads.map if len(parts) > 1 else map
        stored: tuple[StoredInstance, ...] = tuple(each(partial(put_checked, payload_id), parts))
        add(
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
        return Response(headers={"X-Payload-ID": payload_id})

    @app.get("/ready")
    def ready() -> Response:
        return Response()

    return app
