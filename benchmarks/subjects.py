"""What is measured, each as its operator would start it, on free ports and in temporary folders."""

import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit
from uuid import uuid4

import click
import pika
import requests
import urllib3
from engines import Engines, NotToBeHad, ObjectStoreEndpoint, lasting_port, program
from loads import Answered, Load, Template, new_uid, send, template
from minio import Minio
from processes import engine_process_ids
from service import Service, running, wait_for, with_children

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

RAW_THREADS = 4

# What Stowgate's have for a CT.
_RAW_RECORD_BYTES = 300
_RAW_SIDECAR_BYTES = 6000

_QUIET = {"STOWGATE_RELAY_SECONDS": "5", "STOWGATE_LOG": "json"}


@dataclass(frozen=True)
class Subject:
    """`opened` waits for the workflow requests of these payloads, and returns when each came out,
    by `time.time`; it is None where none is opened."""

    name: str
    send: Callable[[Load], tuple[float, list[Answered]]]
    process_ids: Callable[[], Mapping[str, Sequence[int]]]
    opened: Callable[[Sequence[str]], dict[str, float]] | None = None


@contextmanager
def engines() -> Iterator[tuple[ObjectStoreEndpoint, str]]:
    """An object store, and the URL of a broker."""
    with closing(Engines(lambda line: click.echo(line, err=True), {})) as started:
        started.start(["object store", "broker"])
        endpoint, broker_url = started.address("object store"), started.address("broker")
        assert isinstance(endpoint, ObjectStoreEndpoint)
        assert isinstance(broker_url, str)
        yield endpoint, broker_url


class _Pieces(io.RawIOBase):
    """An instance's pieces as the stream that minio-py reads."""

    def __init__(self, pattern: Template) -> None:
        self._pieces = pattern.instance()
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer)
        if not self._piece:
            self._piece = memoryview(next(self._pieces, b""))
        size = min(len(target), len(self._piece))
        target[:size] = self._piece[:size]
        self._piece = self._piece[size:]
        return size


@contextmanager
def raw_puts(endpoint: ObjectStoreEndpoint) -> Iterator[Subject]:
    """The limit: the same bytes into the same MinIO by minio-py."""
    with _raw_bucket(endpoint) as bucket:

        def put_alone(pattern: Template) -> Answered:
            at, began = time.time(), time.perf_counter()
            bucket.put_instance(new_uid(), pattern)
            return Answered(at, time.perf_counter() - began, None, 0)

        def send_raw(load: Load) -> tuple[float, list[Answered]]:
            at_once = 1 if load.senders * load.instances == 1 else RAW_THREADS
            with ThreadPoolExecutor(at_once) as threads:
                began = time.perf_counter()
                patterns = [template(load.pixel_bytes)] * load.all_instances
                answers = list(threads.map(put_alone, patterns))
            return time.perf_counter() - began, answers

        yield Subject("raw PUT", send_raw, engine_process_ids)


@contextmanager
def raw_payloads(endpoint: ObjectStoreEndpoint) -> Iterator[Subject]:
    """The least that a payload takes: its instances under the keys that the Workflow Manager wants,
    and then a record of them, as nothing may be acknowledged before both are there.

    And the least that opening it takes: a read of each instance's beginning, its sidecar, and the
    record once more. Nothing is computed for any of them.
    """
    received: dict[str, tuple[Template, list[str]]] = {}
    with _raw_bucket(endpoint) as bucket, ThreadPoolExecutor(RAW_THREADS) as threads:

        def post(load: Load) -> Answered:
            at, began = time.time(), time.perf_counter()
            payload, pattern = str(uuid4()), template(load.pixel_bytes)
            series = f"{payload}/dcm/{new_uid()}/{new_uid()}"
            keys = [f"{series}/{new_uid()}.dcm" for _ in range(load.instances)]
            of_each(lambda key: bucket.put_instance(key, pattern), keys)
            bucket.put(f"pending/{payload}.json", _raw_record(keys))
            received[payload] = pattern, keys
            return Answered(at, time.perf_counter() - began, payload, 0)

        def open_one(payload: str) -> float:
            pattern, keys = received.pop(payload)
            beginning = pattern.size_bytes - pattern.pixel_bytes

            def write_sidecar(key: str) -> None:
                bucket.read(key, beginning)
                bucket.put(f"{key}.json", bytes(_RAW_SIDECAR_BYTES))

            of_each(write_sidecar, keys)
            bucket.put(f"opened/{payload}.json", _raw_record(keys))
            return time.time()

        def of_each(do: Callable[[str], None], keys: Sequence[str]) -> None:
            if len(keys) == 1:
                do(keys[0])
            else:
                list(threads.map(do, keys))

        def send_payloads(load: Load) -> tuple[float, list[Answered]]:
            with ThreadPoolExecutor(load.senders) as senders:
                began = time.perf_counter()
                answers = list(senders.map(post, [load] * load.all_posts))
            return time.perf_counter() - began, answers

        yield Subject(
            "raw payload",
            send_payloads,
            engine_process_ids,
            lambda ids: {i: open_one(i) for i in ids},
        )


