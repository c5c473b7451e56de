"""A tracer for tests, and the spans that it has written."""

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from shared.adapters.otlp import OpenTelemetryTracer, provider
from shared.trace_context import TraceContext


class Spans:
    """`tracer`, and what it exports, in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        exporting = provider("stowgate-test", "1.0")
        exporting.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = OpenTelemetryTracer(exporting, "rabbitmq")

    def ended(self) -> list[ReadableSpan]:
        """In the order of their ends."""
        return list(self._exporter.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self.ended()]

    def one(self, name: str) -> ReadableSpan:
        """Return the only span of that name."""
        (found,) = [span for span in self.ended() if span.name == name]
        return found

    def text(self) -> str:
        """All that is exported of them."""
        return "".join(span.to_json() for span in self.ended())


def context_of(span: ReadableSpan) -> TraceContext:
    context = span.get_span_context()
    assert context is not None
    return TraceContext(
        format_trace_id(context.trace_id),
        format_span_id(context.span_id),
        context.trace_flags.sampled,
    )


def parent_of(span: ReadableSpan) -> str | None:
    """Return the id of its parent."""
    return None if span.parent is None else format_span_id(span.parent.span_id)
