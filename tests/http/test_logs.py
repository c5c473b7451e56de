"""The log: one line for a POST, one for its request, and one for each phase of start and stop."""

import json
from pathlib import Path
from typing import Any

import pytest
from instances import multipart, new_instance
from service import Service, running


def _lines(service: Service) -> list[dict[str, Any]]:
    return [json.loads(line) for line in service.log.read_text().splitlines()]


def test_two_lines_tell_the_story_of_a_payload(tmp_path: Path) -> None:
    instance = new_instance()
    with running("run", tmp_path) as service:
        answer = service.post("/dicomweb/studies", *multipart(instance, b"no DICOM"))
        payload_id = answer.headers["X-Payload-ID"]
        service.opened(payload_id)
        service.stop()

        post, request = (line for line in _lines(service) if line.get("payload_id") == payload_id)

    correlation_id = answer.headers["X-Correlation-ID"]
    assert (post["event"], request["event"]) == ("store", "workflow request opened")
    assert (post["correlation_id"], request["correlation_id"]) == (correlation_id, correlation_id)
    assert (post["stored"], post["failed"], post["stored_bytes"]) == (1, 1, len(instance))
    assert list(post["step_seconds"]) == ["wait", "admit", "receive", "store", "render", "record"]
    assert list(request["step_seconds"]) == ["wait", "sidecars", "publish", "note"]
    for line in (post, request):
        assert 0 < max(line["step_seconds"].values()) <= line["seconds"]


def test_one_line_has_the_reason_of_a_refused_post(tmp_path: Path) -> None:
    with running("run", tmp_path) as service:
        answer = service.post("/dicomweb/vae/NOBODY/studies", *multipart(new_instance()))
        assert answer.status_code == 400
        assert service.metric("stowgate_posts_refused_total", reason="unknown_vae") == 1
        service.stop()

        correlation_id = answer.headers["X-Correlation-ID"]
        (line,) = (line for line in _lines(service) if line.get("correlation_id") == correlation_id)

    assert (line["event"], line["outcome"]) == ("store", "refused")
    assert (line["reason"], line["detail"]) == ("unknown_vae", answer.json()["detail"])


DRAINING_API = "draining: no new connections are accepted"
DRAINING_WORKER = "draining: payloads in progress end, or return to the queue"
DRAINED_WORKER = "no payloads in progress; waiting for relay and sweep to end"
DRAINED = [DRAINING_WORKER, DRAINED_WORKER, "stopped"]


@pytest.mark.parametrize(
    ("command", "phases"),
    [
        ("api", ["starting", "listening", "object store ready", DRAINING_API, "stopped"]),
        ("worker", ["starting", "object store ready", "listening", *DRAINED]),
        ("run", ["starting", "listening", "object store ready", DRAINING_API, *DRAINED]),
    ],
)
def test_each_phase_of_start_and_stop_has_a_line(
    command: str, phases: list[str], tmp_path: Path
) -> None:
    with running(command, tmp_path) as service:
        assert service.get("/health/live").status_code == 200
        service.stop()
        found = [line["event"] for line in _lines(service) if line["event"] in phases]

    assert found == phases
