"""A RabbitMQ of our own, killed with -9 and started again, or out of memory."""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import engines
import pytest
from conftest import own_engine
from engines import ObjectStoreEndpoint
from killable import Container, Part, Process, broker
from reconciliation import reconcile
from service import wait_for
from stowgate_site import Node, Site, study

# How a channel ends on which somebody settles what is not there (AMQP 0-9-1, 1.8.3.13).
STALE = "delivery tag"


@dataclass(frozen=True)
class OwnBroker:
    part: Part
    url: str

    def restart(self) -> None:
        # Ra writes the names of new queues down half a second late. A broker that is killed before
        # comes back with a queue that has lost its messages and never gets a leader (3.10.8).
        self.control("eval", "[dets:sync(Table) || Table <- dets:all()].")
        self.part.body.kill()
        self.part.body.start()
        self.part.until_it_serves()

    def control(self, *arguments: str) -> str:
        """`rabbitmqctl` with these arguments."""
        body = self.part.body
        if isinstance(body, Container):
            code, output = body.container.exec_run(["rabbitmqctl", "--quiet", *arguments])
            assert code == 0, output
            return str(output.decode())
        assert isinstance(body, Process)
        program = engines.program("rabbitmqctl")
        return subprocess.run(
            [program, "--quiet", *arguments],
            env={**os.environ, **body.environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnBroker]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("rabbitmq")
        yield OwnBroker(*own_engine(lambda: broker(folder, stack, print)))


@pytest.fixture
def site(
    own_broker: OwnBroker, object_store_endpoint: ObjectStoreEndpoint, tmp_path: Path
) -> Iterator[Site]:
    found = Site(tmp_path, own_broker.url, object_store_endpoint)
    found.start_workflow_manager()
    try:
        yield found
    finally:
        found.close()
        found.remove()


def _connections_of_consumer(worker: Node) -> int:
    lines = worker.log().splitlines()
    return sum("broker connected" in line and "stowgate consumer" in line for line in lines)


def test_a_worker_survives_a_killed_broker_and_never_acks_a_stale_delivery(
    site: Site, own_broker: OwnBroker
) -> None:
    api, worker = site.pair(STOWGATE_WORKER_THREADS="3")
    sidecar = worker.store.hold(rf"PUT /{site.name}/[^ ]*\.json".encode())
    answers = [site.post(api, study()) for _ in range(6)]
    sidecar.wait_reached()

    own_broker.restart()
    wait_for(lambda: _connections_of_consumer(worker) == 2)
    sidecar.release()

    for answer in answers:
        assert answer.status_code == 200
        site.opened(answer.headers["X-Payload-ID"])
    fields = ["queue_name", "prefetch_count"]
    consumers = own_broker.control("-p", "monaideploy", "list_consumers", *fields)
    prefetch_counts = dict(line.split() for line in consumers.splitlines())
    assert prefetch_counts[site.event_queue] == "3"
    later = site.post(api, study())
    site.opened(later.headers["X-Payload-ID"])
    reconcile(site)
    assert STALE not in worker.log()


def test_a_worker_declares_everything_again_on_a_broker_that_lost_it(site: Site) -> None:
    api, worker = site.pair()
    site.opened(site.post(api, study()).headers["X-Payload-ID"])
    site.take_requests()
    for node in (api, worker):
        node.broker.cut()
    site.remove_from_broker()
    site.start_workflow_manager()
    for node in (api, worker):
        node.broker.heal()

    def announced() -> bool:
        return bool(api.ready()[1]["status"] == worker.ready()[1]["status"] == "ready")

    wait_for(announced)
    site.opened(site.post(api, study()).headers["X-Payload-ID"])
    reconcile(site)


def test_a_memory_alarm_delays_an_upload_by_the_deadline_and_is_degraded(
    site: Site, own_broker: OwnBroker
) -> None:
    api, worker = site.pair()
    wait_for(lambda: api.ready()[1]["status"] == worker.ready()[1]["status"] == "ready")
    own_broker.control("set_vm_memory_high_watermark", "0")
    try:
        with ThreadPoolExecutor(4) as senders:
            sent = [senders.submit(site.post, api, study(), timeout_seconds=20.0) for _ in range(4)]
            answers = [future.result() for future in sent]
        status, health = api.ready()
    finally:
        own_broker.control("set_vm_memory_high_watermark", "0.6")

    assert {answer.status_code for answer in answers} == {200}
    assert (status, health["status"]) == (200, "degraded")
    assert health["dependencies"]["broker"]["status"] == "down"
    for answer in answers:
        site.opened(answer.headers["X-Payload-ID"])
    wait_for(lambda: api.ready()[1]["status"] == "ready")
    reconcile(site)
