"""Headers of messages, over every adapter that carries them."""

import re
from dataclasses import replace

import pika
import pytest
from brokers import Broker, Handled, Rabbit, eventually, message_for, publish, random_queue

from shared.ports import HEADERS_MAX_BYTES


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"traceparent": "00-1", "name é": "value ü"},
        {"n" * 255: "v" * (HEADERS_MAX_BYTES - 255)},
    ],
    ids=["none", "several", "largest"],
)
def test_the_headers_of_an_event_reach_the_handler(broker: Broker, headers: dict[str, str]) -> None:
    handled = Handled()
    broker.consumer().start(handled)
    publish(broker.publisher(), replace(broker.message(), headers=headers))
    eventually(lambda: handled.headers == [headers])


def test_headers_of_another_type_than_text_are_ignored(rabbit: Rabbit) -> None:
    handled = Handled()
    rabbit.consumer().start(handled)
    rabbit.publisher().ping()
    hostile: dict[str | bytes, object] = {
        "number": 5,
        "flag": True,
        "nothing": None,
        "list": ["00-1"],
        "table": {"traceparent": "00-1"},
        "bytes": b"\xff\xfe",
        b"\xff": "its name is not UTF-8",
        "text": "kept",
    }
    rabbit.channel.basic_publish(
        rabbit.queue.exchange,
        rabbit.queue.routing_key,
        b"event",
        pika.BasicProperties(headers=hostile),
    )
    eventually(lambda: handled.bodies == [b"event"])
    assert handled.headers == [{"text": "kept"}]


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({"a": "v" * HEADERS_MAX_BYTES}, "the headers of a message have 4097 bytes"),
        ({"a": "é" * 2048, "b": "v"}, "the headers of a message have 4099 bytes"),
        ({"é" * 128: ""}, "a header of SomethingHappened of a message has 256 bytes"),
    ],
)
def test_headers_that_are_too_long_are_refused(headers: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        replace(message_for(random_queue()), headers=headers)
