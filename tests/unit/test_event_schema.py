"""The event on the wire."""

import pytest

from shared.errors import MalformedEvent
from shared.events import InstancesStored, decode, encode

PAYLOAD_ID = "0190b2f4-7c1e-7abc-8def-0123456789ab"
CORRELATION_ID = "5f0c6f1e-6f0e-4d3c-9d64-1f2d3c4b5a69"


def test_an_event_comes_back_as_it_was_sent() -> None:
    event = InstancesStored(PAYLOAD_ID, CORRELATION_ID)
    assert decode(encode(event, "exchange", "key").body) == event


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        b"{}",
        b'{"payload_id": "x", "correlation_id": "y"}',
        b'{"payload_id": 1, "correlation_id": null}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_anything_else_is_malformed_however_deep_and_is_not_repeated(body: bytes) -> None:
    with pytest.raises(MalformedEvent) as refused:
        decode(body)
    assert str(refused.value) in (
        "the body is no InstancesStored event",
        "payload_id and correlation_id of an event must be GUIDs",
    )
