"""The spans of a worker, and how they hang together with those of the POST."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from handler_bench import LEASE, Bench
from instances import real_file
from observed_store import ObservedStore
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, record
from spans import Spans, context_of, parent_of
from structlog.testing import capture_logs

from shared.adapters.folder.publisher import FolderEventPublisher
from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.queues import EventQueue, Published
from shared.errors import StoreUnavailable
from shared.events import InstancesStored
from shared.ports import Publication, ReceivedMessage
from shared.record_store import Records
from shared.records import Lease, State, decode, encode
from shared.refusals import Refusal, RefusalReason, Refusals
from shared.runtime.metrics import WorkerMetrics
from shared.trace_context import TRACEPARENT
from worker.handler import Handler
from worker.relay import Relay
from worker.replays import Replays
from worker.workflow_manager import WorkflowManager

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OF_THE_POST = f"00-{TRACE_ID}-{SPAN_ID}-01"
QUEUE = EventQueue("stowgate", "instances-stored", "stowgate.instances-stored", "dead")
PROCESS = "process stowgate:instances-stored:stowgate.instances-stored"
PUBLISH = "publish monaideploy:md.workflow.request"


@pytest.fixture
def spans() -> Spans:
    return Spans()


def _handle(spans: Spans, handler: Handler, payload_id: str) -> ReadableSpan:
    """Handle an event within a span, and return that."""

    def handle(_: ReceivedMessage) -> None:
        handler.open_workflow_request(payload_id)

    message = ReceivedMessage(b"", {TRACEPARENT: OF_THE_POST})
    spans.tracer.consuming(QUEUE, handle)(message)
    return spans.one(PROCESS)


def test_the_span_of_an_attempt_has_payload_attempts_and_takeovers(
    bench: Bench, spans: Spans
) -> None:
    crashed = Lease("crashed", bench.now - timedelta(seconds=1))
    added = bench.add(real_file(), lease=crashed, attempts=1)

    handled = _handle(spans, bench.handler(tracer=spans.tracer), added.payload_id)

    assert handled.attributes is not None
    assert handled.attributes["stowgate.payload_id"] == added.payload_id
    assert handled.attributes["stowgate.attempts"] == 2
    assert handled.attributes["stowgate.takeovers"] == 1
    assert handled.status.status_code is StatusCode.UNSET
    assert {parent_of(spans.one(name)) for name in ("write sidecars", PUBLISH)} == {
        context_of(handled).span_id
    }


def test_the_span_of_an_attempt_that_fails_has_the_type_of_the_error_only(
    bench: Bench, spans: Spans
) -> None:
    added = bench.add(real_file())

    def away(key: str) -> None:
        raise StoreUnavailable(f"cannot read {key}")

    store = ObservedStore(bench.instances, before={"read_range": away})
    handler = bench.handler(instances=store, tracer=spans.tracer)
    handled = _handle(spans, handler, added.payload_id)

    for span in (handled, spans.one("write sidecars")):
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == "StoreUnavailable"
    assert "cannot read" not in spans.text()


def test_the_span_of_a_payload_that_fails_permanently_is_marked(bench: Bench, spans: Spans) -> None:
    added = bench.add(real_file(), attempts=9, takeovers=9, lease=Lease("crashed", RECEIVED_AT))

    handled = _handle(spans, bench.handler(tracer=spans.tracer), added.payload_id)

    assert bench.found(added).state is State.FAILED
    assert handled.status.status_code is StatusCode.ERROR


def test_the_request_has_the_same_body_with_and_without_a_trace(
    bench: Bench, spans: Spans, tmp_path: Path
) -> None:
    added = bench.add(real_file())
    shown = tmp_path / "requests" / f"{added.payload_id}.json"
    _handle(spans, bench.handler(tracer=spans.tracer), added.payload_id)
    traced = json.loads(shown.read_text())
    message = WorkflowManager("monaideploy", "md.workflow.request", "payloads")
    opened = bench.found(added)
    plain = message.message(opened, opened.workflow_request or {}, opened.instances or ())

    assert traced["body"] == json.loads(plain.body)
    assert traced["properties"]["headers"] == {TRACEPARENT: str(context_of(spans.one(PUBLISH)))}


def test_the_relay_announces_a_record_with_the_trace_of_its_post(tmp_path: Path) -> None:
    store = FolderObjectStore(tmp_path)
    store.prepare()
    records = Records(store)
    records.add(replace(record(), traceparent=OF_THE_POST))
    announced: list[InstancesStored] = []

    def announce(event: InstancesStored) -> Publication:
        announced.append(event)
        return Published()

    relay = Relay(
        records=records,
        announce=announce,
        backlog=lambda: 0,
        metrics=WorkerMetrics(CollectorRegistry()),
        clock=lambda: RECEIVED_AT + timedelta(minutes=1),
    )
    with capture_logs() as lines:
        relay.run_once()

    assert [event.traceparent for event in announced] == [OF_THE_POST]
    assert [line["trace_id"] for line in lines] == [TRACE_ID]


def test_a_replay_is_published_in_the_trace_of_the_post(tmp_path: Path, spans: Spans) -> None:
    state, instances = FolderObjectStore(tmp_path / "state"), FolderObjectStore(tmp_path / "data")
    state.prepare()
    instances.prepare()
    refusals = Refusals(state)
    found = replace(record(), traceparent=OF_THE_POST)
    records = Records(state)
    records.add(found)
    versioned = records.find(found.payload_id)
    assert versioned is not None
    records.settle(versioned, State.OPENED, workflow_request={})
    instances.create(f"{found.payload_id}/dcm/1/2/3.dcm", b"x", "application/dicom")
    refusals.note(Refusal(found.payload_id, 0, RefusalReason.REJECTED, RECEIVED_AT))
    refusals.request_replay(found.payload_id, 1, RECEIVED_AT)

    Replays(
        records=records,
        refusals=refusals,
        instances=instances,
        publisher=FolderEventPublisher(tmp_path / "requests"),
        workflow_manager=WorkflowManager("monaideploy", "md.workflow.request", "payloads"),
        owner="me",
        lease=LEASE,
        metrics=WorkerMetrics(CollectorRegistry()),
        tracer=spans.tracer,
    ).publish(found.payload_id)

    assert context_of(spans.one(PUBLISH)).trace_id == TRACE_ID


def test_a_record_keeps_its_trace_and_one_of_an_older_service_has_none() -> None:
    traced = replace(record(), traceparent=OF_THE_POST)
    older = json.loads(encode(traced))
    del older["traceparent"]

    assert decode(encode(traced)) == traced
    assert decode(json.dumps(older).encode()).traceparent is None
