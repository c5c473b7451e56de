"""What the Workflow Manager refuses, on a real RabbitMQ and a real MinIO, with workers killed."""

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import orjson
import pika
import pytest
import requests
from records_made import RECEIVED_AT, record
from running_double import RunningDouble
from service import STOWGATE, environment, wait_for
from stowgate_site import BASIC_ACK, ROUTING_KEY, Node, S3Bucket, Site, publish_to, study
from workflow_manager_double import Verdict, Workflow

from shared.ids import PayloadIds
from shared.records import State, encode, newest_first


def payload(api: Node, payload_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.service.get(f"/payloads/{payload_id}").json()
    return found


def in_state(api: Node, payload_id: str, state: str, seconds: float = 30.0) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found = payload(api, payload_id)
        return found if found["state"] == state else None

    return wait_for(look, seconds, pause_seconds=0.1)


def replay(api: Node, payload_id: str) -> requests.Response:
    return requests.post(f"{api.service.url}/payloads/{payload_id}/replay", timeout=30)


def post(site: Site, api: Node, path: str = "/dicomweb/studies") -> str:
    answer = site.post(api, study(1), path=path)
    assert answer.status_code == 200
    return str(answer.headers["X-Payload-ID"])


def listed(api: Node, state: str) -> list[str]:
    rows = api.service.get(f"/payloads?state={state}&limit=200").json()["payloads"]
    return [row["payload_id"] for row in rows]


def until_heard(*nodes: Node) -> None:
    """Refusals that come before the queue is bound are not heard."""

    def heard() -> bool:
        states = (node.ready()[1]["dependencies"]["workflow_manager_refusals"] for node in nodes)
        return all(state["status"] == "ready" for state in states)

    wait_for(heard, pause_seconds=0.1)


@pytest.fixture
def pair(site: Site) -> tuple[Node, Node]:
    api, worker = site.pair()
    until_heard(worker)
    return api, worker


def counted(worker: Node, kind: str) -> float:
    return worker.service.metric("stowgate_dead_letters_total", kind=kind)


def test_a_payload_without_a_workflow_is_refused_with_its_reason_and_opened_by_one_replay(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, worker = pair
    assert requests.post(
        f"{api.service.url}/config/vae", json={"virtualAeTitle": "LUNG"}, timeout=30
    ).ok
    with RunningDouble(site, workflows=[Workflow("w", "OTHER")]) as double:
        payload_id = post(site, api, "/dicomweb/vae/LUNG/studies")
        refused = in_state(api, payload_id, "refused")

        assert len(double.with_line("REQUEUED")) == 4
        assert "no workflow for AE title 'LUNG' and source '127.0.0.1'" in refused["last_error"]
        assert "condition (predicate)" in refused["last_error"]
        assert refused["refused_at"] >= refused["received_at"][:19]
        assert refused["refusals"] == 1
        assert (listed(api, "refused"), listed(api, "opened")) == ([payload_id], [])
        wait_for(lambda: worker.metric("stowgate_refused") == 1)

        double.workflows = [Workflow("w", "LUNG")]
        assert replay(api, payload_id).status_code == 202

        in_state(api, payload_id, "opened")
        wait_for(lambda: double.with_line("accepted"))
    assert len(set(double.bodies)) == 1
    assert len(double.bodies) == 5
    assert (listed(api, "refused"), listed(api, "opened")) == ([], [payload_id])
    wait_for(lambda: worker.metric("stowgate_refused") == 0)


def test_a_request_that_violates_a_rule_is_refused_and_the_rules_are_listed(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, _ = pair
    with RunningDouble(site, verdict=lambda: Verdict.REJECT):
        payload_id = post(site, api)
        refused = in_state(api, payload_id, "refused")

    assert "rejected the workflow request" in refused["last_error"]
    assert "1 to 15 characters" in refused["last_error"]


def test_a_second_refusal_is_shown_and_one_of_two_concurrent_replays_is_sent(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, _ = pair
    with RunningDouble(site, verdict=lambda: Verdict.REJECT) as double:
        payload_id = post(site, api)
        in_state(api, payload_id, "refused")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: replay(api, payload_id).status_code, range(8)))
        # One that came after the replay was refused again is a replay of its own.
        times = answers.count(202)
        assert set(answers) <= {202, 409}

        def settled() -> bool:
            return bool(payload(api, payload_id)["refusals"] == times + 1)

        wait_for(settled)
        assert in_state(api, payload_id, "refused")["refusals"] == times + 1
    assert len(double.bodies) == times + 1
    assert len(set(double.bodies)) == 1


def test_one_of_many_concurrent_replays_is_sent(site: Site, pair: tuple[Node, Node]) -> None:
    api, worker = pair
    with RunningDouble(site, verdict=lambda: Verdict.REJECT) as double:
        payload_id = post(site, api)
        in_state(api, payload_id, "refused")
        double.verdict = lambda: None
        hold = worker.broker.hold(publish_to(site.name))
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: replay(api, payload_id).status_code, range(8)))

        assert sorted(answers) == [202] + [409] * 7
        assert in_state(api, payload_id, "pending")["refusals"] == 1
        assert listed(api, "pending") == [payload_id]
        assert listed(api, "opened") == []
        hold.release()
        in_state(api, payload_id, "opened")
    assert len(double.bodies) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_killed_while_it_records_a_refusal_loses_and_duplicates_none(
    site: Site, pair: tuple[Node, Node], when: str
) -> None:
    api, first = pair
    payload_id = post(site, api)
    site.opened(payload_id)
    hold = first.store.hold(rf"PUT /{site.name}-state/refused/".encode())
    if when == "after":
        hold.release()
        hold = first.broker.hold(BASIC_ACK)
    with RunningDouble(site, verdict=lambda: Verdict.REJECT):
        hold.wait_reached()
    assert len(site.state.listing("refused/")) == (1 if when == "after" else 0)
    first.kill()
    hold.drop()

    second = site.worker()

    refused = in_state(api, payload_id, "refused")
    kind = "noted" if when == "before" else "noted-before"
    wait_for(lambda: counted(second, kind) == 1)
    assert refused["refusals"] == 1
    wait_for(lambda: site.waiting(site.refusal_queue) == 0)


