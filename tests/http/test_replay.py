"""Replays of failed and refused payloads, by the API and `stowgate payloads`."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import requests
from instances import new_instance
from service import STOWGATE, Service, running, wait_for

from shared.adapters.folder.store import FolderObjectStore
from shared.refusals import Refusal, RefusalReason, Refusals


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Service]:
    with running("api", tmp_path) as service:
        yield service


def _fail(api: Service, count: int) -> list[str]:
    """Payloads whose instances are gone when a worker opens them; the worker is stopped again."""
    ids = []
    for _ in range(count):
        answer = api.post("/dicomweb/studies", new_instance(), "application/dicom")
        ids.append(answer.headers["X-Payload-ID"])
        folder = api.data / "monaideploy" / ids[-1]
        shutil.move(folder, api.data / ids[-1])
    with running("worker", api.data):
        wait_for(lambda: all(_state(api, payload_id) == "failed" for payload_id in ids))
    for payload_id in ids:
        shutil.move(api.data / payload_id, api.data / "monaideploy" / payload_id)
    return ids


def _state(api: Service, payload_id: str) -> str:
    return str(api.get(f"/payloads/{payload_id}").json()["state"])


def _replay(api: Service, payload_id: str) -> requests.Response:
    return requests.post(f"{api.url}/payloads/{payload_id}/replay", timeout=30)


def _payloads(*arguments: str, url: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, "payloads", *arguments, "--url", url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_failed_payload_shows_the_reason_and_is_replayed_with_its_own_id(api: Service) -> None:
    (payload_id,) = _fail(api, 1)
    failed = api.get(f"/payloads/{payload_id}").json()
    assert "does not exist" in failed["last_error"]

    first, second = _replay(api, payload_id), _replay(api, payload_id)

    assert (first.status_code, first.json()["state"]) == (202, "pending")
    assert first.json()["payload_id"] == payload_id
    assert second.status_code == 409
    assert api.get("/payloads?state=failed").json()["payloads"] == []
    with running("worker", api.data):
        opened = api.opened(payload_id)
    assert opened["workflow_request"]["payload_id"] == payload_id
    assert _replay(api, payload_id).status_code == 409
    requests_shown = list((api.data / "workflow-requests").glob("*.json"))
    assert [path.stem for path in requests_shown] == [payload_id]


def test_failed_payloads_are_counted_until_they_are_replayed(api: Service) -> None:
    answer = api.post("/dicomweb/studies", new_instance(), "application/dicom")
    payload_id = answer.headers["X-Payload-ID"]
    shutil.move(api.data / "monaideploy" / payload_id, api.data / payload_id)
    with running("worker", api.data) as worker:
        wait_for(lambda: worker.metric("stowgate_failed") == 1)
        assert worker.metric("stowgate_attempts_failed_total", kind="permanent") == 1
        assert worker.metric("stowgate_attempts_failed_total", kind="transient") == 0

        shutil.move(api.data / payload_id, api.data / "monaideploy" / payload_id)
        assert _replay(api, payload_id).status_code == 202
        api.opened(payload_id)
        wait_for(lambda: worker.metric("stowgate_failed") == 0)


def test_one_of_many_concurrent_replays_is_accepted(api: Service) -> None:
    (payload_id,) = _fail(api, 1)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: _replay(api, payload_id).status_code, range(8)))

    assert sorted(answers) == [202] + [409] * 7


def test_only_failed_payloads_can_be_replayed(api: Service) -> None:
    answer = api.post("/dicomweb/studies", new_instance(), "application/dicom")

    pending = _replay(api, answer.headers["X-Payload-ID"])
    unknown = _replay(api, "01890000-0000-7000-8000-000000000000")

    assert (pending.status_code, unknown.status_code) == (409, 404)
    assert "pending" in pending.json()["detail"]


def test_commands_list_show_and_replay_failed_payloads(api: Service) -> None:
    ids = _fail(api, 3)

    listed = _payloads("list", "--state", "failed", url=api.url)
    shown = _payloads("show", ids[0], url=api.url)
    one = _payloads("replay", ids[1], url=api.url)
    rest = _payloads("replay", "--all", "--state", "failed", url=api.url)
    again = _payloads("replay", ids[1], url=api.url)
    neither = _payloads("replay", url=api.url)
    state_of_one = _payloads("replay", ids[1], "--state", "failed", url=api.url)
    none_left = _payloads("replay", "--all", url=api.url)

    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["payload", *ids[::-1]]
    assert "does not exist" in shown.stdout
    assert one.stdout == f"{ids[1]}  pending\n"
    assert rest.stdout == f"{ids[0]}  pending\n{ids[2]}  pending\n"
    runs = (listed, shown, one, rest, again, neither, state_of_one)
    assert [run.returncode for run in runs] == [0, 0, 0, 0, 2, 2, 2]
    assert "409" in again.stderr
    assert "not replayed: 1 of 1" in again.stderr
    assert (none_left.returncode, none_left.stdout) == (0, "")
    assert none_left.stderr == "no payload is failed or refused: nothing to replay\n"


def _refuse(api: Service, count: int) -> list[str]:
    """Refused payloads, as a worker records them; no worker is running."""
    ids = []
    for _ in range(count):
        answer = api.post("/dicomweb/studies", new_instance(), "application/dicom")
        ids.append(answer.headers["X-Payload-ID"])
    with running("worker", api.data):
        wait_for(lambda: all(_state(api, payload_id) == "opened" for payload_id in ids))
    for payload_id in ids:
        _note_refusal(api, payload_id, 0)
    return ids


def _note_refusal(api: Service, payload_id: str, number: int) -> None:
    refusals = Refusals(FolderObjectStore(api.data / "stowgate"))
    assert refusals.note(
        Refusal(payload_id, number, RefusalReason.DELIVERY_LIMIT, datetime.now(UTC))
    )


def test_a_refused_payload_is_shown_listed_and_replayed_with_its_own_id(api: Service) -> None:
    first, second = _refuse(api, 2)
    shown = api.get(f"/payloads/{first}").json()
    before = api.get("/payloads").json()["payloads"]

    assert (shown["state"], shown["refusals"]) == ("refused", 1)
    assert shown["refused_at"] > shown["opened_at"]
    assert "no workflow for AE title 'default' and source '127.0.0.1'" in shown["last_error"]
    assert [row["state"] for row in before] == ["refused", "refused"]
    assert _listed(api, "refused") == [second, first]
    assert _listed(api, "opened") == _listed(api, "pending") == []

    answers = [_replay(api, first).status_code for _ in range(2)]

    assert answers == [202, 409]
    assert _state(api, first) == "pending"
    assert (_listed(api, "refused"), _listed(api, "pending")) == ([second], [first])
    with running("worker", api.data) as worker:
        api.opened(first)
        wait_for(lambda: worker.metric("stowgate_replays_published_total") == 1)
        wait_for(lambda: worker.metric("stowgate_refused") == 1)
    assert _listed(api, "opened") == [first]
    once, twice = (
        json.loads((api.data / "workflow-requests" / f"{name}.json").read_text())
        for name in (first, f"{first}.1")
    )
    assert once["body"] == twice["body"]
    _note_refusal(api, first, 1)
    again = api.get(f"/payloads/{first}").json()
    assert (again["state"], again["refusals"]) == ("refused", 2)


def test_refused_payloads_are_listed_page_by_page(api: Service) -> None:
    ids = _refuse(api, 3)

    for state, expected in (("refused", ids[::-1]), ("opened", [])):
        found, cursor = [], ""
        while cursor is not None:
            page = api.get(f"/payloads?state={state}&limit=2&cursor={cursor}").json()
            found += [row["payload_id"] for row in page["payloads"]]
            cursor = page["next"]
        assert found == expected


def test_replays_are_listed_among_the_pending_page_by_page(api: Service) -> None:
    ids = _refuse(api, 3)
    newer = api.post("/dicomweb/studies", new_instance(), "application/dicom")
    for payload_id in ids:
        assert _replay(api, payload_id).status_code == 202
    expected = [newer.headers["X-Payload-ID"], *ids[::-1]]

    for limit in (1, 2, 3, 4):
        found, cursor = [], ""
        while cursor is not None:
            page = api.get(f"/payloads?state=pending&limit={limit}&cursor={cursor}").json()
            found += [row["payload_id"] for row in page["payloads"]]
            cursor = page["next"]
        assert found == expected


def test_commands_replay_refused_payloads_oldest_first(api: Service) -> None:
    ids = _refuse(api, 2)

    listed = _payloads("list", "--state", "refused", url=api.url)
    failed = _payloads("replay", "--all", "--state", "failed", url=api.url)
    replayed = _payloads("replay", "--all", url=api.url)

    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["payload", *ids[::-1]]
    assert failed.stderr == "no payload is failed: nothing to replay\n"
    assert replayed.stdout == f"{ids[0]}  pending\n{ids[1]}  pending\n"


def test_a_payload_without_objects_is_not_replayed(api: Service) -> None:
    (payload_id,) = _refuse(api, 1)
    shutil.rmtree(api.data / "monaideploy" / payload_id)

    answer = _replay(api, payload_id)

    assert answer.status_code == 409
    assert "objects are gone" in answer.json()["detail"]


def test_an_unreadable_refusal_is_shown_without_its_reason(api: Service) -> None:
    (payload_id,) = _refuse(api, 1)
    (note,) = (api.data / "stowgate" / "refused").rglob("*.json")
    note.write_text("{")

    shown = api.get(f"/payloads/{payload_id}").json()

    assert (shown["state"], shown["refused_at"], shown["last_error"]) == ("refused", None, None)
    assert _listed(api, "refused") == [payload_id]


def _listed(api: Service, state: str) -> list[str]:
    rows = api.get(f"/payloads?state={state}").json()["payloads"]
    return [row["payload_id"] for row in rows]
