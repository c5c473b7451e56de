"""The export of spans, and its end."""

import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from structlog.testing import capture_logs

from shared.adapters.otlp import OpenTelemetryTracer, ReportingExporter, provider


class _Exporter(SpanExporter):
    """Returns these results, one after the other."""

    def __init__(self, *results: SpanExportResult) -> None:
        self._results = list(results)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        return self._results.pop(0)


class _Hanging(SpanExporter):
    """Hangs until `goes_on`, but for less time than the SDK waits at its end."""

    def __init__(self) -> None:
        self.goes_on, self.ended = threading.Event(), threading.Event()
        self.was_released = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        self.was_released = self.goes_on.wait(20)
        self.ended.set()
        return SpanExportResult.FAILURE


def test_an_outage_of_the_collector_is_one_line_in_the_log_and_its_end_another() -> None:
    failed, done = SpanExportResult.FAILURE, SpanExportResult.SUCCESS
    exporter = ReportingExporter(_Exporter(done, failed, failed, failed, done, done))

    with capture_logs() as lines:
        results = [exporter.export([]) for _ in range(6)]

    assert results == [done, failed, failed, failed, done, done]
    assert [line["event"].partition(",")[0] for line in lines] == [
        "spans are not exported",
        "spans are exported again",
    ]


def test_a_stop_does_not_wait_for_a_collector_that_hangs() -> None:
    hanging, exporting = _Hanging(), provider("stowgate-test", "1.0")
    exporting.add_span_processor(BatchSpanProcessor(hanging))
    tracer = OpenTelemetryTracer(exporting, "memory")
    with tracer.span("last"):
        pass

    tracer.close()
    hanging.goes_on.set()

    assert hanging.ended.wait(60)
    assert hanging.was_released


def test_the_variable_names_the_service_in_place_of_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_default = provider("stowgate-api", "1.0").resource.attributes
    monkeypatch.setenv("OTEL_SERVICE_NAME", "radiology")
    named = provider("stowgate-api", "1.0").resource.attributes

    assert (by_default["service.name"], by_default["service.version"]) == ("stowgate-api", "1.0")
    assert named["service.name"] == "radiology"
