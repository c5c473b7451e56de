"""Alerts that fire in a real Prometheus when the fault they are about is made."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from certificates import certificates
from conftest import own_engine
from prometheus_server import Prometheus, prometheus_program, running_prometheus
from service import wait_for
from stowgate_site import Node, S3Bucket, Site, publish_to, study


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    own_engine(prometheus_program)
    with running_prometheus(tmp_path / "prometheus") as running:
        yield running


@pytest.fixture
def pair(site: Site, prometheus: Prometheus) -> tuple[Node, Node]:
    """An API and a worker that have opened a payload, and no alert."""
    api, worker = site.pair()
    wait_for(lambda: worker.ready()[1]["status"] == "ready")
    prometheus.scrape(api=api.service.url, worker=worker.service.url)
    site.opened(site.post(api, study(1)).headers["X-Payload-ID"])
    prometheus.quiet()
    return api, worker


def test_a_broker_that_is_down_and_the_studies_that_wait_for_it(
    site: Site, prometheus: Prometheus, pair: tuple[Node, Node]
) -> None:
    api, worker = pair
    for node in pair:
        node.broker.cut()
    with ThreadPoolExecutor(1) as sender:
        sending = sender.submit(_post_until, site, api, prometheus, "StowgateOldestPending")
        prometheus.fires(
            "StowgateBrokerDown", "StowgateStudiesNotGettingThrough", "StowgateOldestPending"
        )
        sending.result()

    for node in pair:
        node.broker.heal()

    prometheus.quiet()
    assert worker.metric("stowgate_pending") == 0


@pytest.mark.usefixtures("pair")
def test_the_queue_of_the_workflow_manager_is_removed(site: Site, prometheus: Prometheus) -> None:
    with site.channel() as channel:
        channel.queue_delete(site.name)
        channel.exchange_delete(site.dead_letter_exchange)

    prometheus.fires("StowgateWorkflowManagerQueueMissing", "StowgateRefusalsNotReceived")

    site.start_workflow_manager()
    prometheus.quiet()


def test_the_object_store_is_down(
    site: Site, prometheus: Prometheus, pair: tuple[Node, Node]
) -> None:
    api, _ = pair
    for node in pair:
        node.store.cut()

    _post_until(
        site,
        api,
        prometheus,
        "StowgateObjectStoreDown",
        "StowgateObjectStoreFailing",
        "StowgateUploadsFailing",
    )

    for node in pair:
        node.store.heal()
    prometheus.quiet()


def test_a_worker_is_killed_and_then_the_last_one(
    site: Site, prometheus: Prometheus, pair: tuple[Node, Node]
) -> None:
    api, first = pair
    # A second attempt, as the lease of the first one is not the worker's own.
    with site.channel() as channel:
        channel.queue_delete(site.name)
    wait_for(lambda: not _sees_the_queue(first))
    payload_id = site.post(api, study(1)).headers["X-Payload-ID"]
    site.record(payload_id, lambda record: record["last_error"])
    request = first.broker.hold(publish_to(site.name))
    site.start_workflow_manager()
    request.wait_reached()
    second = site.worker()
    prometheus.scrape(worker_2=second.service.url)

    first.kill()
    request.drop()

    prometheus.fires("StowgateWorkersCrash")

    second.kill()

    prometheus.fires("StowgateNoWorker", "StowgateTargetDown")


def test_a_payload_fails_permanently_and_another_is_refused(
    site: Site, prometheus: Prometheus, pair: tuple[Node, Node]
) -> None:
    api, worker = pair
    _fail_one(site, api, worker)
    site.opened(site.post(api, study(1)).headers["X-Payload-ID"])
    with site.channel() as channel:
        while (got := channel.basic_get(site.name))[0] is not None:
            channel.basic_reject(got[0].delivery_tag, requeue=False)

    prometheus.fires("StowgatePayloadsFailed", "StowgatePayloadsRefused")


@pytest.mark.usefixtures("pair")
def test_a_disk_below_its_watermark_and_a_certificate_near_its_end(
    site: Site, prometheus: Prometheus, tmp_path: Path
) -> None:
    # For a day.
    made = certificates(tmp_path / "certificates")
    api = site.api(
        STOWGATE_MIN_FREE_BYTES=str(10**15),
        STOWGATE_TLS_CERTIFICATE=str(made.certificate),
        STOWGATE_TLS_KEY=str(made.key),
    )
    prometheus.scrape(api_2=api.service.url)

    prometheus.fires("StowgateCertificateExpires", "StowgateDiskNearWatermark")
    for _ in range(2):
        answer = requests.post(
            f"{api.service.url}/dicomweb/studies",
            data=study(1)[0],
            headers={"Content-Type": "application/dicom"},
            verify=str(made.authority),
            timeout=30,
        )
        assert answer.status_code == 507
    prometheus.fires("StowgateFull")


def _post_until(site: Site, api: Node, prometheus: Prometheus, *names: str) -> None:
    """Send uploads, as modalities go on to do, until these alerts fire."""

    def fires() -> bool:
        site.post(api, study(1))
        return prometheus.firing() >= set(names)

    wait_for(fires, seconds=60, pause_seconds=0.5)


def _sees_the_queue(node: Node) -> bool:
    state = node.ready()[1]["dependencies"]["workflow_manager_queue"]["status"]
    return bool(state == "ready")


def _fail_one(site: Site, api: Node, worker: Node) -> None:
    """Replace an instance before the worker reads it."""
    reading = worker.store.hold(f"GET /{site.name}/01[^ ]*/dcm/".encode())
    payload_id = site.post(api, study(1)).headers["X-Payload-ID"]
    reading.wait_reached()
    assert isinstance(site.payloads, S3Bucket)
    for key in site.payloads.listing(f"{payload_id}/"):
        site.payloads.put(key, b"another")
    reading.release()
    site.record(payload_id, lambda record: record["state"] == "failed")
