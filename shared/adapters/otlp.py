"""Spans over OTLP (HTTP with protobuf), or on the console. Needs the extra `tracing`."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    format_span_id,
    format_trace_id,
)

from shared.runtime.tracing import Attribute, Attributes, Kind, Tracer, Value
from shared.trace_context import TraceContext, trace_context

EXPORTERS: Mapping[str, type[SpanExporter]] = {
    "otlp": OTLPSpanExporter,
    "console": ConsoleSpanExporter,
}

_CLOSE_SECONDS = 2.0

_log = structlog.get_logger()


def provider(service: str, version: str) -> TracerProvider:
    """Return a provider without exporters, which are added to it.

    It reads the `OTEL_` variables. `service` is the default of `OTEL_SERVICE_NAME`.
    """
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    resource = Resource({SERVICE_VERSION: version}).merge(resource)
    return TracerProvider(resource=resource, shutdown_on_exit=False)


def exporting_tracer(
    service: str, version: str, messaging_system: str, exporters: list[str]
) -> "OpenTelemetryTracer":
    """Return a tracer that exports in a thread of its own, so call this after a fork."""
    exporting = provider(service, version)
    for name in exporters:
        exporting.add_span_processor(BatchSpanProcessor(ReportingExporter(EXPORTERS[name]())))
    return OpenTelemetryTracer(exporting, messaging_system)


class ReportingExporter(SpanExporter):
    """Logs one line when another exporter begins to fail, and one when it works again.

    `shared/runtime/logs.py` silences that exporter, which logs several lines for each attempt.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            _log.warning(
                "spans are not exported, and lost; check that the collector runs at "
                "OTEL_EXPORTER_OTLP_ENDPOINT and accepts OTLP over HTTP"
            )
        elif self._is_failing and not is_failing:
            _log.info("spans are exported again")
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class OpenTelemetryTracer(Tracer):
    """Writes spans to the exporters of `provider`.

    The log lines within a span have the id of its trace as `trace_id`, if it is exported.
    """

    def __init__(self, provider: TracerProvider, messaging_system: str) -> None:
        self.messaging_system = messaging_system
        self._provider = provider
        self._tracer = provider.get_tracer("stowgate")

    def span(
        self,
        name: str,
        kind: Kind = Kind.INTERNAL,
        *,
        parent: str | None = None,
        began_at: float | None = None,
        attributes: Attributes | None = None,
    ) -> AbstractContextManager[str | None]:
        return self._span(name, kind, trace_context(parent), began_at, attributes)

    @contextmanager
    def _span(
        self,
        name: str,
        kind: Kind,
        parent: TraceContext | None,
        began_at: float | None,
        attributes: Attributes | None,
    ) -> Iterator[str | None]:
        here = trace.get_current_span().get_span_context()
        is_elsewhere = parent is not None and int(parent.trace_id, 16) != here.trace_id
        span = self._tracer.start_span(
            name,
            context=_within(parent) if parent is not None and is_elsewhere else None,
            kind=SpanKind[kind],
            attributes=_named(attributes or {}),
            links=[Link(here)] if is_elsewhere and here.is_valid else None,
            start_time=None if began_at is None else int(began_at * 1e9),
            record_exception=False,
            set_status_on_exception=False,
        )
        context = _context_of(span)
        with (
            _log_lines_of(context) if is_elsewhere or not here.is_valid else nullcontext(),
            trace.use_span(
                span, end_on_exit=True, record_exception=False, set_status_on_exception=False
            ),
        ):
            try:
                yield str(context)
            except BaseException as error:
                _fail(span, type(error).__name__)
                raise

    def current(self) -> str | None:
        span = trace.get_current_span()
        return str(_context_of(span)) if span.get_span_context().is_valid else None

    def note(self, attributes: Attributes) -> None:
        trace.get_current_span().set_attributes(_named(attributes))

    def fail(self, error_type: str) -> None:
        _fail(trace.get_current_span(), error_type)

    def close(self) -> None:
        # The provider would wait up to 30 seconds for an exporter whose receiver does not answer.
        closing = threading.Thread(target=self._provider.shutdown, name="close spans", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


def _named(attributes: Attributes) -> dict[str, Value]:
    return {str(attribute): value for attribute, value in attributes.items()}


def _log_lines_of(context: TraceContext) -> AbstractContextManager[None]:
    """Give log lines the id of the trace. A span within another of its trace need not."""
    if context.is_sampled:
        return structlog.contextvars.bound_contextvars(trace_id=context.trace_id)
    return nullcontext()


def _fail(span: trace.Span, error_type: str) -> None:
    """Keep the type only: the text of an error may have values of a dataset, or its key."""
    span.set_attribute(Attribute.ERROR_TYPE, error_type)
    span.set_status(Status(StatusCode.ERROR))


def _within(parent: TraceContext) -> Context:
    """Return the context of a span elsewhere. An empty one is below it, so that a span of another
    trace that is current here has no part in it."""
    remote = SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT),
    )
    return trace.set_span_in_context(NonRecordingSpan(remote), Context())


def _context_of(span: trace.Span) -> TraceContext:
    context = span.get_span_context()
    return TraceContext(
        format_trace_id(context.trace_id),
        format_span_id(context.span_id),
        context.trace_flags.sampled,
    )
