"""Spans: what they have, how they hang together, and when there are none."""

import subprocess
import sys
from collections.abc import Mapping

import opentelemetry.semconv._incubating.attributes.messaging_attributes
import opentelemetry.semconv.attributes.client_attributes
import opentelemetry.semconv.attributes.error_attributes
import opentelemetry.semconv.attributes.http_attributes
import opentelemetry.semconv.attributes.url_attributes
import pytest
import structlog
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id
from spans import Spans, context_of, parent_of
from structlog.testing import capture_logs

from shared.adapters.queues import EventQueue
from shared.ports import Message, ReceivedMessage
from shared.runtime.tracing import NO_SPANS, Attribute, Kind, Tracer, open_tracer, why_no_spans
from shared.trace_context import TRACEPARENT, trace_context

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ELSEWHERE = f"00-{TRACE_ID}-{SPAN_ID}-01"
QUEUE = EventQueue("stowgate", "instances-stored", "stowgate.instances-stored", "dead")


def _message(headers: Mapping[str, str] | None = None) -> Message:
    return Message(
        exchange=QUEUE.exchange,
        routing_key=QUEUE.routing_key,
        body=b"{}",
        message_id="m",
        correlation_id="c",
        type="InstancesStored",
        app_id="stowgate",
        timestamp=0,
        headers=headers or {},
    )


@pytest.fixture
def spans() -> Spans:
    return Spans()


def test_a_span_within_another_is_its_child(spans: Spans) -> None:
    with spans.tracer.span("outer") as outer, spans.tracer.span("inner"):
        pass

    assert spans.names() == ["inner", "outer"]
    assert str(context_of(spans.one("outer"))) == outer
    assert parent_of(spans.one("inner")) == context_of(spans.one("outer")).span_id


def test_a_span_continues_the_trace_of_its_parent_elsewhere(spans: Spans) -> None:
    with spans.tracer.span("here", Kind.CONSUMER, parent=ELSEWHERE) as here:
        assert spans.tracer.current() == here

    span = spans.one("here")
    assert (context_of(span).trace_id, parent_of(span)) == (TRACE_ID, SPAN_ID)
    assert span.kind is SpanKind.CONSUMER
    assert spans.tracer.current() is None


def test_within_a_span_of_the_same_trace_that_span_is_the_parent(spans: Spans) -> None:
    with (
        spans.tracer.span("handled", parent=ELSEWHERE),
        spans.tracer.span("replay", parent=ELSEWHERE),
    ):
        pass

    assert parent_of(spans.one("replay")) == context_of(spans.one("handled")).span_id
    assert not spans.one("replay").links


@pytest.mark.parametrize("bad", ["", "DOE^JOHN", f"{ELSEWHERE}-more"])
def test_a_parent_that_is_not_valid_is_ignored(spans: Spans, bad: str) -> None:
    with spans.tracer.span("here", parent=bad):
        pass

    assert parent_of(spans.one("here")) is None
    assert "DOE" not in spans.text()


def test_a_span_of_another_trace_is_linked_with_the_current_one(spans: Spans) -> None:
    with spans.tracer.span("replay") as replay, spans.tracer.span("again", parent=ELSEWHERE):
        pass

    (link,) = spans.one("again").links
    assert replay is not None
    assert format_trace_id(link.context.trace_id) == replay.split("-")[1]


def test_spans_that_the_caller_does_not_sample_are_not_exported(spans: Spans) -> None:
    unsampled = f"00-{TRACE_ID}-{SPAN_ID}-00"
    with spans.tracer.span("here", parent=unsampled) as here:
        assert structlog.contextvars.get_contextvars() == {}

    assert spans.names() == []
    assert here is not None
    assert trace_context(here) == (TRACE_ID, here.split("-")[2], False)


def test_of_an_error_only_the_type_is_kept(spans: Spans) -> None:
    with pytest.raises(ValueError, match="JOHN"), spans.tracer.span("fails"):
        raise ValueError("DOE^JOHN")

    span = spans.one("fails")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes == {"error.type": "ValueError"}
    assert not span.events
    assert "DOE" not in spans.text()


def test_log_lines_within_a_span_have_the_id_of_its_trace(spans: Spans) -> None:
    with spans.tracer.span("here", parent=ELSEWHERE):
        assert structlog.contextvars.get_contextvars() == {"trace_id": TRACE_ID}

    assert structlog.contextvars.get_contextvars() == {}


def test_a_span_may_have_begun_before(spans: Spans) -> None:
    with spans.tracer.span("earlier", began_at=1.5):
        pass

    assert spans.one("earlier").start_time == 1_500_000_000


