"""A broker that is slow instead of dead: its confirms come, but late."""

from datetime import datetime, timedelta

from reconciliation import reconcile
from service import wait_for
from stowgate_site import Node, Site, publish_to, study


def _is_ready(node: Node) -> bool:
    return bool(node.ready()[1]["status"] == "ready")


def test_a_late_confirm_opens_its_payload_once_and_health_reports_it(
    site: Site,
) -> None:
    api, worker = site.pair(STOWGATE_BROKER_CONFIRM_SECONDS="1")
    wait_for(lambda: _is_ready(worker))
    confirm = worker.broker.hold_answer(publish_to(site.name))
    payload_id = site.post(api, study()).headers["X-Payload-ID"]
    confirm.wait_reached()
    lease = site.record(payload_id, lambda record: record["lease"])["lease"]

    # Longer than a confirm takes of a broker that is well, and not as long as one is silent.
    longer = datetime.fromisoformat(lease["until"]) + timedelta(seconds=4)
    record = site.record(
        payload_id, lambda record: datetime.fromisoformat(record["lease"]["until"]) > longer
    )
    assert "has not confirmed" in record["last_error"]
    assert worker.ready()[1]["dependencies"]["workflow_manager_queue"]["status"] == "down"
    assert payload_id in worker.log()
    confirm.release()

    record = site.opened(payload_id)
    assert (record["attempts"], record["last_error"]) == (1, None)
    wait_for(lambda: _is_ready(worker))
    ledger = reconcile(site)
    assert len(ledger.deliveries) == 1
    assert "broker connection lost" not in worker.log()


def test_payloads_are_opened_once_with_slow_confirms(site: Site) -> None:
    api, worker = site.pair()
    wait_for(lambda: _is_ready(api) and _is_ready(worker))
    for node in (api, worker):
        node.broker.delay(1.8)

    payload_ids = [site.post(api, study(1)).headers["X-Payload-ID"] for _ in range(4)]

    for payload_id in payload_ids:
        record = site.record(payload_id, lambda record: record["state"] == "opened", seconds=60)
        assert record["attempts"] == 1
    for node in (api, worker):
        node.broker.delay(0)
    ledger = reconcile(site)
    assert len(ledger.deliveries) == 4
    for node in (api, worker):
        assert "broker connection lost" not in node.log()


def test_the_relay_announces_with_a_slow_broker(site: Site) -> None:
    api, worker = site.pair()
    wait_for(lambda: _is_ready(api) and _is_ready(worker))
    api.broker.cut()
    site.opened(site.post(api, study(1)).headers["X-Payload-ID"])  # all connections are made
    worker.broker.delay(1.8)

    payload_id = site.post(api, study(1)).headers["X-Payload-ID"]

    site.record(payload_id, lambda record: record["state"] == "opened", seconds=90)
    worker.broker.delay(0)
    reconcile(site)
    assert "broker connection lost" not in worker.log()


def test_a_stopping_worker_returns_payloads_without_a_confirm_to_the_queue(site: Site) -> None:
    api, worker = site.pair(STOWGATE_LEASE_SECONDS="600")
    wait_for(lambda: _is_ready(worker))
    confirm = worker.broker.hold_answer(publish_to(site.name))
    payload_id = site.post(api, study()).headers["X-Payload-ID"]
    confirm.wait_reached()
    site.record(payload_id, lambda record: record["lease"])

    assert worker.service.stop() == 0

    record = site.records()[payload_id]
    assert (record["state"], record["lease"]) == ("pending", None)
    confirm.drop()
    site.worker()
    site.opened(payload_id)
    reconcile(site, published_twice=1)
