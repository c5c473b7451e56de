"""What the worker makes of its events: bad ones, doubled ones, and those it cannot finish yet."""

import json
import subprocess
from pathlib import Path
from typing import Any

from reconciliation import reconcile
from service import STOWGATE, environment, wait_for
from stowgate_site import S3Bucket, Site, publish_to, study


def _event(record: dict[str, Any]) -> bytes:
    return json.dumps({name: record[name] for name in ("payload_id", "correlation_id")}).encode()


def test_a_worker_with_s3_and_rabbitmq_needs_no_data_folder(site: Site) -> None:
    api = site.api()
    site.worker(STOWGATE_DATA="/proc/not-to-be-made")

    site.opened(site.post(api, study(1)).headers["X-Payload-ID"])


def test_a_poison_event_is_dead_lettered_with_its_reason_and_others_are_opened(
    site: Site,
) -> None:
    api, worker = site.pair()
    wait_for(lambda: worker.ready()[1]["status"] == "ready")
    poison = [b"", b"\xff\xfe", b"{}", b'{"payload_id": "../../etc", "correlation_id": "x"}', b"[]"]
    answers = []
    for body in poison:
        site.publish_event(body)
        answers.append(site.post(api, study(1)))
    # Well-formed, but of no record: nothing to do, and no poison.
    site.publish_event(
        b'{"payload_id": "01890000-0000-7000-8000-0123456789ab",'
        b' "correlation_id": "01890000-0000-7000-8000-0123456789ab"}'
    )

    wait_for(lambda: site.waiting(site.dead_letters) == len(poison))
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        record = site.opened(answer.headers["X-Payload-ID"])
        assert record["attempts"] == 1
    reasons = [line for line in worker.log().splitlines() if "dead-lettered" in line]
    assert len(reasons) == len(poison)
    assert all(json.loads(line)["reason"] for line in reasons)
    with site.channel() as channel:
        for _ in poison:
            _, properties, _ = channel.basic_get(site.dead_letters, auto_ack=True)
            assert properties.headers["x-first-death-reason"] == "rejected"
    reconcile(site)


def test_a_transient_failure_is_retried_at_growing_intervals_until_it_passes(site: Site) -> None:
    api, worker = site.pair()
    worker.store.refuse(f"GET /{site.name}/01[^ ]*/dcm/".encode())
    payload_id = site.post(api, study()).headers["X-Payload-ID"]

    record = site.record(payload_id, lambda r: r["attempts"] >= 2 and not r["lease"])
    assert record["state"] == "pending"
    assert "object store" in record["last_error"]
    waits = [
        json.loads(line)["wait_seconds"]
        for line in worker.log().splitlines()
        if "not opened; trying again" in line
    ]
    assert waits == sorted(waits)
    worker.store.refuse(None)

    site.opened(payload_id)
    reconcile(site)


def test_a_permanent_failure_is_recorded_and_replayed_with_the_same_payload_id(
    site: Site, tmp_path: Path
) -> None:
    api, worker = site.pair()
    assert isinstance(site.payloads, S3Bucket)
    reading = worker.store.hold(f"GET /{site.name}/01[^ ]*/dcm/".encode())
    payload_id = site.post(api, study()).headers["X-Payload-ID"]
    reading.wait_reached()
    instances = {key: site.payloads.get(key) or b"" for key in _instance_keys(site)}
    for key in instances:
        site.payloads.delete(key)
    reading.release()

    failed = site.record(payload_id, lambda record: record["state"] == "failed")
    assert any(key in failed["last_error"] for key in instances)
    listed = _payloads(api.service.url, tmp_path, "list", "--state", "failed")
    assert (listed.returncode, payload_id in listed.stdout) == (0, True)

    for key, data in instances.items():
        site.payloads.put(key, data)
    assert _payloads(api.service.url, tmp_path, "replay", payload_id).returncode == 0
    site.opened(payload_id)
    # There is nothing left to replay.
    assert _payloads(api.service.url, tmp_path, "replay", payload_id).returncode == 2

    ledger = reconcile(site)
    assert [delivery.payload_id for delivery in ledger.deliveries] == [payload_id]


def _instance_keys(site: Site) -> list[str]:
    return [key for key in site.payloads.listing() if key.endswith(".dcm")]


def _payloads(url: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, "payloads", *arguments, "--url", url],
        env=environment(folder, {}) | {"COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_request_waits_for_the_workflow_managers_queue_and_opens_when_it_appears(
    unattended_site: Site,
) -> None:
    site = unattended_site
    api, worker = site.pair()
    payload_id = site.post(api, study()).headers["X-Payload-ID"]

    # It came back, again and again.
    site.record(payload_id, lambda r: r["attempts"] >= 2 and site.name in (r["last_error"] or ""))
    assert worker.metric("stowgate_unroutable_total") >= 2
    assert worker.metric("stowgate_pending") == 1
    for node in (api, worker):
        status, health = node.ready()
        assert (status, health["status"]) == (200, "degraded")
        assert health["dependencies"]["workflow_manager_queue"]["status"] == "down"

    site.start_workflow_manager()

    site.opened(payload_id)
    wait_for(lambda: worker.ready()[1]["status"] == "ready")
    wait_for(lambda: worker.metric("stowgate_pending") == 0)
    reconcile(site)


def test_an_event_delivered_repeatedly_to_two_workers_opens_one_request(
    site: Site,
) -> None:
    one_at_a_time = {"STOWGATE_WORKER_THREADS": "1"}
    api, first = site.pair(**one_at_a_time)
    second = site.worker(**one_at_a_time)
    wait_for(lambda: first.ready()[1]["status"] == second.ready()[1]["status"] == "ready")
    holds = [node.broker.hold(publish_to(site.name)) for node in (first, second)]
    payload_id = site.post(api, study()).headers["X-Payload-ID"]

    # One worker has it in hand and cannot go on: the copies come at the same time.
    event = _event(site.record(payload_id, lambda record: record["lease"]))
    for _ in range(20):
        site.publish_event(event)
    wait_for(lambda: site.waiting(site.event_queue) == 0)
    assert site.take_requests() == []
    for hold in holds:
        hold.release()
    site.opened(payload_id)
    # And after it.
    for _ in range(20):
        site.publish_event(event)
    site.opened(site.post(api, study(1)).headers["X-Payload-ID"])  # behind all of them

    ledger = reconcile(site)
    assert len(ledger.deliveries) == 2
    assert ledger.payloads[payload_id]["attempts"] == 1