def _raw_record(keys: Sequence[str]) -> bytes:
    return bytes(_RAW_RECORD_BYTES * len(keys))


@contextmanager
def raw_service(endpoint: ObjectStoreEndpoint, broker_url: str) -> Iterator[Subject]:
    """The least that two services can do on Flask, gunicorn, pika and our stores; see there."""
    module = Path(__file__).with_name("raw_service.py")
    with (
        _exchanges(endpoint, broker_url) as (settings, workflow_manager),
        _raw_api("make_app()", settings) as (url, process_ids),
        _raw_process([sys.executable, str(module)], settings) as worker,
    ):
        yield Subject(
            "raw service",
            lambda load: send(f"{url}/dicomweb/studies", load),
            lambda: {"api": process_ids(), "worker": [worker.pid], **engine_process_ids()},
            workflow_manager.times,
        )


@contextmanager
def raw_embedded() -> Iterator[Subject]:
    """The least that one service can do on Flask, gunicorn and a folder; see there."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _raw_api("make_embedded_app()", {"STOWGATE_DATA": folder}) as (url, process_ids),
    ):
        yield Subject(
            "raw embedded",
            lambda load: send(f"{url}/dicomweb/studies", load),
            lambda: {"service": process_ids()},
            lambda payload_ids: wait_for(partial(_written, Path(folder), payload_ids), 600),
        )


@contextmanager
def _raw_api(
    app: str, settings: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], list[int]]]]:
    port = lasting_port()
    command = [
        *(sys.executable, "-m", "gunicorn", f"raw_service:{app}"),
        *("--bind", f"127.0.0.1:{port}", "--keep-alive", "60"),
        *("--worker-class", "gthread", "--threads", "40", "--no-control-socket"),
        *("--pythonpath", str(Path(__file__).parent)),
    ]
    with _raw_process(command, settings) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: _answers(f"{url}/ready"))
        yield url, lambda: with_children(process.pid)


@contextmanager
def _raw_process(
    command: Sequence[str], settings: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **_QUIET, **settings}
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


class _RawBucket:
    """What minio-py does by itself, in one bucket."""

    def __init__(self, store: Minio, name: str) -> None:
        self._store = store
        self._name = name

    def put_instance(self, key: str, pattern: Template) -> None:
        small = pattern.size_bytes < 1 << 24
        data = (
            io.BytesIO(b"".join(pattern.instance()))
            if small
            else io.BufferedReader(_Pieces(pattern), 1 << 20)
        )
        self._put(key, data, pattern.size_bytes)

    def put(self, key: str, data: bytes) -> None:
        self._put(key, io.BytesIO(data), len(data))

    def read(self, key: str, size_bytes: int) -> None:
        with closing(self._store.get_object(self._name, key, length=size_bytes)) as answer:
            answer.read()
            answer.release_conn()

    def _put(self, key: str, data: BinaryIO, size_bytes: int) -> None:
        self._store.put_object(
            bucket_name=self._name,
            object_name=key,
            data=data,
            length=size_bytes,
            num_parallel_uploads=RAW_THREADS,
        )


@contextmanager
def _raw_bucket(endpoint: ObjectStoreEndpoint) -> Iterator[_RawBucket]:
    with _bucket(endpoint) as name:
        yield _RawBucket(_client(endpoint), name)


@contextmanager
def _bucket(endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    """A new bucket's name; it is removed in the end."""
    store = _client(endpoint)
    bucket = f"stowgate-bench-{secrets.token_hex(6)}"
    store.make_bucket(bucket_name=bucket)
    try:
        yield bucket
    finally:
        _remove_buckets(store, bucket)