def test_a_message_carries_the_context_of_its_publication_to_its_handler(spans: Spans) -> None:
    received: list[ReceivedMessage] = []
    with spans.tracer.publishing(_message({"other": "kept"}), ELSEWHERE) as sent:
        pass

    spans.tracer.consuming(QUEUE, received.append)(ReceivedMessage(sent.body, sent.headers))

    published = spans.one("publish stowgate:instances-stored")
    handled = spans.one("process stowgate:instances-stored:stowgate.instances-stored")
    assert sent.headers == {"other": "kept", TRACEPARENT: str(context_of(published))}
    assert received == [ReceivedMessage(sent.body, sent.headers)]
    assert [context_of(span).trace_id for span in (published, handled)] == [TRACE_ID, TRACE_ID]
    assert parent_of(published) == SPAN_ID
    assert parent_of(handled) == context_of(published).span_id
    assert (published.kind, handled.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert published.attributes is not None
    assert published.attributes["messaging.system"] == "rabbitmq"
    assert published.attributes["messaging.operation.type"] == "send"


def test_without_spans_the_context_of_a_record_is_passed_on() -> None:
    with NO_SPANS.publishing(_message(), ELSEWHERE) as sent:
        assert sent.headers == {TRACEPARENT: ELSEWHERE}
    with NO_SPANS.publishing(_message()) as sent:
        assert sent.headers == {}


def test_attributes_have_the_names_of_the_semantic_conventions() -> None:
    semconv = opentelemetry.semconv
    modules = (
        semconv._incubating.attributes.messaging_attributes,
        semconv.attributes.client_attributes,
        semconv.attributes.error_attributes,
        semconv.attributes.http_attributes,
        semconv.attributes.url_attributes,
    )
    conventional = {
        value for module in modules for value in vars(module).values() if isinstance(value, str)
    }

    assert {name for name in Attribute if not name.startswith("stowgate.")} <= conventional


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


def _opened(environment: Mapping[str, str]) -> Tracer:
    tracer = open_tracer("stowgate-test", "amqp://broker", environment)
    tracer.close()
    return tracer


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "stowgate", "OTEL_TRACES_SAMPLER": "always_on"},
        {"OTEL_TRACES_EXPORTER": "none", **ENDPOINT},
        {"OTEL_SDK_DISABLED": "True", **ENDPOINT},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4318"},
    ],
)
def test_there_are_no_spans_unless_a_variable_names_an_exporter(
    environment: Mapping[str, str],
) -> None:
    assert why_no_spans(environment) is None
    assert _opened(environment) is NO_SPANS


@pytest.mark.parametrize(
    "environment",
    [
        ENDPOINT,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
        {"OTEL_TRACES_EXPORTER": "console, otlp"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", **ENDPOINT},
    ],
)
def test_spans_are_exported_if_a_variable_names_an_exporter(
    environment: Mapping[str, str],
) -> None:
    assert why_no_spans(environment) is None
    tracer = _opened(environment)
    assert tracer is not NO_SPANS
    assert tracer.messaging_system == "rabbitmq"


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER has 'zipkin', but"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", **ENDPOINT}, "PROTOCOL is 'grpc', but must be"),
    ],
)
def test_variables_that_cannot_be_used_are_reported_and_there_are_no_spans(
    environment: Mapping[str, str], why: str
) -> None:
    assert why in (why_no_spans(environment) or "")
    assert _opened(environment) is NO_SPANS


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OTEL_BSP_MAX_QUEUE_SIZE", "100"), ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")],
)
def test_a_limit_that_cannot_be_used_is_logged_and_there_are_no_spans(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    with capture_logs() as logged:
        tracer = _opened(ENDPOINT)

    assert tracer is NO_SPANS
    assert [line["event"] for line in logged] == [
        "no spans are exported: an OTEL_ variable cannot be used"
    ]


def test_a_service_without_the_extra_reports_that_it_exports_no_spans() -> None:
    """In a process of its own, as this one has imported the extra."""
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from shared.runtime.tracing import open_tracer, why_no_spans\n"
        f"print(why_no_spans({ENDPOINT}), open_tracer('s', 'memory', {ENDPOINT}))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout

    assert "install stowgate[tracing]" in shown
    assert "runtime.tracing.Tracer object" in shown


def test_without_the_variables_opentelemetry_is_not_imported() -> None:
    program = (
        "import sys, os, cli.serve, api.main, worker.main\n"
        "from shared.runtime.tracing import open_tracer, why_no_spans\n"
        "why_no_spans({}), open_tracer('s', 'memory', {})\n"
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout

    assert shown.strip() == "False"
