"""The context of a trace as text: `traceparent` of W3C Trace Context, 3.2."""

import re
from typing import NamedTuple

TRACEPARENT = "traceparent"
"""The name of the header, in HTTP and in messages."""

_SAMPLED = 0x01

# Version ff is not valid, nor are ids of zeros. Only newer versions may have more fields.
_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace_id>[0-9a-f]{32})"
    r"-(?!0{16})(?P<span_id>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<more>-[!-~]*)?"
)
_MAX_CHARACTERS = 256


class TraceContext(NamedTuple):
    """The ids of a trace and of one of its spans; whether its spans are exported."""

    trace_id: str
    span_id: str
    is_sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def trace_context(traceparent: str | None) -> TraceContext | None:
    """Return the context in a `traceparent`, or None if that is not valid."""
    if traceparent is None or len(traceparent) > _MAX_CHARACTERS:
        return None
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or (found["version"] == "00" and found["more"] is not None):
        return None
    is_sampled = bool(int(found["flags"], 16) & _SAMPLED)
    return TraceContext(found["trace_id"], found["span_id"], is_sampled)


def logged(traceparent: str | None) -> dict[str, str]:
    """Return the field of a log line that is written outside of the span."""
    trace_id = shown_trace_id(traceparent)
    return {} if trace_id is None else {"trace_id": trace_id}


def shown_trace_id(traceparent: str | None) -> str | None:
    """Return the id of the trace for people to look up, or None if it is not exported."""
    context = trace_context(traceparent)
    return context.trace_id if context is not None and context.is_sampled else None
