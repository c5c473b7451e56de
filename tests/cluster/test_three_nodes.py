"""Three RabbitMQ nodes, each killed once while senders send: nothing is lost or opened twice."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pika
import pytest
import requests
from engines import NO_ANSWER, ObjectStoreEndpoint
from instances import new_instance
from rabbitmq_cluster import Cluster, Node, until
from service import Service, running, wait_for

EXCHANGE, QUEUE = "monaideploy", "md.workflow.request"
SENDERS = 3
BETWEEN_KILLS_SECONDS = 8.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)


class Senders:
    """Post one instance each, again and again; what is acknowledged is kept."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ends = threading.Event()
        self.payload_ids: list[str] = []
        self.statuses = Counter[int]()
        self._threads = [threading.Thread(target=self._run) for _ in range(SENDERS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ends.is_set():
            answer = requests.post(
                f"{self._url}/dicomweb/studies",
                new_instance(),
                headers={"Content-Type": "application/dicom"},
                timeout=60,
            )
            self.statuses[answer.status_code] += 1
            if answer.ok:
                self.payload_ids.append(answer.headers["X-Payload-ID"])

    def have_sent_more_than(self, payloads: int) -> bool:
        return len(self.payload_ids) > payloads

    def stop(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()


def declare_queue_of_the_workflow_manager(cluster: Cluster) -> None:
    with pika.BlockingConnection(pika.URLParameters(cluster.nodes[0].url)) as connection:
        channel = connection.channel()
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_bind(QUEUE, EXCHANGE, routing_key=QUEUE)


def requests_in_the_queue(cluster: Cluster) -> list[str]:
    """The payload id of each; they are gone from the queue then."""
    for node in cluster.nodes:
        try:
            with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
                channel, found = connection.channel(), []
                while (got := channel.basic_get(QUEUE, auto_ack=True))[0] is not None:
                    found.append(json.loads(got[2])["payload_id"])
                return found
        except NO_ANSWER:
            continue
    raise AssertionError("no node answers")


def is_gone(node: Node) -> bool:
    return not node.answers()


def is_ready(service: Service) -> bool:
    return bool(service.get("/health/ready").json()["status"] == "ready")


@pytest.mark.timeout(900)
def test_nodes_that_are_killed_one_after_the_other_cost_no_payload(
    cluster: Cluster,
    object_store_endpoint: ObjectStoreEndpoint,
    bucket: str,
    second_bucket: str,
    tmp_path: Path,
) -> None:
    declare_queue_of_the_workflow_manager(cluster)
    settings = {
        "STOWGATE_BROKER": cluster.url,
        "STOWGATE_OBJECT_STORE": object_store_endpoint.url,
        "STOWGATE_OBJECT_STORE_ACCESS_KEY": object_store_endpoint.access_key,
        "STOWGATE_OBJECT_STORE_SECRET_KEY": object_store_endpoint.secret_key,
        "STOWGATE_BUCKET": bucket,
        "STOWGATE_STATE_BUCKET": second_bucket,
    }
    rows = []
    with ExitStack() as stack:
        api = stack.enter_context(running("api", tmp_path / "api", **settings))
        workers = [
            stack.enter_context(running("worker", tmp_path / f"worker-{number}", **settings))
            for number in range(2)
        ]
        services = [api, *workers]
        for service in services:
            wait_for(partial(is_ready, service), 60)
        senders = Senders(api.url)
        stack.callback(senders.stop)
        for node in cluster.nodes:
            time.sleep(BETWEEN_KILLS_SECONDS)  # under load
            sent, began = len(senders.payload_ids), time.monotonic()
            node.kill()
            until(partial(is_gone, node), f"{node.name} is gone")
            for service in services:
                until(partial(is_ready, service), f"{service.url} is ready", 60)
            left_seconds = time.monotonic() - began
            wait_for(partial(senders.have_sent_more_than, sent + SENDERS), 30)
            node.start()
            back_seconds = until(node.answers, f"{node.name} is back")
            until(lambda: len(cluster.running()) == len(cluster.nodes), "all nodes run")
            rows.append((node.name, left_seconds, back_seconds, len(senders.payload_ids) - sent))
        senders.stop()
        acknowledged = set(senders.payload_ids)
        opened: list[str] = []

        def all_opened() -> bool:
            opened.extend(requests_in_the_queue(cluster))
            return acknowledged <= set(opened)

        wait_for(all_opened, 240, pause_seconds=0.5)
        opened.extend(requests_in_the_queue(cluster))
        lost = [
            line
            for service in services
            for line in service.log.read_text().splitlines()
            if "broker connection lost" in line
        ]
    print("\nnode     left after  back after  posts in between")
    for name, left_seconds, back_seconds, posts in rows:
        print(f"{name:8} {left_seconds:8.1f} s {back_seconds:9.1f} s {posts:10}")
    print(f"answers {dict(senders.statuses)}; connections lost {len(lost)}")
    twice = [payload_id for payload_id, count in Counter(opened).items() if count > 1]
    print(
        f"acknowledged {len(acknowledged)}, opened {len(set(opened))}, more than once {len(twice)}"
    )
    assert set(senders.statuses) == {200}
    assert set(opened) == acknowledged
    assert lost
