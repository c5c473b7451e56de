"""SIGTERM to a service that has an upload in hand which does not end, or a payload, or both."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from reconciliation import reconcile
from service import wait_for
from stowgate_site import Node, Site, study

# An upload that stalls is not cut off before the stop is over.
PATIENT = {"STOWGATE_IDLE_SECONDS": "60"}


@contextmanager
def stalled_upload(node: Node) -> Iterator[None]:
    url = urlsplit(node.service.url)
    with socket.create_connection((url.hostname or "", url.port or 80)) as sock:
        sock.sendall(
            b"POST /dicomweb/studies HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/dicom\r\nContent-Length: 100000\r\n\r\nDICM"
        )
        wait_for(lambda: node.metric("stowgate_uploads_in_progress") == 1)
        yield


def _payload_in_hand(site: Site, api: Node, worker: Node) -> str:
    """One whose sidecars the store keeps the worker waiting for."""
    worker.store.hold(rf"PUT /{site.name}/[^ ]*\.json".encode())
    payload_id = str(site.post(api, study()).headers["X-Payload-ID"])
    site.record(payload_id, lambda record: record["lease"])
    return payload_id


def _is_handed_back(record: dict[str, Any]) -> bool:
    return record["lease"] is None and record["state"] == "pending"


def test_a_stopping_run_returns_payloads_to_the_queue_while_an_upload_ends(site: Site) -> None:
    run = site.run(**PATIENT, STOWGATE_STOP_SECONDS="120", STOWGATE_LEASE_SECONDS="600")
    with stalled_upload(run):
        payload_id = _payload_in_hand(site, run, run)

        run.service.process.terminate()

        record = site.record(payload_id, _is_handed_back)
        assert record["attempts"] == 0
        assert run.service.process.poll() is None
        run.kill()

    api = site.api()
    site.worker()
    site.opened(payload_id)
    site.opened(site.post(api, study()).headers["X-Payload-ID"])
    reconcile(site)


@pytest.mark.parametrize("command", ["run", "api"])
def test_a_shutdown_ends_despite_an_upload_that_does_not(site: Site, command: str) -> None:
    start = site.run if command == "run" else site.api
    node = start(**PATIENT, STOWGATE_STOP_SECONDS="5")
    wait_for(lambda: node.ready()[1]["status"] == "ready")
    with stalled_upload(node):
        assert node.service.stop() == 0

    # What is said last of all: nobody killed it before.
    connections = node.log().count('"broker connected"')
    assert connections >= 1
    assert node.log().count('"broker connection closed"') == connections


def test_a_stopping_worker_returns_its_payloads_to_the_queue(site: Site) -> None:
    api, worker = site.pair(STOWGATE_LEASE_SECONDS="600")
    payload_id = _payload_in_hand(site, api, worker)

    assert worker.service.stop() == 0

    assert _is_handed_back(site.records()[payload_id])
    site.worker()
    site.opened(payload_id)
    reconcile(site)


def test_the_events_of_a_stopping_api_reach_the_broker(site: Site) -> None:
    api, worker = site.pair()
    answer = site.post(api, study(1))
    assert api.service.stop() == 0

    site.opened(answer.headers["X-Payload-ID"])

    assert "not announced" not in api.log()
    assert worker.metric("stowgate_announced_again_total") == 0
    reconcile(site)
