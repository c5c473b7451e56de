"""Requests of more instances than a record has room for: they are asked for and shown as others."""

import json
from collections.abc import Iterator
from uuid import uuid4

import pytest
import requests
from instances import multipart, one_series
from service import Service, running, wait_for

COUNT = 600
STUDIES = "/dicomweb/studies"


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running("run", tmp_path_factory.mktemp("roomy")) as service:
        yield service


@pytest.fixture(scope="module")
def body() -> tuple[bytes, str]:
    """The last part is not DICOM, so that there is more than one list in the answer."""
    return multipart(*one_series(COUNT), b"no DICOM")


def _uids(answer: requests.Response) -> list[str]:
    items = answer.json()["00081199"]["Value"]
    return [item["00081155"]["Value"][0] for item in items]


@pytest.mark.parametrize("media_type", ["application/dicom+json", "application/dicom+xml"])
def test_a_long_answer_comes_again_byte_for_byte(
    roomy: Service, body: tuple[bytes, str], media_type: str
) -> None:
    headers = {"Idempotency-Key": str(uuid4()), "Accept": media_type}
    first = roomy.post(STUDIES, *body, **headers)
    roomy.opened(first.headers["X-Payload-ID"])

    again = roomy.post(STUDIES, *body, **headers)

    assert first.status_code == again.status_code == 202
    assert len(first.content) > 64 << 10
    assert first.headers["Content-Length"] == str(len(first.content))
    assert again.content == first.content
    assert again.headers["Idempotent-Replayed"] == "true"
    for header in ("X-Payload-ID", "Link", "Content-Type"):
        assert again.headers[header] == first.headers[header]


def test_a_payload_of_many_instances_shows_the_request_that_was_published(
    roomy: Service, body: tuple[bytes, str]
) -> None:
    answer = roomy.post(STUDIES, *body)
    uids = _uids(answer)
    assert uids == [f"2.25.{10**29 + number}" for number in range(COUNT)]

    payload = roomy.opened(answer.headers["X-Payload-ID"])

    assert payload["file_count"] == COUNT
    published = roomy.data / "workflow-requests" / f"{payload['payload_id']}.json"
    assert json.loads(published.read_text())["body"] == payload["workflow_request"]
    entries = payload["workflow_request"]["payload"]
    assert [entry["path"].rpartition("/")[2] for entry in entries] == [f"{i}.dcm" for i in uids]
    assert all(entry["metadata"] == f"{entry['path']}.json" for entry in entries)
    folder = roomy.data / "monaideploy" / payload["payload_id"]
    assert all((folder / entry["metadata"]).exists() for entry in entries)


def test_a_list_shows_payloads_whose_instances_are_attached_and_reads_none_of_these(
    roomy: Service, body: tuple[bytes, str]
) -> None:
    payload_id = roomy.post(STUDIES, *body).headers["X-Payload-ID"]
    roomy.opened(payload_id)
    (roomy.data / "stowgate" / "uploads" / payload_id / "instances.jsonl").unlink()

    listed = roomy.get("/payloads").json()["payloads"]

    assert {row["payload_id"]: row["file_count"] for row in listed}[payload_id] == COUNT
    shown = roomy.get(f"/payloads/{payload_id}")
    assert shown.status_code == 500
    assert "instances.jsonl in the state bucket is missing" in shown.json()["detail"]


def test_a_payload_that_lost_its_attachment_is_opened_by_replay_once_it_is_back(
    roomy: Service, body: tuple[bytes, str]
) -> None:
    with running("api", roomy.data / "apart") as api:
        payload_id = api.post(STUDIES, *body).headers["X-Payload-ID"]
        attached = api.data / "stowgate" / "uploads" / payload_id / "instances.jsonl"
        lost = attached.rename(api.data / "lost")
        with running("worker", api.data):

            def failed() -> dict[str, str] | None:
                row: dict[str, str] = api.get("/payloads").json()["payloads"][0]
                return row if row["state"] == "failed" else None

            assert "is missing; restore it" in wait_for(failed)["last_error"]
            attached.parent.mkdir(exist_ok=True)
            lost.rename(attached)

            replayed = requests.post(f"{api.url}/payloads/{payload_id}/replay", timeout=30)

            assert replayed.status_code == 202
            assert replayed.json()["state"] == "pending"
            assert api.opened(payload_id)["file_count"] == COUNT
