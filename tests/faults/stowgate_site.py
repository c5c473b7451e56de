"""One Stowgate on real engines, apart from others by its names, and the books of its posts."""

import hashlib
import json
import os
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pika
import requests
from engines import ObjectStoreEndpoint, object_store_client
from instances import multipart, new_instance, uid
from ledger import Attempt, Delivery, Post
from minio.deleteobjects import DeleteObject
from minio.error import S3Error
from pika.adapters.blocking_connection import BlockingChannel
from proxy import Proxy
from senders import _stored as stored_uids
from service import Service, running, wait_for
from workflow_manager_double import declare, violations

from shared.adapters.s3.store import MinioObjectStore
from shared.adapters.s3.verified_store import remember
from shared.errors import StoreUnavailable

ROUTING_KEY = "md.workflow.request"

# Class and method numbers (AMQP 0-9-1, 1.8.3), and the reserved short of basic.publish.
_BASIC_PUBLISH = b"\x00\x3c\x00\x28\x00\x00"
BASIC_ACK = re.escape(b"\x00\x3c\x00\x50")


def publish_to(exchange: str) -> bytes:
    """A pattern for a basic.publish to that exchange."""
    return re.escape(_BASIC_PUBLISH + bytes([len(exchange)]) + exchange.encode())


class Bucket(Protocol):
    def listing(self, prefix: str = "") -> list[str]: ...
    def get(self, key: str) -> bytes | None: ...


@dataclass(frozen=True)
class S3Bucket:
    endpoint: ObjectStoreEndpoint
    name: str

    def listing(self, prefix: str = "") -> list[str]:
        found = object_store_client(self.endpoint).list_objects(
            bucket_name=self.name, prefix=prefix, recursive=True
        )
        try:
            return [o.object_name for o in found if o.object_name]
        except S3Error as error:
            if error.code == "NoSuchBucket":
                return []
            raise

    def get(self, key: str) -> bytes | None:
        try:
            answer = object_store_client(self.endpoint).get_object(
                bucket_name=self.name, object_name=key
            )
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchBucket"):
                return None
            raise
        with answer:
            return answer.read()

    def put(self, key: str, data: bytes) -> None:
        object_store_client(self.endpoint).put_object(
            bucket_name=self.name, object_name=key, data=BytesIO(data), length=len(data)
        )

    def delete(self, key: str) -> None:
        object_store_client(self.endpoint).remove_object(bucket_name=self.name, object_name=key)

    def remove(self) -> None:
        client = object_store_client(self.endpoint)
        doomed = [DeleteObject(key) for key in self.listing()]
        assert not list(client.remove_objects(bucket_name=self.name, delete_object_list=doomed))
        if client.bucket_exists(bucket_name=self.name):
            client.remove_bucket(bucket_name=self.name)


@dataclass(frozen=True)
class FolderBucket:
    folder: Path

    def listing(self, prefix: str = "") -> list[str]:
        names = (p.relative_to(self.folder) for p in self.folder.rglob("*") if p.is_file())
        keys = (name.as_posix() for name in names if not name.parts[0].startswith("."))
        return [key for key in keys if key.startswith(prefix)]

    def get(self, key: str) -> bytes | None:
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None


@dataclass
class Node:
    """A running service, and the proxies by which it alone reaches the engines."""

    name: str
    service: Service
    store: Proxy
    broker: Proxy
    settings: Mapping[str, str]

    def kill(self) -> None:
        self.service.kill()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def ready(self) -> tuple[int, dict[str, Any]]:
        answer = self.service.get("/health/ready")
        return answer.status_code, answer.json()

    def sees_its_store(self) -> bool:
        dependencies = self.ready()[1]["dependencies"]
        return bool(dependencies and dependencies["object_store"]["status"] == "ready")

    def payload_ids(self, state: str) -> Iterator[str]:
        """The payloads in that state, newest first, over all pages."""
        cursor = ""
        while True:
            page = self.service.get(f"/payloads?state={state}&limit=150{cursor}").json()
            yield from (row["payload_id"] for row in page["payloads"])
            if page["next"] is None:
                return
            cursor = f"&cursor={page['next']}"

    def metric(self, name: str) -> float:
        for line in self.service.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"there is no metric {name}")

    def log(self) -> str:
        return self.service.log.read_text(errors="replace")

    def threads(self) -> int:
        """Of its process that serves."""
        status = Path(f"/proc/{self.service.process_ids()[-1]}/status").read_text()
        return int(status.partition("Threads:")[2].split()[0])

    def _signal(self, number: signal.Signals) -> None:
        if self.service.process.poll() is None:
            for process_id in self.service.process_ids():
                os.kill(process_id, number)


