"""What could not be opened, and once more: the API and `stowgate failed`."""

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from instances import new_instance
from service import STOWGATE, Service, running, wait_for


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


def _failed(*arguments: str, url: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, "failed", *arguments, "--url", url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_failed_payload_says_why_and_opens_under_its_own_id_when_replayed(api: Service) -> None:
    (payload_id,) = _fail(api, 1)
    failed = api.get(f"/payloads/{payload_id}").json()
    assert "there is no" in failed["last_error"]

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


def test_what_failed_is_counted_as_long_as_it_needs_a_person(api: Service) -> None:
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


def test_of_many_replays_at_once_one_is_taken(api: Service) -> None:
    (payload_id,) = _fail(api, 1)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: _replay(api, payload_id).status_code, range(8)))

    assert sorted(answers) == [202] + [409] * 7


def test_only_what_is_failed_can_be_replayed(api: Service) -> None:
    answer = api.post("/dicomweb/studies", new_instance(), "application/dicom")

    pending = _replay(api, answer.headers["X-Payload-ID"])
    unknown = _replay(api, "01890000-0000-7000-8000-000000000000")

    assert (pending.status_code, unknown.status_code) == (409, 404)
    assert "pending" in pending.json()["detail"]


def test_failed_commands_list_show_and_replay_the_oldest_first(api: Service) -> None:
    ids = _fail(api, 3)

    listed = _failed("list", url=api.url)
    shown = _failed("show", ids[0], url=api.url)
    one = _failed("replay", ids[1], url=api.url)
    rest = _failed("replay", "--all", url=api.url)
    again = _failed("replay", ids[1], url=api.url)
    neither = _failed("replay", url=api.url)
    none_left = _failed("replay", "--all", url=api.url)

    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["payload", *ids]
    assert "there is no" in shown.stdout
    assert one.stdout == f"{ids[1]}  pending\n"
    assert rest.stdout == f"{ids[0]}  pending\n{ids[2]}  pending\n"
    assert [r.returncode for r in (listed, shown, one, rest, again, neither)] == [0, 0, 0, 0, 2, 2]
    assert "409" in again.stderr
    assert "not replayed: 1 of 1" in again.stderr
    assert (none_left.returncode, none_left.stdout) == (0, "")
    assert none_left.stderr == "no payload has failed: there is nothing to replay\n"
