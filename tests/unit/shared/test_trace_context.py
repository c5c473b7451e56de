"""The grammar of `traceparent`."""

import pytest

from shared.trace_context import TraceContext, shown_trace_id, trace_context

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.mark.parametrize(
    ("text", "is_sampled"),
    [
        (VALID, True),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", False),
        (f"00-{TRACE_ID}-{SPAN_ID}-02", False),
        (f"00-{TRACE_ID}-{SPAN_ID}-ff", True),
        (f"01-{TRACE_ID}-{SPAN_ID}-01", True),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-comes-later", True),
    ],
)
def test_a_valid_traceparent_is_read_and_written_in_version_0(text: str, is_sampled: bool) -> None:
    context = trace_context(text)

    assert context == TraceContext(TRACE_ID, SPAN_ID, is_sampled)
    assert str(context) == f"00-{TRACE_ID}-{SPAN_ID}-0{int(is_sampled)}"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "00",
        f"{VALID}-more",
        f"{VALID}\n",
        f" {VALID}",
        f"{VALID},{VALID}",
        VALID.upper(),
        VALID.replace("4b", "4g"),
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-1",
        f"01-{TRACE_ID}-{SPAN_ID}-01-DOE^JOHN\r\nX: y",
        f"01-{TRACE_ID}-{SPAN_ID}-01-{'x' * 300}",
        "٠٠" + VALID[2:],
    ],
)
def test_any_other_text_is_not_a_context(text: str | None) -> None:
    assert trace_context(text) is None
    assert shown_trace_id(text) is None


def test_the_id_of_a_trace_that_is_not_exported_is_not_shown() -> None:
    assert shown_trace_id(VALID) == TRACE_ID
    assert shown_trace_id(f"00-{TRACE_ID}-{SPAN_ID}-00") is None
