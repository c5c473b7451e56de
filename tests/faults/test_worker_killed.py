"""`kill -9` or pause of a worker at each point of opening a request."""

from reconciliation import reconcile
from service import wait_for
from stowgate_site import BASIC_ACK, Node, Site, publish_to, study

# Takes its events one after the other, so that a later one done means the earlier ones done.
ONE_AT_A_TIME = {"STOWGATE_WORKER_THREADS": "1"}


def _other_has_it(worker: Node) -> bool:
    return "another worker has the record" in worker.log()


def _open_another(site: Site, api: Node) -> None:
    site.opened(site.post(api, study(1)).headers["X-Payload-ID"])


def test_the_payload_of_a_worker_killed_before_the_publish_is_opened_once(
    site: Site,
) -> None:
    api, first = site.pair()
    request = first.broker.hold(publish_to(site.name))
    answer = site.post(api, study())
    request.wait_reached()
    first.kill()
    request.drop()
    site.worker()

    record = site.opened(answer.headers["X-Payload-ID"])

    # The first worker held the first lease, and wrote nothing.
    assert (record["attempts"], record["takeovers"]) == (1, 0)
    ledger = reconcile(site)
    assert len(ledger.deliveries) == 1


def test_a_worker_killed_before_it_records_the_publish_opens_it_again_with_the_same_id(
    site: Site,
) -> None:
    api, first = site.pair()
    confirm = first.broker.hold_answer(publish_to(site.name))
    answer = site.post(api, study())
    confirm.wait_reached()
    wait_for(lambda: site.waiting(site.name) == 1)
    site.worker()
    first.kill()
    confirm.drop()

    site.opened(answer.headers["X-Payload-ID"])

    ledger = reconcile(site, published_twice=1)
    assert len({delivery.body for delivery in ledger.deliveries}) == 1


def test_a_worker_killed_between_record_and_ack_does_not_open_it_again(
    site: Site,
) -> None:
    api, first = site.pair()
    ack = first.broker.hold(BASIC_ACK)
    answer = site.post(api, study())
    ack.wait_reached()
    site.opened(answer.headers["X-Payload-ID"])
    first.kill()
    ack.drop()
    wait_for(lambda: site.waiting(site.event_queue) == 1)  # the broker has taken it back

    site.worker(**ONE_AT_A_TIME)

    _open_another(site, api)
    ledger = reconcile(site)
    assert ledger.payloads[answer.headers["X-Payload-ID"]]["attempts"] == 1


def test_a_worker_killed_before_an_opened_record_leaves_pending_does_not_reopen_it(
    site: Site,
) -> None:
    api, first = site.pair()
    leave = first.store.hold(rf"POST /{site.name}-state/?\?delete".encode())
    answer = site.post(api, study())
    leave.wait_reached()
    first.kill()
    leave.drop()

    second = site.worker(**ONE_AT_A_TIME)

    payload = api.service.get(f"/payloads/{answer.headers['X-Payload-ID']}").json()
    assert payload["state"] == "opened"
    wait_for(lambda: not list(site.state.listing("pending/")))  # when its lease has ended
    _open_another(site, api)
    ledger = reconcile(site)
    assert ledger.payloads[answer.headers["X-Payload-ID"]]["attempts"] == 1
    assert second.service.process.returncode == 0


def test_a_worker_paused_beyond_its_lease_does_not_open_a_payload_again(
    site: Site,
) -> None:
    api, first = site.pair()
    sidecar = first.store.hold(rf"PUT /{site.name}/[^ ]*\.json".encode())
    answer = site.post(api, study())
    sidecar.wait_reached()
    first.pause()
    sidecar.release()
    # Else the broker goes on to give it events, until it misses the heartbeats.
    first.broker.cut()
    site.worker()

    record = site.opened(answer.headers["X-Payload-ID"])
    first.broker.heal()
    first.resume()

    wait_for(lambda: _other_has_it(first))
    assert record["attempts"] == 1
    ledger = reconcile(site)
    assert len(ledger.deliveries) == 1
