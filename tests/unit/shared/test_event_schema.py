"""The event on the wire."""

import json

import pytest

from shared.errors import MalformedEvent
from shared.events import InstancesStored, NewerEvent, decode, encode

PAYLOAD_ID = "0190b2f4-7c1e-7abc-8def-0123456789ab"
CORRELATION_ID = "5f0c6f1e-6f0e-4d3c-9d64-1f2d3c4b5a69"


def test_an_event_is_decoded_as_it_was_encoded() -> None:
    event = InstancesStored(PAYLOAD_ID, CORRELATION_ID)
    assert decode(encode(event, "exchange", "key").body) == event


def test_fields_of_a_newer_service_are_ignored() -> None:
    event = InstancesStored(PAYLOAD_ID, CORRELATION_ID)
    sent = json.loads(encode(event, "exchange", "key").body)

    assert sent["version"] == 1
    assert decode(json.dumps({**sent, "priority": 7}).encode()) == event


def test_an_event_of_a_newer_version_is_not_malformed() -> None:
    with pytest.raises(NewerEvent, match=r"newer Stowgate \(version 2, this one reads up to 1"):
        decode(json.dumps({"version": 2, "payloads": [PAYLOAD_ID]}).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        b"{}",
        b'{"version": 0}',
        b'{"version": "2"}',
        b'{"version": true}',
        b'{"payload_id": "x", "correlation_id": "y"}',
        b'{"payload_id": 1, "correlation_id": null}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_any_other_body_is_malformed_and_not_repeated(body: bytes) -> None:
    with pytest.raises(MalformedEvent) as refused:
        decode(body)
    assert str(refused.value) in (
        "the body is not a valid InstancesStored event",
        "payload_id and correlation_id of an event must be GUIDs",
    )