class Site:
    """Starts services, posts to them, and keeps the books for `reconciliation.reconcile`.

    Without an `endpoint` the store is a folder, `data`.
    """

    keeps_requests = False
    """Whether `Node.store.asked` has all that a service sent to the store."""

    def __init__(
        self,
        data: Path,
        broker_url: str,
        endpoint: ObjectStoreEndpoint | None = None,
        **settings: str,
    ) -> None:
        self.name = f"stowgate-test-{secrets.token_hex(6)}"
        self.events = f"{self.name}-events"
        self.event_queue = f"{self.events}.instances-stored"
        self.dead_letters = f"{self.events}.dead-letter"
        self.refusal_queue = f"{self.events}.refusals"
        self.dead_letter_exchange = f"{self.name}-dead-letter"
        self.broker_url = broker_url
        self.attempts: list[Attempt] = []
        self.deliveries: list[Delivery] = []
        self.payloads: Bucket
        self.state: Bucket
        self._endpoint = endpoint
        self._data = data
        self._stack = ExitStack()
        self._nodes: list[Node] = []
        bucket, state = self.name, f"{self.name}-state"
        self._settings = {
            "STOWGATE_BUCKET": bucket,
            "STOWGATE_STATE_BUCKET": state,
            "STOWGATE_EVENT_EXCHANGE": self.events,
            "STOWGATE_WORKFLOW_MANAGER_EXCHANGE": self.name,
            "STOWGATE_WORKFLOW_MANAGER_QUEUE": self.name,
            "STOWGATE_WORKFLOW_MANAGER_DEAD_LETTER_EXCHANGE": self.dead_letter_exchange,
            "STOWGATE_LEASE_SECONDS": "3",
            "STOWGATE_IDLE_SECONDS": "2",
            **settings,
        }
        if endpoint is None:
            self.payloads, self.state = FolderBucket(data / bucket), FolderBucket(data / state)
        else:
            self.payloads, self.state = S3Bucket(endpoint, bucket), S3Bucket(endpoint, state)
            self._settings |= {
                "STOWGATE_OBJECT_STORE_ACCESS_KEY": endpoint.access_key,
                "STOWGATE_OBJECT_STORE_SECRET_KEY": endpoint.secret_key,
            }

    def close(self) -> None:
        """Stop everything; what is on the engines stays, see `remove`."""
        self._stack.close()

    def remove_from_broker(self) -> None:
        with self.channel() as channel:
            for queue in (
                self.name,
                f"{self.name}-dead-letter",
                self.event_queue,
                self.dead_letters,
                self.refusal_queue,
            ):
                channel.queue_delete(queue)
            for exchange in (self.name, self.events, self.dead_letters, self.dead_letter_exchange):
                channel.exchange_delete(exchange)

    def remove(self) -> None:
        self.remove_from_broker()
        for bucket in (self.payloads, self.state):
            if isinstance(bucket, S3Bucket):
                bucket.remove()

    def api(self, **settings: str) -> Node:
        return self._start("api", settings)

    def worker(self, **settings: str) -> Node:
        return self._start("worker", settings)

    def run(self, **settings: str) -> Node:
        """API and worker in one process."""
        return self._start("run", settings)

    def pair(self, **settings: str) -> tuple[Node, Node]:
        """An API and a worker, started side by side, which have seen their store."""
        with ThreadPoolExecutor(2) as threads:
            api, worker = (threads.submit(start, **settings) for start in (self.api, self.worker))
        for node in (api.result(), worker.result()):
            wait_for(node.sees_its_store)
        return api.result(), worker.result()

    def _start(self, command: str, settings: dict[str, str]) -> Node:
        store_url = self._endpoint.url if self._endpoint else "http://127.0.0.1:1"
        store = self._stack.enter_context(Proxy(store_url, keeps_requests=self.keeps_requests))
        broker = self._stack.enter_context(Proxy(self.broker_url))
        given = {**self._settings, "STOWGATE_BROKER": broker.url, **settings}
        if self._endpoint is not None:
            given["STOWGATE_OBJECT_STORE"] = store.url
            self._mark_verified(self._endpoint, given["STOWGATE_OBJECT_STORE"])
        service = self._stack.enter_context(running(command, self._data, **given))
        node = Node(f"{command} {len(self._nodes) + 1}", service, store, broker, given)
        self._stack.callback(node.resume)
        self._nodes.append(node)
        return node

    def _mark_verified(self, endpoint: ObjectStoreEndpoint, url: str) -> None:
        """As if a service had started there before: a check for each start would take minutes."""
        state, instances = (
            MinioObjectStore.connect(
                url,
                access_key=endpoint.access_key,
                secret_key=endpoint.secret_key,
                region="us-east-1",
                bucket=self._settings[variable],
                threads=1,
            )
            for variable in ("STOWGATE_STATE_BUCKET", "STOWGATE_BUCKET")
        )
        with suppress(StoreUnavailable):  # where it is away, the service finds out for itself
            state.prepare()
            remember(state, [state.identify(), instances.identify()])

    def stop(self) -> None:
        """Let every service that runs end what it has in hand."""
        for node in self._nodes:
            if node.service.process.poll() is None:
                node.service.process.terminate()
        for node in self._nodes:
            node.service.stop()

    @contextmanager
    def channel(self) -> Iterator[BlockingChannel]:
        with pika.BlockingConnection(pika.URLParameters(self.broker_url)) as connection:
            channel = connection.channel()
            # A broker under load may drop what is unconfirmed when its connection closes.
            channel.confirm_delivery()
            yield channel

    def start_workflow_manager(self) -> None:
        """Its exchanges and queues, as it declares them."""
        with self.channel() as channel:
            declare(channel, self.name, ROUTING_KEY, self.name, self.dead_letter_exchange)

    def take_requests(self) -> list[Delivery]:
        """Every request that the Workflow Manager has received until now."""
        with self.channel() as channel:
            while (got := channel.basic_get(self.name, auto_ack=True))[0] is not None:
                method, properties, body = got
                request = json.loads(body)
                self.deliveries.append(
                    Delivery(
                        payload_id=request["payload_id"],
                        body=body,
                        request=request,
                        redelivered=method.redelivered,
                        at=time.time(),
                        violations=tuple(violations(vars(properties), body)),
                    )
                )
        return self.deliveries

    def waiting(self, queue: str) -> int:
        """How many messages are in that queue, untaken."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    def publish_event(self, body: bytes) -> None:
        with self.channel() as channel:
            channel.basic_publish(self.events, "instances-stored", body, mandatory=True)

    def records(self) -> dict[str, dict[str, Any]]:
        """The ingest records by their payload ids."""
        found = {}
        # One that settles is written to its new place before it leaves the old one.
        for place in ("pending/", "opened/", "failed/"):
            for key in self.state.listing(place):
                data = self.state.get(key)
                if data:  # empty for an upload that was given up
                    record = json.loads(data)
                    found[record["payload_id"]] = record
        return found

    def record(
        self, payload_id: str, until: Callable[[dict[str, Any]], object], seconds: float = 30.0
    ) -> dict[str, Any]:
        """The payload's record, once it is as `until` wants it."""

        def look() -> dict[str, Any] | None:
            record = self.records().get(payload_id)
            return record if record is not None and until(record) else None

        return wait_for(look, seconds, pause_seconds=0.1)

    def opened(self, payload_id: str) -> dict[str, Any]:
        """The payload's record, once its request is opened."""
        return self.record(payload_id, lambda record: record["state"] == "opened")

    def post(
        self,
        api: Node,
        instances: Sequence[bytes],
        *,
        beside: Sequence[bytes] = (),
        pieces: Iterable[bytes] | None = None,
        path: str = "/dicomweb/studies",
        key: str | None = None,
        timeout_seconds: float = 60.0,
    ) -> requests.Response:
        """Send these, and write the attempt down; raises what `requests` raises.

        `beside` are parts that must not be stored. `pieces` are sent instead of the body that
        would be, as a chunked one. `key` is an Idempotency-Key.
        """
        body, content_type = multipart(*instances, *beside)
        correlation_id, began = str(uuid4()), time.time()

        def book(**found: Any) -> None:
            post = _post(len(self.attempts) + 1, path, instances, key)
            self.attempts.append(
                Attempt(post, correlation_id, api.name, began, time.time(), **found)
            )

        try:
            answer = requests.post(
                api.service.url + path,
                data=body if pieces is None else pieces,
                headers={
                    "Content-Type": content_type,
                    "X-Correlation-ID": correlation_id,
                    **({} if key is None else {"Idempotency-Key": key}),
                },
                allow_redirects=False,
                timeout=timeout_seconds,
            )
        except requests.RequestException as error:
            book(error=type(error).__name__)
            raise
        book(
            status=answer.status_code,
            payload_id=answer.headers.get("X-Payload-ID"),
            stored=stored_uids(answer),
            answer_sha256=hashlib.sha256(answer.content).hexdigest(),
        )
        return answer


def _post(number: int, path: str, instances: Sequence[bytes], key: str | None) -> Post:
    return Post(
        number=number,
        path=path,
        study_uid=uid(instances[0], "StudyInstanceUID") if instances else "",
        series_uid=uid(instances[0], "SeriesInstanceUID") if instances else "",
        sha256={uid(i, "SOPInstanceUID"): hashlib.sha256(i).hexdigest() for i in instances},
        workflows=(),
        destination="default",
        key=key,
    )


def study(count: int = 2, pixel_data: bytes | None = None) -> list[bytes]:
    """New instances of one series."""
    given = {} if pixel_data is None else {"PixelData": pixel_data}
    return [new_instance("CT_small.dcm", **given) for _ in range(count)]
