"""A RabbitMQ of our own, killed with -9 and started again, or out of memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import own_engine
from engines import ObjectStoreEndpoint
from killable import Part, broker, dead_letter_at_least_once, rabbitmqctl
from pika.exceptions import AMQPError
from reconciliation import reconcile
from running_double import RunningDouble
from service import wait_for
from stowgate_site import Node, Site, study
from workflow_manager_double import Verdict

# How a channel ends on which somebody settles what is not there (AMQP 0-9-1, 1.8.3.13).
STALE = "delivery tag"


@dataclass(frozen=True)
class OwnBroker:
    part: Part
    url: str

    def restart(self) -> None:
        self.remember_queues()
        self.kill_and_start()

    def remember_queues(self) -> None:
        # Ra writes the names of new queues down half a second late. A broker that is killed before
        # comes back with a queue that has lost its messages and never gets a leader (3.10.8).
        self.control("eval", "[dets:sync(Table) || Table <- dets:all()].")

    def kill_and_start(self) -> None:
        self.part.body.kill()
        self.part.body.start()
        self.part.until_it_serves()

    def control(self, *arguments: str) -> str:
        """`rabbitmqctl` with these arguments."""
        return rabbitmqctl(self.part, *arguments)


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


def test_an_event_that_a_consumer_had_when_the_broker_was_killed_comes_back_as_redelivered(
    site: Site, own_broker: OwnBroker
) -> None:
    """Otherwise a worker would take the first lease that another one has."""
    api = site.api()
    wait_for(lambda: api.ready()[1]["dependencies"]["broker"]["status"] == "ready")
    site.post(api, study(1))
    with suppress(AMQPError), site.channel() as channel:
        first = wait_for(lambda: channel.basic_get(site.event_queue)[0])
        own_broker.restart()

    with site.channel() as channel:
        again = wait_for(lambda: channel.basic_get(site.event_queue)[0])
        channel.basic_ack(again.delivery_tag)
    assert (first.redelivered, again.redelivered) == (False, True)
    site.worker()
    for payload_id in site.records():
        site.opened(payload_id)


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


def test_no_refusal_is_lost_if_the_broker_is_killed_while_it_dead_letters(
    site: Site, own_broker: OwnBroker
) -> None:
    """With the policy of docs/guarantees.md on the queue of the Workflow Manager."""
    dead_letter_at_least_once(own_broker.part, site.name)
    api, worker = site.pair()

    def hears_refusals() -> bool:
        dependencies = worker.ready()[1]["dependencies"]
        return bool(dependencies["workflow_manager_refusals"]["status"] == "ready")

    wait_for(hears_refusals, pause_seconds=0.1)
    with ThreadPoolExecutor(4) as senders:
        answers = list(senders.map(lambda _: site.post(api, study(1)), range(100)))
    payload_ids = {answer.headers["X-Payload-ID"] for answer in answers}
    for payload_id in payload_ids:
        site.opened(payload_id)

    own_broker.remember_queues()
    with suppress(AMQPError), site.channel() as channel:
        tags = [channel.basic_get(site.name)[0].delivery_tag for _ in payload_ids]
        channel.basic_nack(max(tags), multiple=True, requeue=False)
        # The frame is sent, and hardly any of the dead letters has arrived.
        channel.connection.process_data_events(0)
        own_broker.kill_and_start()

    # What the broker had not settled comes again.
    with RunningDouble(site, verdict=lambda: Verdict.REJECT):
        wait_for(lambda: set(api.payload_ids("refused")) == payload_ids)
