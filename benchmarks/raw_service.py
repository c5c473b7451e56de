"""The least that a service of the same parts can do, so what Flask, gunicorn and the stores cost.

Both read a body whole, look for the boundaries and put each part and then a record. There is
nothing in front: no limits, no deadlines, no turns, no second thought for a sender that misbehaves.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TypeVar
from uuid import uuid4

from engines import ObjectStoreEndpoint
from flask import Flask, Response, request
from loads import END, PART_HEAD
from prometheus_client import CollectorRegistry
from subjects import RAW_THREADS, client, raw_put

from shared.config import load_settings
from shared.dicom.identity import identify
from shared.dicom.structure import check_structure
from shared.engines import open_engines
from shared.events import InstancesStored
from shared.ids import PayloadIds
from shared.logs import configure_logs
from shared.records import IngestRecord, Records, StoredInstance
from shared.time import utc_now
from worker.main import compose

T = TypeVar("T")


def make_app(url: str, access_key: str, secret_key: str, bucket: str) -> Flask:
    """On minio-py, as `raw payload` does it: nothing is checked, hashed for the record, or
    announced."""
    store = client(ObjectStoreEndpoint(url, access_key, secret_key))

    def put(key: str, data: bytes) -> None:
        raw_put(store, bucket, key, BytesIO(data), len(data))

    def take(put_all: Callable[[Callable[[bytes], None]], list[None]]) -> str:
        payload = uuid4()
        series = f"{payload}/dcm/{uuid4()}/{uuid4()}"
        stored = put_all(lambda part: put(f"{series}/{uuid4()}.dcm", part))
        put(f"pending/{payload}.json", bytes(300 * len(stored)))
        return str(payload)

    return _app(take)


def make_embedded_app() -> Flask:
    """On the stores, records, structure check and worker of `stowgate run`, by its settings."""
    settings = load_settings()
    configure_logs(settings.log)
    engines = open_engines(settings)
    engines.prepare()
    compose(settings, engines, CollectorRegistry()).start()
    records, payload_ids = Records(engines.state), PayloadIds(settings.state_bucket)

    def put(payload_id: str, part: bytes) -> StoredInstance:
        structure = check_structure(part)
        identity = identify(structure)
        instance = StoredInstance(
            identity.sop_class_uid,
            identity.sop_instance_uid,
            identity.study_uid,
            identity.series_uid,
            len(part),
            hashlib.sha256(part).hexdigest(),
            structure.bulk_ranges,
        )
        key, sha256 = f"{payload_id}/{instance.path}", instance.sha256
        engines.instances.put(key, BytesIO(part), len(part), "application/dicom", sha256)
        return instance

    def take(put_all: Callable[[Callable[[bytes], StoredInstance]], list[StoredInstance]]) -> str:
        now = utc_now()
        payload_id, correlation_id = payload_ids.mint(now), str(uuid4())
        records.add(
            IngestRecord(
                payload_id=payload_id,
                correlation_id=correlation_id,
                received_at=now,
                source="127.0.0.1",
                destination="default",
                workflow=None,
                vae_workflows=None,
                instances=tuple(put_all(lambda part: put(payload_id, part))),
                due_at=now,
            )
        )
        engines.announce(InstancesStored(payload_id, correlation_id))
        return payload_id

    return _app(take)


def _app(take: Callable[[Callable[[Callable[[bytes], T]], list[T]]], str]) -> Flask:
    """`take` is given what puts all parts of a body, and returns the payload's id."""
    app = Flask(__name__)
    threads = ThreadPoolExecutor(RAW_THREADS)

    def put_all(put: Callable[[bytes], T]) -> list[T]:
        parts = request.get_data().removesuffix(END).split(PART_HEAD)[1:]
        results: Iterator[T] = threads.map(put, parts) if len(parts) > 1 else map(put, parts)
        return list(results)

    @app.post("/dicomweb/studies")
    def store() -> Response:
        return Response(headers={"X-Payload-ID": take(put_all)})

    @app.get("/ready")
    def ready() -> Response:
        return Response()

    return app