def _client(endpoint: ObjectStoreEndpoint) -> Minio:
    url = urlsplit(endpoint.url)
    return Minio(
        endpoint=url.netloc,
        access_key=endpoint.access_key,
        secret_key=endpoint.secret_key,
        secure=url.scheme == "https",
        region="us-east-1",
        http_client=urllib3.PoolManager(maxsize=64),
    )


def _remove_buckets(client: Minio, prefix: str) -> None:
    for bucket in client.list_buckets():
        if bucket.name.startswith(prefix):
            for found in client.list_objects(bucket_name=bucket.name, recursive=True):
                client.remove_object(bucket_name=bucket.name, object_name=found.object_name or "")
            client.remove_bucket(bucket_name=bucket.name)


@contextmanager
def orthanc() -> Iterator[Subject]:
    """Raises `NotToBeHad` where Debian's `orthanc` and `orthanc-dicomweb` are not installed."""
    server = program("Orthanc")
    plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    if not plugin.exists():
        raise NotToBeHad("orthanc-dicomweb is not installed")
    with tempfile.TemporaryDirectory() as folder:
        port = lasting_port()
        config = Path(folder, "orthanc.json")
        config.write_text(
            json.dumps(
                {
                    "StorageDirectory": f"{folder}/storage",
                    "IndexDirectory": f"{folder}/index",
                    "Plugins": [str(plugin)],
                    "HttpPort": port,
                    "DicomServerEnabled": False,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "KeepAlive": True,
                    "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
                }
            )
        )
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen([server, config], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: _answers(f"{url}/system"))
            yield Subject(
                "Orthanc",
                lambda load: send(f"{url}/dicom-web/studies", load),
                lambda: {"Orthanc": [process.pid]},
            )
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except (requests.ConnectionError, requests.Timeout):
        return False


