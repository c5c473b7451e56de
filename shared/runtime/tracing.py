"""Spans: how long each step of a payload took, across both services.

`Tracer` writes none. `OpenTelemetryTracer` exports them, if the standard `OTEL_` variables name an
exporter and the extra `tracing` is installed. Names and attributes of spans are fixed words and
validated values, and of an error only the type is kept, so no span has patient data.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import version

import structlog

from shared.adapters.queues import EventQueue
from shared.ports import Message, ReceivedMessage
from shared.trace_context import TRACEPARENT

_log = structlog.get_logger()

_EXPORTERS = ("otlp", "console")
_PROTOCOL = "http/protobuf"

Value = bool | int | float | str


class Kind(StrEnum):
    """The role of a span (OpenTelemetry: SpanKind)."""

    INTERNAL = "INTERNAL"
    SERVER = "SERVER"
    PRODUCER = "PRODUCER"
    CONSUMER = "CONSUMER"


class Attribute(StrEnum):
    """All attributes that a span can have. Those of OpenTelemetry's semantic conventions first."""

    HTTP_REQUEST_METHOD = "http.request.method"
    HTTP_ROUTE = "http.route"
    HTTP_RESPONSE_STATUS_CODE = "http.response.status_code"
    URL_SCHEME = "url.scheme"
    CLIENT_ADDRESS = "client.address"
    ERROR_TYPE = "error.type"
    MESSAGING_SYSTEM = "messaging.system"
    MESSAGING_OPERATION_NAME = "messaging.operation.name"
    MESSAGING_OPERATION_TYPE = "messaging.operation.type"
    MESSAGING_DESTINATION_NAME = "messaging.destination.name"
    MESSAGING_ROUTING_KEY = "messaging.rabbitmq.destination.routing_key"
    MESSAGING_MESSAGE_ID = "messaging.message.id"
    MESSAGING_CONVERSATION_ID = "messaging.message.conversation_id"
    MESSAGING_BODY_SIZE = "messaging.message.body.size"
    PAYLOAD_ID = "stowgate.payload_id"
    CORRELATION_ID = "stowgate.correlation_id"
    AE_TITLE = "stowgate.ae_title"
    INSTANCES_STORED = "stowgate.instances.stored"
    INSTANCES_FAILED = "stowgate.instances.failed"
    STORED_BYTES = "stowgate.stored_bytes"
    ATTEMPTS = "stowgate.attempts"
    TAKEOVERS = "stowgate.takeovers"


Attributes = Mapping[Attribute, Value]


class Tracer:
    """Writes no spans. A subclass that does overrides every method but the last two."""

    messaging_system = "memory"

    def span(
        self,
        name: str,  # noqa: ARG002
        kind: Kind = Kind.INTERNAL,  # noqa: ARG002
        *,
        parent: str | None = None,
        began_at: float | None = None,  # noqa: ARG002
        attributes: Attributes | None = None,  # noqa: ARG002
    ) -> AbstractContextManager[str | None]:
        """Return a span for a `with` block, in which it is the current span of the thread.

        Yields its context as a `traceparent`. An exception that leaves the block marks the span as
        failed.

        Args:
            name: A fixed name, which has nothing from outside.
            kind: The role of the span.
            parent: The `traceparent` of the parent, which is ignored if it is not valid. Without
                it, and within a span of the same trace, the current span is the parent.
            began_at: When the span began, if earlier than now, in seconds since the epoch.
            attributes: Its first attributes.
        """
        return nullcontext(parent)

    def current(self) -> str | None:
        """Return the context of the current span as a `traceparent`, if there is one."""
        return None

    def note(self, attributes: Attributes) -> None:
        """Add attributes to the current span."""

    def fail(self, error_type: str) -> None:
        """Mark the current span as failed. `error_type` is a fixed word or a type of error."""

    def close(self) -> None:
        """Export the spans that are left, within two seconds."""

    @contextmanager
    def publishing(self, message: Message, parent: str | None = None) -> Iterator[Message]:
        """Return a span around the publication of a message, which is yielded with its context."""
        destination = f"{message.exchange}:{message.routing_key}"
        attributes: Attributes = {
            Attribute.MESSAGING_SYSTEM: self.messaging_system,
            Attribute.MESSAGING_OPERATION_NAME: "publish",
            Attribute.MESSAGING_OPERATION_TYPE: "send",
            Attribute.MESSAGING_DESTINATION_NAME: destination,
            Attribute.MESSAGING_ROUTING_KEY: message.routing_key,
            Attribute.MESSAGING_MESSAGE_ID: message.message_id,
            Attribute.MESSAGING_CONVERSATION_ID: message.correlation_id,
            Attribute.MESSAGING_BODY_SIZE: len(message.body),
        }
        with self.span(
            f"publish {destination}", Kind.PRODUCER, parent=parent, attributes=attributes
        ) as traceparent:
            if traceparent is not None:
                message = replace(message, headers={**message.headers, TRACEPARENT: traceparent})
            yield message

    def consuming(
        self, queue: EventQueue, handle: Callable[[ReceivedMessage], None]
    ) -> Callable[[ReceivedMessage], None]:
        """Return a handler that handles each message within a span."""
        destination = f"{queue.exchange}:{queue.routing_key}:{queue.queue}"
        attributes: Attributes = {
            Attribute.MESSAGING_SYSTEM: self.messaging_system,
            Attribute.MESSAGING_OPERATION_NAME: "process",
            Attribute.MESSAGING_OPERATION_TYPE: "process",
            Attribute.MESSAGING_DESTINATION_NAME: destination,
            Attribute.MESSAGING_ROUTING_KEY: queue.routing_key,
        }

        def handle_in_span(message: ReceivedMessage) -> None:
            with self.span(
                f"process {destination}",
                Kind.CONSUMER,
                parent=message.headers.get(TRACEPARENT),
                attributes=attributes,
            ):
                handle(message)

        return handle_in_span


