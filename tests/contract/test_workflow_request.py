"""The published workflow request, over every route rule and every choice of store and broker.

Each message is consumed from the Workflow Manager's queue, and validated by a strict
double of its validation.
"""

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pika
import pytest
import requests
from engines import ObjectStoreEndpoint, object_store_client
from instances import multipart, new_instance, one_series, real_file, uid
from minio.error import S3Error
from pika.adapters.blocking_connection import BlockingChannel
from service import Service, running, wait_for
from workflow_manager_double import violations, violations_in_store

from worker.workflow_manager import APP_ID

ROUTING_KEY = "md.workflow.request"


@dataclass(frozen=True)
class Published:
    properties: dict[str, Any]
    body: bytes

    @property
    def request(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass(frozen=True)
class Pair:
    """A running Stowgate, from the view of the Workflow Manager."""

    service: Service
    store: "FolderOfPayloads | BucketOfPayloads"
    workflow_requests: "FolderOfRequests | QueueOfRequests"

    def published(self, answer: requests.Response) -> Published:
        assert answer.status_code in (200, 202), answer.text
        payload_id = answer.headers["X-Payload-ID"]
        self.service.opened(payload_id)
        return self.workflow_requests.take(payload_id)


@dataclass(frozen=True)
class FolderOfPayloads:
    folder: Path

    @property
    def bucket(self) -> str:
        return self.folder.name

    def get(self, key: str) -> bytes | None:
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None


@dataclass(frozen=True)
class BucketOfPayloads:
    endpoint: ObjectStoreEndpoint
    bucket: str

    def get(self, key: str) -> bytes | None:
        try:
            response = object_store_client(self.endpoint).get_object(
                bucket_name=self.bucket, object_name=key
            )
        except S3Error as error:
            if error.code == "NoSuchKey":
                return None
            raise
        with response:
            return response.read()


@dataclass(frozen=True)
class FolderOfRequests:
    folder: Path

    def take(self, payload_id: str) -> Published:
        shown = json.loads((self.folder / f"{payload_id}.json").read_bytes())
        return Published(shown["properties"], json.dumps(shown["body"]).encode())


@dataclass
class QueueOfRequests:
    channel: BlockingChannel
    queue: str

    def take(self, payload_id: str) -> Published:
        def look() -> Published | None:
            method, properties, body = self.channel.basic_get(self.queue, auto_ack=True)
            if method is None:
                return None
            assert (method.exchange, method.routing_key) == (self.queue, ROUTING_KEY)
            return Published(vars(properties), body)

        published = wait_for(look, seconds=10)
        assert published.request["payload_id"] == payload_id
        return published


@contextmanager
def _workflow_manager_queue(
    broker_url: str, name: str, *, exchange_exists: bool = False
) -> Iterator[QueueOfRequests]:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    channel = connection.channel()
    channel.exchange_declare(name, "topic", durable=True, passive=exchange_exists)
    channel.exchange_declare(f"{name}-dead-letter", "topic", durable=True)
    channel.queue_declare(name, durable=True)
    channel.queue_bind(name, name, ROUTING_KEY)
    try:
        yield QueueOfRequests(channel, name)
    finally:
        events = f"{name}-events"
        ours = [f"{events}.{queue}" for queue in ("instances-stored", "dead-letter", "refusals")]
        for queue in (name, *ours):
            channel.queue_delete(queue)
        for exchange in (name, f"{name}-dead-letter", events, f"{events}.dead-letter"):
            channel.exchange_delete(exchange)
        connection.close()


@contextmanager
def _taking_all(broker_url: str, name: str, how: str) -> Iterator[Callable[[], int]]:
    """Yield the number of messages in another queue that is bound to the exchange."""
    queue = f"{name}-audit"
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        channel.exchange_declare(queue, "fanout")
        channel.queue_declare(queue)
        if how == "an audit queue":
            channel.exchange_declare(name, "topic", durable=True)
            channel.queue_bind(queue, name, "#")
        elif how == "an alternate exchange":
            channel.queue_bind(queue, queue)
            alternate = {"alternate-exchange": queue}
            channel.exchange_declare(name, "topic", durable=True, arguments=alternate)
        yield lambda: channel.queue_declare(queue, passive=True).method.message_count
        channel.queue_delete(queue)
        channel.exchange_delete(queue)


@contextmanager
def _buckets(endpoint: ObjectStoreEndpoint, name: str) -> Iterator[BucketOfPayloads]:
    try:
        yield BucketOfPayloads(endpoint, name)
    finally:
        client = object_store_client(endpoint)
        for bucket in (name, f"{name}-state"):
            for found in client.list_objects(bucket_name=bucket, recursive=True):
                client.remove_object(bucket_name=bucket, object_name=found.object_name or "")
            client.remove_bucket(bucket_name=bucket)


@pytest.fixture(
    scope="module",
    params=["folder and memory", "S3 and memory", "folder and AMQP", "S3 and AMQP"],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    store, broker = request.param.split(" and ")
    with _pair(request, tmp_path_factory.mktemp("pair"), store, broker) as found:
        yield found


@contextmanager
def _pair(request: pytest.FixtureRequest, data: Path, store: str, broker: str) -> Iterator[Pair]:
    name = f"stowgate-test-{secrets.token_hex(6)}"
    settings = {"STOWGATE_BUCKET": name, "STOWGATE_STATE_BUCKET": f"{name}-state"}
    payloads: FolderOfPayloads | BucketOfPayloads = FolderOfPayloads(data / name)
    workflow_requests: FolderOfRequests | QueueOfRequests = FolderOfRequests(
        data / "workflow-requests"
    )
    with ExitStack() as stack:
        if store == "S3":
            endpoint = request.getfixturevalue("object_store_endpoint")
            payloads = stack.enter_context(_buckets(endpoint, name))
            settings |= {
                "STOWGATE_OBJECT_STORE": endpoint.url,
                "STOWGATE_OBJECT_STORE_ACCESS_KEY": endpoint.access_key,
                "STOWGATE_OBJECT_STORE_SECRET_KEY": endpoint.secret_key,
            }
        if broker == "AMQP":
            broker_url = request.getfixturevalue("broker_url")
            workflow_requests = stack.enter_context(_workflow_manager_queue(broker_url, name))
            settings |= {
                "STOWGATE_BROKER": broker_url,
                "STOWGATE_EVENT_EXCHANGE": f"{name}-events",
                "STOWGATE_WORKFLOW_MANAGER_EXCHANGE": name,
                "STOWGATE_WORKFLOW_MANAGER_QUEUE": name,
                "STOWGATE_WORKFLOW_MANAGER_DEAD_LETTER_EXCHANGE": f"{name}-dead-letter",
            }
        service = stack.enter_context(running("run", data, **settings))
        yield Pair(service, payloads, workflow_requests)


def _create_vae(pair: Pair, workflows: list[str]) -> str:
    title = f"AE-{secrets.token_hex(4)}"
    answer = requests.post(
        f"{pair.service.url}/config/vae",
        json={"virtualAeTitle": title, "workflows": workflows},
        timeout=30,
    )
    assert answer.status_code == 201
    return title


@pytest.mark.parametrize(
    ("path", "vae_workflows", "rule", "workflows"),
    [
        ("/dicomweb/studies", None, "left-to-workflow-manager", []),
        ("/dicomweb/w-1/studies", None, "workflow-in-url", ["w-1"]),
        ("/dicomweb/vae/{vae}/studies", ["w-2", "w-3"], "workflows-of-vae", ["w-2", "w-3"]),
        ("/dicomweb/vae/{vae}/studies", [], "left-to-workflow-manager", []),
        ("/dicomweb/vae/{vae}/w-1/studies", ["w-2"], "workflow-in-url", ["w-1"]),
    ],
)
def test_a_request_names_the_stored_instances_and_the_workflows(
    pair: Pair, path: str, vae_workflows: list[str] | None, rule: str, workflows: list[str]
) -> None:
    vae = None if vae_workflows is None else _create_vae(pair, vae_workflows)
    instances = [new_instance(), new_instance("MR_small.dcm"), new_instance("rtplan.dcm")]
    correlation_id = str(uuid4())

    answer = pair.service.post(
        path.format(vae=vae), *multipart(*instances), **{"X-Correlation-ID": correlation_id}
    )

    published = pair.published(answer)
    assert violations(published.properties, published.body) == []
    payload_id = answer.headers["X-Payload-ID"]
    payload = pair.service.opened(payload_id)
    assert payload["route"] == rule
    request = published.request
    assert request == payload["workflow_request"]
    paths = [
        f"dcm/{uid(i, 'StudyInstanceUID')}/{uid(i, 'SeriesInstanceUID')}/"
        f"{uid(i, 'SOPInstanceUID')}.dcm"
        for i in instances
    ]
    assert list(request.items()) == [
        ("payload_id", payload_id),
        ("workflows", workflows),
        ("file_count", 3),
        ("correlation_id", correlation_id),
        ("bucket", pair.store.bucket),
        (
            "trigger",
            {
                "dataService": 2,
                "source": "127.0.0.1",
                "destination": vae or "default",
                "artifactType": 0,
            },
        ),
        ("data_origins", []),
        ("timestamp", payload["received_at"]),
        ("workflow_instance_id", None),
        ("task_id", None),
        ("payload", [{"path": p, "metadata": f"{p}.json"} for p in paths]),
    ]


def test_a_request_with_attached_instances_names_each(pair: Pair) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    body = multipart(*one_series(500))

    answer = pair.service.post("/dicomweb/studies", *body, **headers)

    published = pair.published(answer)
    assert violations(published.properties, published.body) == []
    paths = [entry["path"] for entry in published.request["payload"]]
    assert [path.rpartition("/")[2] for path in paths] == [
        f"2.25.{10**29 + number}.dcm" for number in range(500)
    ]
    payload = pair.service.opened(answer.headers["X-Payload-ID"])
    assert published.request == payload["workflow_request"]
    again = pair.service.post("/dicomweb/studies", *body, **headers)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.content == answer.content


def test_the_message_of_a_request_has_the_properties_of_the_contract(pair: Pair) -> None:
    correlation_id = str(uuid4())

    answer = pair.service.post(
        "/dicomweb/studies",
        new_instance(),
        "application/dicom",
        **{"X-Correlation-ID": correlation_id},
    )

    published = pair.published(answer)
    wanted = {
        "message_id": answer.headers["X-Payload-ID"],
        "app_id": APP_ID,
        "content_type": "application/json",
        "correlation_id": correlation_id,
        "type": "WorkflowRequestEvent",
        "timestamp": int(datetime.fromisoformat(published.request["timestamp"]).timestamp()),
        "delivery_mode": 2,
    }
    assert {name: published.properties[name] for name in wanted} == wanted


def test_instances_and_metadata_are_stored_under_the_paths_in_the_request(pair: Pair) -> None:
    instances = [new_instance(), new_instance("MR_small.dcm"), new_instance("rtplan.dcm")]

    answer = pair.service.post("/dicomweb/studies", *multipart(*instances))

    published = pair.published(answer)
    assert list(violations_in_store(pair.store.get, published.body)) == []
    folder = answer.headers["X-Payload-ID"]
    paths = [item["path"] for item in published.request["payload"]]
    assert [pair.store.get(f"{folder}/{path}") for path in paths] == instances


def test_embedded_and_distributed_runs_open_equal_requests(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    body, content_type = multipart(real_file(), real_file("MR_small.dcm"), b"no DICOM")
    seen = []
    for store, broker in (("folder", "memory"), ("S3", "AMQP")):
        with _pair(request, tmp_path / store, store, broker) as pair:
            answer = pair.service.post(
                "/dicomweb/w-1/studies",
                body,
                content_type,
                **{"X-Correlation-ID": "0b1c2d3e-0000-4000-8000-000000000001"},
            )
            published = pair.published(answer)
        own = {"payload_id": None, "timestamp": None, "bucket": None}
        seen.append((answer.status_code, answer.content, published.request | own))

    assert seen[0] == seen[1]


@pytest.mark.parametrize("other", ["no other queue", "an audit queue", "an alternate exchange"])
def test_a_request_is_not_sent_before_the_workflow_managers_queue_exists(
    broker_url: str, tmp_path: Path, other: str
) -> None:
    name = f"stowgate-test-{secrets.token_hex(6)}"
    settings = {
        "STOWGATE_BROKER": broker_url,
        "STOWGATE_EVENT_EXCHANGE": f"{name}-events",
        "STOWGATE_WORKFLOW_MANAGER_EXCHANGE": name,
        "STOWGATE_WORKFLOW_MANAGER_QUEUE": name,
        "STOWGATE_WORKFLOW_MANAGER_DEAD_LETTER_EXCHANGE": f"{name}-dead-letter",
    }

    def ready() -> tuple[int, str, str]:
        answer = service.get("/health/ready")
        state = answer.json()
        queue = state["dependencies"]["workflow_manager_queue"]["status"]
        return answer.status_code, state["status"], queue

    with (
        _taking_all(broker_url, name, other) as taken,
        running("run", tmp_path, **settings) as service,
    ):
        assert ready() == (200, "degraded", "down")
        answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")
        assert answer.status_code == 200
        payload_id = answer.headers["X-Payload-ID"]

        def came_back() -> bool:
            payload = service.get(f"/payloads/{payload_id}").json()
            return payload["state"] == "pending" and name in (payload["last_error"] or "")

        wait_for(came_back)
        assert taken() == 0
        with _workflow_manager_queue(broker_url, name, exchange_exists=True) as queue:
            payload = service.opened(payload_id)
            published = queue.take(payload_id)
            wait_for(lambda: ready() == (200, "ready", "ready"))

    assert payload["attempts"] >= 2
    assert payload["last_error"] is None
    assert violations(published.properties, published.body) == []
