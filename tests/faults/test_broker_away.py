"""The broker cut off or silent, as one service or both see it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from reconciliation import reconcile
from service import wait_for
from stowgate_site import Node, Site, publish_to, study

# pika notices a dead peer by its heartbeat alone after 2 x (15 + 5) s.
WELL_BEFORE_THE_HEARTBEAT_SECONDS = 20.0


def _is_ready(node: Node) -> bool:
    return bool(node.ready()[1]["status"] == "ready")


def test_uploads_succeed_while_the_broker_is_down_and_are_announced_when_it_is_back(
    site: Site,
) -> None:
    api, worker = site.pair()
    wait_for(lambda: _is_ready(api) and _is_ready(worker))
    api.broker.cut()
    worker.broker.cut()

    answer = site.post(api, study())

    assert answer.status_code == 200
    (record,) = site.records().values()
    assert record["state"] == "pending"
    for node in (api, worker):
        status, health = node.ready()
        assert (status, health["status"]) == (200, "degraded")
        assert health["dependencies"]["broker"]["status"] == "down"

    api.broker.heal()
    worker.broker.heal()

    site.opened(answer.headers["X-Payload-ID"])
    wait_for(lambda: _is_ready(api) and _is_ready(worker))
    reconcile(site)


@pytest.mark.parametrize("lost", ["event", "confirm"])
def test_an_upload_succeeds_when_the_broker_goes_down_during_the_publish(
    site: Site, lost: str
) -> None:
    api, _ = site.pair()
    hold = api.broker.hold_answer if lost == "confirm" else api.broker.hold
    publish = hold(publish_to(site.events))
    with ThreadPoolExecutor(1) as sender:
        first = sender.submit(site.post, api, study())
        publish.wait_reached()
        api.broker.cut()
        publish.drop()
        answer = first.result()
    api.broker.heal()

    assert answer.status_code == 200
    site.opened(answer.headers["X-Payload-ID"])
    reconcile(site)


def test_a_black_holed_broker_delays_uploads_by_the_deadline_and_blocks_no_threads(
    site: Site,
) -> None:
    api, _ = site.pair(STOWGATE_API_THREADS="10")
    wait_for(lambda: _is_ready(api))
    at_first = api.threads()
    api.broker.black_hole()
    with ThreadPoolExecutor(8) as senders:
        for _ in range(5):
            sent = [
                senders.submit(
                    site.post, api, study(1), timeout_seconds=WELL_BEFORE_THE_HEARTBEAT_SECONDS
                )
                for _ in range(8)
            ]
            assert {future.result().status_code for future in sent} == {200}
    # The ten that serve are started as they are needed; one for each of forty uploads would show.
    assert api.threads() <= at_first + 10
    assert api.ready()[1]["dependencies"]["broker"]["status"] == "down"

    api.broker.heal()

    reconcile(site)