NO_SPANS = Tracer()


def open_tracer(service: str, broker: str, environment: Mapping[str, str]) -> Tracer:
    """Return a tracer that exports as the `OTEL_` variables say, or one without spans.

    It has threads, so a process that forks calls this after the fork.

    Args:
        service: The default of `OTEL_SERVICE_NAME`.
        broker: `STOWGATE_BROKER`.
        environment: The environment variables, which the OpenTelemetry SDK reads too.
    """
    exporters = _exporters(environment)
    if not exporters or why_no_spans(environment):
        return NO_SPANS
    from shared.adapters.otlp import exporting_tracer

    system = "memory" if broker == "memory" else "rabbitmq"
    try:
        return exporting_tracer(service, version("stowgate"), system, exporters)
    except ValueError as error:
        # Limits of spans, or of the queue. The SDK reads them with the exporter's thread only.
        _log.warning("no spans are exported: an OTEL_ variable cannot be used", error=str(error))
        return NO_SPANS


def why_no_spans(environment: Mapping[str, str]) -> str | None:
    """Return why no spans are exported, although the `OTEL_` variables ask for them.

    A service starts without them, as these variables are often set for all services at once.
    """
    exporters = _exporters(environment)
    unknown = [name for name in exporters if name not in _EXPORTERS]
    if unknown:
        return (
            f"no spans are exported: OTEL_TRACES_EXPORTER has {unknown[0]!r}, but each name must "
            f"be {', '.join(_EXPORTERS)} or none"
        )
    protocol = (
        environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or _PROTOCOL
    )
    if "otlp" in exporters and protocol != _PROTOCOL:
        return (
            f"no spans are exported: OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, but must be "
            f"{_PROTOCOL}; the endpoint is then one for HTTP, usually on port 4318"
        )
    if not exporters:
        return None
    try:
        from shared.adapters.otlp import EXPORTERS
    except ImportError:
        return (
            "no spans are exported: the OTEL_ variables ask for them, but OpenTelemetry is not "
            "installed; install stowgate[tracing], or set OTEL_SDK_DISABLED=true"
        )
    try:
        for name in exporters:
            EXPORTERS[name]().shutdown()
    except (OSError, ValueError) as error:
        return f"no spans are exported: an OTEL_EXPORTER_OTLP_ variable cannot be used: {error}"
    return None


def _exporters(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the exporters; none unless a variable asks for them."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    given = environment.get("OTEL_TRACES_EXPORTER", "")
    if not given and (
        environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    ):
        given = "otlp"
    names = [name.strip() for name in given.split(",")]
    return [name for name in names if name not in ("", "none")]
