"""The trace of a POST, over an API and a worker in this process."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from instances import multipart, new_instance, one_series
from made_settings import api_settings
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry
from service import Service, running, wait_for
from spans import Spans, context_of, parent_of

import api.main
import worker.main
from api.admission.concurrency import EXTENSION
from shared.runtime.backends import Backends, open_backends
from shared.settings.loader import load
from shared.trace_context import TRACEPARENT
from worker.settings import WorkerSettings

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ELSEWHERE = f"00-{TRACE_ID}-{SPAN_ID}-01"
PROCESS = "process stowgate:instances-stored:stowgate.instances-stored"
PUBLISH_EVENT = "publish stowgate:instances-stored"
PUBLISH_REQUEST = "publish monaideploy:md.workflow.request"
STORE = "POST /dicomweb/studies"


class Site:
    """An API, and a worker that starts with `start_worker`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.spans = Spans()
        self._settings = api_settings(folder, min_free_bytes=0, **settings)
        self.backends: Backends = open_backends(
            self._settings, store_threads=8, openings=2, tracer=self.spans.tracer
        )
        self.backends.prepare()
        app = api.main.compose(self._settings, self.backends, CollectorRegistry())
        # The slot that the server would give to the connection, which is None here.
        app.extensions[EXTENSION].limiter.acquire(None)
        self.client = app.test_client()
        self._worker: worker.main.Worker | None = None

    def start_worker(self) -> None:
        of_worker = replace(
            load(WorkerSettings), data=self._settings.data, min_free_bytes=0, relay_seconds=1
        )
        self._worker = worker.main.compose(of_worker, self.backends, CollectorRegistry())
        self._worker.start()

    def post(self, *instances: bytes, path: str = "/dicomweb/studies", **headers: str) -> Any:
        body, content_type = multipart(*instances)
        answer = self.client.post(path, data=body, content_type=content_type, headers=headers)
        answer.close()  # which announces the record
        return answer

    def payload(self, payload_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/payloads/{payload_id}").json or {})

    def opened(self, payload_id: str) -> dict[str, Any]:
        """The payload, once its handling has ended."""
        wait_for(lambda: PROCESS in self.spans.names())
        return self.payload(payload_id)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self.backends.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def _tree(spans: list[ReadableSpan]) -> dict[str, str | None]:
    """Return the name of each span's parent, by its own name."""
    names = {context_of(span).span_id: span.name for span in spans}
    return {span.name: names.get(parent_of(span) or "") for span in spans}


def test_the_steps_of_a_post_are_one_trace_over_both_services(site: Site) -> None:
    site.start_worker()
    payload_id = site.post(new_instance()).headers["X-Payload-ID"]

    payload = site.opened(payload_id)

    spans = site.spans.ended()
    assert {context_of(span).trace_id for span in spans} == {payload["trace_id"]}
    assert _tree(spans) == {
        STORE: None,
        "receive instances": STORE,
        "store instances": STORE,
        "write record": STORE,
        PUBLISH_EVENT: STORE,
        PROCESS: PUBLISH_EVENT,
        "write sidecars": PROCESS,
        PUBLISH_REQUEST: PROCESS,
        "write opened record": PROCESS,
    }


def test_a_post_of_many_instances_has_as_many_spans_as_of_one(site: Site) -> None:
    site.start_worker()
    payload_id = site.post(*one_series(120)).headers["X-Payload-ID"]

    site.opened(payload_id)

    assert len(site.spans.ended()) == 9
    stored = site.spans.one("store instances").attributes
    assert stored is not None
    assert stored["stowgate.instances.stored"] == 120


def test_the_trace_of_the_caller_is_continued(site: Site) -> None:
    payload_id = site.post(new_instance(), traceparent=ELSEWHERE).headers["X-Payload-ID"]

    assert site.payload(payload_id)["trace_id"] == TRACE_ID
    assert parent_of(site.spans.one(STORE)) == SPAN_ID


@pytest.mark.parametrize("given", ["DOE^JOHN", f"{ELSEWHERE}-more", f"{ELSEWHERE},{ELSEWHERE}"])
def test_a_traceparent_that_is_not_valid_begins_a_new_trace(site: Site, given: str) -> None:
    payload_id = site.post(new_instance(), traceparent=given).headers["X-Payload-ID"]

    trace_id = site.payload(payload_id)["trace_id"]
    assert re.fullmatch("[0-9a-f]{32}", trace_id)
    assert trace_id != TRACE_ID


def test_the_workflow_request_carries_the_context(site: Site, tmp_path: Path) -> None:
    site.start_worker()
    payload_id = site.post(new_instance()).headers["X-Payload-ID"]

    site.opened(payload_id)

    request = json.loads((tmp_path / f"workflow-requests/{payload_id}.json").read_text())
    published = context_of(site.spans.one(PUBLISH_REQUEST))
    assert request["properties"]["headers"] == {TRACEPARENT: str(published)}


def test_a_refused_post_has_a_span_with_its_status(site: Site) -> None:
    answer = site.client.post("/dicomweb/studies", data=b"x", content_type="text/plain")

    assert answer.status_code == 415
    span = site.spans.one(STORE)
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 415
    assert span.attributes["stowgate.correlation_id"] == answer.headers["X-Correlation-ID"]
    assert span.status.status_code is StatusCode.UNSET


def test_reading_and_health_have_no_spans(site: Site) -> None:
    for path in ("/payloads", "/health/live", "/metrics", "/nowhere"):
        site.client.get(path)
    site.client.options("/dicomweb/studies")

    assert site.spans.names() == []


def test_spans_have_the_route_and_nothing_that_names_patient_study_or_sender(site: Site) -> None:
    site.start_worker()
    site.client.post("/config/vae", json={"virtualAeTitle": "SECRETAET"})
    instance = new_instance(PatientName="DOE^JOHN", StudyInstanceUID="1.2.3.4.5678")
    answer = site.post(instance, path="/dicomweb/vae/SECRETAET/lung/studies/1.2.3.4.5678")
    assert answer.status_code == 200

    site.opened(answer.headers["X-Payload-ID"])

    assert "POST /dicomweb/vae/{aet}/{workflow}/studies/{study}" in site.spans.names()
    text = site.spans.text()
    for secret in ("DOE", "1.2.3.4.5678", "SECRETAET", "lung", "127.0.0.1"):
        assert secret not in text


def test_a_setting_adds_the_sender(tmp_path: Path) -> None:
    site = Site(tmp_path, trace_senders=True)
    site.client.post("/config/vae", json={"virtualAeTitle": "SECRETAET"})
    site.post(new_instance(), path="/dicomweb/vae/SECRETAET/studies")

    attributes = site.spans.one("POST /dicomweb/vae/{aet}/studies").attributes
    site.close()

    assert attributes is not None
    assert attributes["client.address"] == "127.0.0.1"
    assert attributes["stowgate.ae_title"] == "SECRETAET"


def _lines(service: Service, words: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line[-1:] == "}"]
    return [line for line in lines if words in line["event"]]


def test_a_service_starts_without_spans_if_a_variable_cannot_be_used(tmp_path: Path) -> None:
    with running(
        "run",
        tmp_path,
        STOWGATE_LOG="json",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
    ) as service:
        answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")
        payload = service.get(f"/payloads/{answer.headers['X-Payload-ID']}").json()
        reported = _lines(service, "no spans are exported")

    assert (answer.status_code, payload["trace_id"]) == (200, None)
    assert len(reported) == 1


def test_a_collector_that_is_away_delays_nothing_and_is_reported_once(tmp_path: Path) -> None:
    with running(
        "run",
        tmp_path,
        STOWGATE_LOG="json",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
        OTEL_BSP_SCHEDULE_DELAY="50",
    ) as service:
        for _ in range(3):
            answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")
            assert answer.status_code == 200
            service.opened(answer.headers["X-Payload-ID"])
        reported = wait_for(lambda: _lines(service, "spans are not exported"))
        trace_id = service.get(f"/payloads/{answer.headers['X-Payload-ID']}").json()["trace_id"]
        (audited,) = [line for line in _lines(service, "store") if line.get("trace_id") == trace_id]

    assert len(reported) == 1
    assert audited["logger"] == "audit"