@contextmanager
def embedded(data: Path | None = None) -> Iterator[Subject]:
    """`stowgate run`: a folder, and events in memory."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _quiet("run", data or Path(folder), {}) as service,
    ):
        yield Subject(
            "embedded",
            lambda load: send(f"{service.url}/dicomweb/studies", load),
            lambda: {"embedded": service.process_ids()},
            lambda payload_ids: wait_for(partial(_written, service.data, payload_ids), 600),
        )


def _written(data: Path, payload_ids: Sequence[str]) -> dict[str, float] | None:
    """The workflow requests of all these payloads."""
    files = {i: data / "workflow-requests" / f"{i}.json" for i in payload_ids}
    try:
        return {payload_id: file.stat().st_mtime for payload_id, file in files.items()}
    except FileNotFoundError:
        return None


@contextmanager
def distributed(
    endpoint: ObjectStoreEndpoint,
    broker_url: str,
    *,
    api_processes: int = 1,
) -> Iterator[Subject]:
    """`stowgate api` and `stowgate worker` on MinIO and RabbitMQ."""
    with ExitStack() as stack:
        site = stack.enter_context(_site(endpoint, broker_url, api_processes))
        site.start_worker()
        yield Subject(
            f"distributed, {api_processes} API process{'es' * (api_processes > 1)}",
            lambda load: send(f"{site.api.url}/dicomweb/studies", load),
            lambda: {
                "api": site.api.process_ids(),
                "worker": site.worker_process_ids(),
                **engine_process_ids(),
            },
            site.workflow_manager.times,
        )


def backlog(endpoint: ObjectStoreEndpoint, broker_url: str, workers: int, load: Load) -> float:
    """How long that many workers take to open what was received while there was none, in seconds
    from when all of them are ready."""
    with _site(endpoint, broker_url, 1) as site:
        _, answers = send(f"{site.api.url}/dicomweb/studies", load)
        payload_ids = [answer.payload_id for answer in answers if answer.payload_id]
        began_at = time.time()
        with ThreadPoolExecutor(workers) as threads:
            for started in [threads.submit(site.start_worker) for _ in range(workers)]:
                started.result()
        times = site.workflow_manager.times(payload_ids)
        first, last = min(times.values()), max(times.values())
        assert first > began_at
        return last - first


@dataclass
class _Site:
    """An API on engines, a queue for its workflow requests, and workers once they are started."""

    api: Service
    workflow_manager: "_WorkflowManager"
    start: Callable[[], Service]
    workers: list[Service]

    def start_worker(self) -> None:
        self.workers.append(self.start())

    def worker_process_ids(self) -> list[int]:
        return [pid for worker in self.workers for pid in worker.process_ids()]


@contextmanager
def _exchanges(
    endpoint: ObjectStoreEndpoint, broker_url: str
) -> Iterator[tuple[dict[str, str], "_WorkflowManager"]]:
    """The settings of a site with buckets, exchanges and queues of its own, which are removed."""
    name = f"stowgate-bench-{secrets.token_hex(6)}"
    _declare(broker_url, name)
    settings = {
        "STOWGATE_OBJECT_STORE": endpoint.url,
        "STOWGATE_OBJECT_STORE_ACCESS_KEY": endpoint.access_key,
        "STOWGATE_OBJECT_STORE_SECRET_KEY": endpoint.secret_key,
        "STOWGATE_BROKER": broker_url,
        "STOWGATE_BUCKET": name,
        "STOWGATE_STATE_BUCKET": f"{name}-state",
        "STOWGATE_EVENT_EXCHANGE": f"{name}-events",
        "STOWGATE_WORKFLOW_MANAGER_EXCHANGE": name,
        "STOWGATE_WORKFLOW_MANAGER_QUEUE": name,
    }
    try:
        with _WorkflowManager(broker_url, name) as workflow_manager:
            yield settings, workflow_manager
    finally:
        _remove(endpoint, broker_url, name)


@contextmanager
def _site(endpoint: ObjectStoreEndpoint, broker_url: str, api_processes: int) -> Iterator[_Site]:
    with ExitStack() as stack:
        settings, workflow_manager = stack.enter_context(_exchanges(endpoint, broker_url))
        settings["STOWGATE_API_PROCESSES"] = str(api_processes)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        api = stack.enter_context(_quiet("api", folder, settings))
        folders = (folder / f"worker-{number}" for number in count())
        yield _Site(
            api,
            workflow_manager,
            lambda: stack.enter_context(_quiet("worker", next(folders), settings)),
            [],
        )


class _WorkflowManager:
    """Takes workflow requests as they come, and notes when."""

    def __init__(self, broker_url: str, queue: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(broker_url))
        self._times: dict[str, float] = {}
        channel = self._connection.channel()
        channel.basic_consume(queue, self._note, auto_ack=True)
        self._consuming = threading.Thread(target=channel.start_consuming)
        self._stop = partial(
            self._connection.add_callback_threadsafe, lambda: channel.stop_consuming()
        )

    def _note(self, _channel: object, _method: object, _properties: object, body: bytes) -> None:
        self._times[json.loads(body)["payload_id"]] = time.time()

    def times(self, payload_ids: Sequence[str]) -> dict[str, float]:
        wait_for(lambda: all(i in self._times for i in payload_ids), 600)
        return {payload_id: self._times[payload_id] for payload_id in payload_ids}

    def __enter__(self) -> "_WorkflowManager":
        self._consuming.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._consuming.join()
        self._connection.close()


@contextmanager
def _quiet(command: str, folder: Path, settings: Mapping[str, str]) -> Iterator[Service]:
    with running(command, folder, **{**_QUIET, **settings}) as service:
        wait_for(lambda: _answers(f"{service.url}/health/ready"))
        yield service


def _declare(broker_url: str, name: str) -> None:
    """The Workflow Manager's exchange and queue, as it declares them."""
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        channel.exchange_declare(name, "topic", durable=True)
        channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_bind(name, name, "md.workflow.request")


def _remove(endpoint: ObjectStoreEndpoint, broker_url: str, name: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        events = f"{name}-events"
        ours = [f"{events}.{queue}" for queue in ("instances-stored", "dead-letter", "refusals")]
        for queue in (name, *ours):
            channel.queue_delete(queue)
        for exchange in (name, events, f"{events}.dead-letter"):
            channel.exchange_delete(exchange)
    _remove_buckets(_client(endpoint), name)
