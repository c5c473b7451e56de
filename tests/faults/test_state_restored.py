"""The state bucket is restored to an earlier moment, while services run or before they start."""

import json

from ledger import WITNESS
from reconciliation import reconcile
from service import wait_for
from stowgate_site import Node, S3Bucket, Site, study

# Given to the worker alone: it sweeps after twice that.
SWEPT_SOON = {"STOWGATE_MAX_UPLOAD_SECONDS": "2", "STOWGATE_SWEEP_SECONDS": "1"}
GRACE_SECONDS = 4

RESTARTS = "the sweep restarts"


def _backup(bucket: S3Bucket) -> dict[str, bytes]:
    found = {key: bucket.get(key) for key in bucket.listing()}
    return {key: data for key, data in found.items() if data is not None}


def _restore(bucket: S3Bucket, earlier: dict[str, bytes]) -> None:
    for key in bucket.listing():
        bucket.delete(key)
    for key, data in earlier.items():
        bucket.put(key, data)


def _confirmations(site: Site) -> int:
    data = site.payloads.get(f"{WITNESS}/{site.name}-state.json")
    return int(json.loads(data)["confirmations"]) if data else 0


def _post(site: Site, api: Node, times: int) -> set[str]:
    """Payload ids, once they are confirmed."""
    before = _confirmations(site)
    answers = [site.post(api, study()) for _ in range(times)]
    assert {answer.status_code for answer in answers} == {200}
    wait_for(lambda: _confirmations(site) > before)
    # The last of them may have come while the first were confirmed.
    assert site.post(api, study()).status_code == 200
    counted = _confirmations(site)
    wait_for(lambda: _confirmations(site) > counted)
    return {answer.headers["X-Payload-ID"] for answer in answers}


def _until_swept(site: Site, worker: Node) -> None:
    """Until the worker has swept for longer than an upload without a record is left."""
    for _ in range(2 + GRACE_SECONDS):
        look = worker.store.hold(f"GET /{site.name}-state/sweep/cursor.json".encode())
        look.wait_reached()
        look.release()


def _stored(site: Site) -> set[str]:
    return {key.partition("/")[0] for key in site.payloads.listing()}


def test_pending_payloads_survive_a_restore(site: Site) -> None:
    api = site.api()
    assert isinstance(site.state, S3Bucket)
    _post(site, api, 1)
    earlier = _backup(site.state)
    acknowledged = _post(site, api, 10)
    with site.channel() as channel:
        channel.queue_purge(site.event_queue)  # or the first event would show what is lost
    _restore(site.state, earlier)

    worker = site.worker(**SWEPT_SOON)
    _until_swept(site, worker)

    assert acknowledged <= _stored(site)
    assert RESTARTS in worker.log()


def test_opened_payloads_survive_a_restore_under_running_services(site: Site) -> None:
    api, worker = site.api(), site.worker(**SWEPT_SOON)
    assert isinstance(site.state, S3Bucket)
    _post(site, api, 1)
    earlier = _backup(site.state)
    acknowledged = _post(site, api, 10)
    for payload_id in acknowledged:
        site.opened(payload_id)
    _restore(site.state, earlier)

    _until_swept(site, worker)

    assert acknowledged <= _stored(site)
    assert RESTARTS in worker.log()


def test_a_restart_of_all_services_is_not_mistaken_for_a_restore(site: Site) -> None:
    api, worker = site.pair()
    _post(site, api, 3)
    for node in (api, worker):
        node.kill()

    api, worker = site.api(), site.worker(**SWEPT_SOON)
    _post(site, api, 3)
    _until_swept(site, worker)

    assert RESTARTS not in api.log() + worker.log()
    reconcile(site)
