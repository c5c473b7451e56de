"""`kill -9` of the API at each point of an upload, and a paused API."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from instances import BOUNDARY, multipart
from ledger import WITNESS
from reconciliation import reconcile
from service import wait_for
from stowgate_site import S3Bucket, Site, study

# Given to the worker alone: it sweeps after twice that, and no upload here need hurry.
SWEPT_SOON = {"STOWGATE_MAX_UPLOAD_SECONDS": "2", "STOWGATE_SWEEP_SECONDS": "1"}


def _payload_ids(site: Site) -> set[str]:
    return {key.partition("/")[0] for key in site.payloads.listing()} - {WITNESS}


def test_an_api_killed_during_an_upload_leaves_no_record_and_the_retry_succeeds(
    site: Site,
) -> None:
    api, worker = site.api(), site.worker(**SWEPT_SOON)
    payloads = site.payloads
    assert isinstance(payloads, S3Bucket)
    # Larger than the pieces that the API reads, so that a part is stored before the next is sent.
    instances = study(3, bytes(1 << 20))

    def until_one_is_stored() -> Iterator[bytes]:
        body, _ = multipart(*instances)
        half = body.index(f"--{BOUNDARY}".encode(), len(body) // 2)
        yield body[:half]
        wait_for(lambda: _payload_ids(site))
        api.kill()
        yield body[half:]

    with pytest.raises(requests.ConnectionError):
        site.post(api, instances, pieces=until_one_is_stored())
    assert site.records() == {}
    (left,) = _payload_ids(site)
    # Another producer's payload in the shared bucket, of the same millisecond: the sweep comes by.
    foreign = f"{left[:14]}7000-8000-000000000000/dcm/1.2/1.2.3/1.2.3.4.dcm"
    payloads.put(foreign, b"not ours")

    assert site.post(site.api(), instances).status_code == 200

    wait_for(lambda: left not in _payload_ids(site))
    assert worker.metric("stowgate_swept_objects_total") >= 1
    assert '"event": "swept"' in worker.log()
    ledger = reconcile(site)
    assert ledger.orphans() == [foreign]
    assert len(ledger.payloads) == 1


def test_an_api_killed_before_its_record_leaves_no_record_and_the_retry_succeeds(
    site: Site,
) -> None:
    api = site.api()
    instances = study(3)
    record = api.store.hold(f"PUT /{site.name}-state/pending/".encode())
    with ThreadPoolExecutor(1) as sender:
        first = sender.submit(site.post, api, instances)
        record.wait_reached()
        api.kill()
        record.drop()
        assert isinstance(first.exception(), requests.ConnectionError)
    assert site.records() == {}
    assert len(site.payloads.listing()) == len(instances)
    # The first that there ever was, so it is the API that has the sweep begin.
    site.worker(**SWEPT_SOON)

    assert site.post(site.api(), instances).status_code == 200

    wait_for(lambda: _payload_ids(site) == site.records().keys())
    ledger = reconcile(site)
    assert ledger.orphans() == []
    assert len(ledger.payloads) == 1


def test_the_record_of_an_api_killed_before_the_publish_is_announced(
    site: Site,
) -> None:
    api, worker = site.pair()
    recorded = api.store.hold_answer(f"PUT /{site.name}-state/pending/".encode())
    with ThreadPoolExecutor(1) as sender:
        first = sender.submit(site.post, api, study())
        recorded.wait_reached()
        api.kill()
        recorded.drop()
        assert isinstance(first.exception(), requests.ConnectionError)
    (payload_id,) = site.records()

    site.opened(payload_id)

    assert worker.metric("stowgate_announced_again_total") == 1
    ledger = reconcile(site)
    assert [delivery.payload_id for delivery in ledger.deliveries] == [payload_id]
    assert ledger.orphans() == []


def test_an_api_paused_before_its_record_until_the_sweep_acknowledges_nothing(
    site: Site,
) -> None:
    api, _ = site.api(), site.worker(**SWEPT_SOON)
    instances = study(3)
    record = api.store.hold(f"PUT /{site.name}-state/pending/".encode())
    with ThreadPoolExecutor(1) as sender:
        first = sender.submit(site.post, api, instances)
        record.wait_reached()
        (left,) = _payload_ids(site)
        wait_for(lambda: left not in _payload_ids(site))
        record.release()
        answer = first.result()

    assert answer.status_code == 408
    assert "X-Payload-ID" not in answer.headers
    assert site.post(api, instances).status_code == 200
    ledger = reconcile(site)
    assert len(ledger.payloads) == 1
    assert left not in ledger.payloads


def test_an_api_paused_before_its_record_until_its_key_is_taken_over_acknowledges_nothing(
    site: Site,
) -> None:
    (api, _), other = site.pair(), site.api()
    instances, key = study(), "one-key-for-both"
    record = api.store.hold(f"PUT /{site.name}-state/pending/".encode())
    with ThreadPoolExecutor(1) as sender:
        first = sender.submit(site.post, api, instances, key=key)
        record.wait_reached()

        def taken() -> requests.Response | None:
            answer = site.post(other, instances, key=key)
            return answer if answer.status_code != 409 else None

        winner = wait_for(taken, pause_seconds=0.2)
        record.release()
        loser = first.result()

    assert (loser.status_code, winner.status_code) == (408, 200)
    again = site.post(api, instances, key=key)
    assert again.headers["X-Payload-ID"] == winner.headers["X-Payload-ID"]
    ledger = reconcile(site)
    assert ledger.payloads.keys() == {winner.headers["X-Payload-ID"]}
