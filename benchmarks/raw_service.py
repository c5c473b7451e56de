"""The least that a service of the same parts can do: what Flask, gunicorn and minio-py cost alone.

It reads a body whole, looks at nothing in it but the boundaries, and puts each part and then a
record, as `raw payload` does. Nothing is checked, hashed for the record, or announced.
"""

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from uuid import uuid4

from engines import ObjectStoreEndpoint
from flask import Flask, Response, request
from loads import PART_HEAD
from subjects import RAW_THREADS, client, raw_put


def make_app(url: str, access_key: str, secret_key: str, bucket: str) -> Flask:
    store = client(ObjectStoreEndpoint(url, access_key, secret_key))
    threads = ThreadPoolExecutor(RAW_THREADS)
    app = Flask(__name__)

    def put(key: str, data: bytes) -> None:
        raw_put(store, bucket, key, BytesIO(data), len(data))

    @app.post("/dicomweb/studies")
    def take() -> Response:
        payload = uuid4()
        series = f"{payload}/dcm/{uuid4()}/{uuid4()}"

        def put_instance(part: bytes) -> None:
            put(f"{series}/{uuid4()}.dcm", part)

        parts = request.get_data().split(PART_HEAD)[1:]
        put_all = threads.map if len(parts) > 1 else map
        for _ in put_all(put_instance, parts):
            pass
        put(f"pending/{payload}.json", bytes(300 * len(parts)))
        return Response(headers={"X-Payload-ID": str(payload)})

    @app.get("/ready")
    def ready() -> Response:
        return Response()

    return app