def test_a_refusal_that_arrives_before_the_record_is_opened_is_shown_later(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, worker = pair
    opened = worker.store.hold(rf"PUT /{site.name}-state/opened/".encode())
    with RunningDouble(site, verdict=lambda: Verdict.REJECT):
        payload_id = post(site, api)
        opened.wait_reached()
        wait_for(lambda: site.state.listing("refused/"))
    assert payload(api, payload_id)["state"] == "pending"

    opened.release()

    in_state(api, payload_id, "refused")


def test_a_late_copy_of_a_replayed_refusal_changes_nothing(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, worker = pair
    with RunningDouble(site, verdict=lambda: Verdict.REJECT) as double:
        payload_id = post(site, api)
        in_state(api, payload_id, "refused")
        double.verdict = lambda: None
        replay(api, payload_id)
        in_state(api, payload_id, "opened")

        dead_letter(site, payload_id, payload_id)

        wait_for(lambda: counted(worker, "noted-before") == 1)
    assert payload(api, payload_id)["state"] == "opened"


def test_a_worker_killed_after_a_replay_publishes_at_most_the_same_bytes_again(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, first = pair
    with RunningDouble(site, verdict=lambda: Verdict.REJECT) as double:
        payload_id = post(site, api)
        in_state(api, payload_id, "refused")
        double.verdict = lambda: None
        confirm = first.broker.hold_answer(publish_to(site.name))
        replay(api, payload_id)
        confirm.wait_reached()
        wait_for(lambda: double.with_line("accepted"))
        first.kill()
        confirm.drop()

        site.worker()

        in_state(api, payload_id, "opened")
        wait_for(lambda: double.with_line("duplicate"))
    assert len(double.bodies) == 3
    assert len(set(double.bodies)) == 1
    assert site.state.listing("replays/") == []


def test_a_replay_whose_event_is_lost_is_still_published(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, _ = pair
    with RunningDouble(site, verdict=lambda: Verdict.REJECT) as double:
        payload_id = post(site, api)
        in_state(api, payload_id, "refused")
        double.verdict = lambda: None
        api.broker.cut()

        assert replay(api, payload_id).status_code == 202

        in_state(api, payload_id, "opened")


def test_a_payload_without_objects_is_not_replayed_and_reports_the_reason(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, _ = pair
    assert isinstance(site.payloads, S3Bucket)
    with RunningDouble(site, verdict=lambda: Verdict.REJECT) as double:
        payload_id = post(site, api)
        in_state(api, payload_id, "refused")
        for key in site.payloads.listing(f"{payload_id}/"):
            site.payloads.delete(key)

        answer = replay(api, payload_id)

        assert answer.status_code == 409
        assert "objects are gone" in answer.json()["detail"]
        assert "sent again" in answer.json()["detail"]
        assert payload(api, payload_id)["state"] == "refused"
    assert len(double.bodies) == 1


def test_a_waiting_replay_fails_if_the_objects_are_removed(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, worker = pair
    assert isinstance(site.payloads, S3Bucket)
    with RunningDouble(site, verdict=lambda: Verdict.REJECT) as double:
        payload_id = post(site, api)
        in_state(api, payload_id, "refused")
        worker.broker.cut()
        assert replay(api, payload_id).status_code == 202
        for key in site.payloads.listing(f"{payload_id}/"):
            site.payloads.delete(key)
        worker.broker.heal()

        wait_for(lambda: payload(api, payload_id)["refusals"] == 2)
        refused = in_state(api, payload_id, "refused")
    assert "objects are gone" in refused["last_error"]
    assert len(double.bodies) == 1


def test_a_missing_dead_letter_exchange_is_reported_by_ready_and_check(
    unattended_site: Site,
) -> None:
    site = unattended_site
    with site.channel() as channel:  # a site that has named it otherwise
        channel.exchange_declare(site.name, "topic", durable=True)
        channel.queue_declare(site.name, durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_bind(site.name, site.name, ROUTING_KEY)
    api, worker = site.pair()
    payload_id = post(site, api)

    site.opened(payload_id)
    for node in (api, worker):
        status, health = node.ready()
        assert (status, health["status"]) == (200, "degraded")
        assert health["dependencies"]["workflow_manager_refusals"]["status"] == "down"
    wait_for(lambda: "STOWGATE_WORKFLOW_MANAGER_DEAD_LETTER_EXCHANGE" in worker.log())
    checked = check(api)
    assert checked.returncode == 1
    assert f"has no exchange '{site.dead_letter_exchange}'" in checked.stdout

    with site.channel() as channel:
        channel.exchange_declare(site.dead_letter_exchange, "topic", durable=True)

    until_heard(api, worker)
    checked = check(api)
    assert "ok        refusals of the Workflow Manager" in checked.stdout


def check(node: Node) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, "check"],
        env=environment(node.service.data, node.settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def dead_letter(
    site: Site, payload_id: str, message_id: str, body: bytes | None = None, times: int = 1
) -> None:
    """As it comes from the Workflow Manager's queue."""
    with site.channel() as channel:
        for _ in range(times):
            publish_dead_letter(channel, site, payload_id, message_id, body)


def publish_dead_letter(
    channel: Any, site: Site, payload_id: str, message_id: str, body: bytes | None = None
) -> None:
    channel.basic_publish(
        site.dead_letter_exchange,
        ROUTING_KEY,
        orjson.dumps({"payload_id": payload_id}) if body is None else body,
        pika.BasicProperties(
            message_id=message_id, headers={"x-death": [{"reason": "rejected", "count": 1}]}
        ),
        mandatory=True,
    )


def put_opened_records(site: Site, count: int) -> list[str]:
    assert isinstance(site.state, S3Bucket)
    ids = PayloadIds(site.state.name)
    found = []
    for number in range(count):
        payload_id = ids.mint(RECEIVED_AT + timedelta(seconds=number))
        opened = replace(record(), payload_id=payload_id, state=State.OPENED)
        site.state.put(f"opened/{newest_first(payload_id)}", encode(opened))
        found.append(payload_id)
    return found


def test_two_workers_record_each_of_a_thousand_refusals_once(
    site: Site, pair: tuple[Node, Node]
) -> None:
    api, first = pair
    second = site.worker()
    ids = put_opened_records(site, 1000)

    with site.channel() as channel:
        for payload_id in [*ids, *ids[:100]]:
            publish_dead_letter(channel, site, payload_id, payload_id)

    def noted(kind: str) -> float:
        return counted(first, kind) + counted(second, kind)

    wait_for(lambda: noted("noted") + noted("noted-before") == 1100, 90)
    assert (noted("noted"), noted("noted-before")) == (1000, 100)
    assert len(site.state.listing("refused/")) == 1000
    pages = list(api.payload_ids("refused"))
    assert pages == sorted(ids, reverse=True)
    # The one that leads shows it.
    wait_for(lambda: 1000 in [n.service.metric("stowgate_refused") for n in (first, second)])


def _unreadable(site: Site, _: str) -> None:
    dead_letter(site, "", "", b"{")


def _foreign(site: Site, _: str) -> None:
    dead_letter(site, "01890000-0000-7000-8000-000000000000", "")


def _without_record(site: Site, _: str) -> None:
    dead_letter(site, PayloadIds(f"{site.name}-state").mint(RECEIVED_AT), "")


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(_unreadable, "unreadable"), (_foreign, "foreign"), (_without_record, "without-record")],
)
def test_an_invalid_dead_letter_is_acknowledged_and_the_next_refusal_recorded(
    site: Site, pair: tuple[Node, Node], bad: Callable[[Site, str], None], kind: str
) -> None:
    api, worker = pair
    (payload_id,) = put_opened_records(site, 1)

    bad(site, payload_id)
    dead_letter(site, payload_id, payload_id)

    in_state(api, payload_id, "refused")
    assert counted(worker, kind) == 1
    wait_for(lambda: site.waiting(site.refusal_queue) == 0)
    assert site.waiting(site.dead_letters) == 0
