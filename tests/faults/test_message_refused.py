"""A RabbitMQ of our own that takes small messages only (`max_message_size`)."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import own_engine
from engines import ObjectStoreEndpoint
from killable import broker
from stowgate_site import Site, study

from shared.adapters.queues import TopicExchange
from shared.adapters.rabbitmq.publisher import RabbitEventPublisher
from shared.errors import BrokerUnavailable, MessageRefused
from shared.ports import Message

MAX_MESSAGE_BYTES = 20_000


@pytest.fixture(scope="module")
def broker_of_small_messages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("rabbitmq")
        _, url = own_engine(
            lambda: broker(folder, stack, print, max_message_bytes=MAX_MESSAGE_BYTES)
        )
        yield url


@pytest.fixture
def site(
    broker_of_small_messages: str, object_store_endpoint: ObjectStoreEndpoint, tmp_path: Path
) -> Iterator[Site]:
    found = Site(tmp_path, broker_of_small_messages, object_store_endpoint)
    found.start_workflow_manager()
    try:
        yield found
    finally:
        found.close()
        found.remove()


def _message(site: Site, number: int, size_bytes: int) -> Message:
    return Message(
        exchange=site.name,
        routing_key="md.workflow.request",
        body=bytes(size_bytes),
        message_id=f"message {number}",
        correlation_id="7a1d2c54-9a53-4a52-b5a7-19e4a3f1a001",
        type="SomethingHappened",
        app_id="stowgate-test",
        timestamp=1_700_000_000,
    )


@pytest.fixture
def publisher(site: Site) -> Iterator[RabbitEventPublisher]:
    publisher = RabbitEventPublisher(site.broker_url, topology=[TopicExchange(site.name)])
    yield publisher
    publisher.close()


@pytest.mark.parametrize("size_bytes", [MAX_MESSAGE_BYTES + 1, 1 << 20])
def test_a_message_over_the_brokers_limit_is_permanently_refused_with_the_reason(
    publisher: RabbitEventPublisher, site: Site, size_bytes: int
) -> None:
    with pytest.raises(MessageRefused) as raised:
        publisher.begin(_message(site, 1, size_bytes)).wait(30)

    words = str(raised.value)
    assert f"message 1, of {size_bytes} bytes" in words
    assert f"max size {MAX_MESSAGE_BYTES}" in words
    assert "Raise max_message_size in its rabbitmq.conf" in words
    assert "STOWGATE_MAX_PARTS" in words
    assert "replay" in words


def test_a_refused_large_message_does_not_affect_others(
    publisher: RabbitEventPublisher, site: Site
) -> None:
    publisher.ping()
    publications = [publisher.begin(_message(site, number, 100)) for number in range(50)]
    refused = publisher.begin(_message(site, 50, 1 << 20))
    publications += [publisher.begin(_message(site, number, 100)) for number in range(51, 100)]

    with pytest.raises(MessageRefused):
        refused.wait(30)
    assert all(publication.wait(30) for publication in publications)
    assert site.waiting(site.name) == 99


def test_a_refused_small_message_loses_no_others(
    publisher: RabbitEventPublisher, site: Site
) -> None:
    publisher.ping()
    given = [_message(site, number, 100) for number in range(100)]
    given[50] = replace(given[50], body=bytes(MAX_MESSAGE_BYTES + 1))
    publications = [publisher.begin(message) for message in given]

    with pytest.raises(MessageRefused):
        publications[50].wait(30)
    neighbours = publications[:50] + publications[51:]
    errors = [publication.fate.exception(30) for publication in neighbours]
    for error in filter(None, errors):
        assert isinstance(error, BrokerUnavailable)
    assert site.waiting(site.name) >= errors.count(None)


def test_a_request_over_the_limit_fails_with_its_reason_and_others_are_opened(
    site: Site,
) -> None:
    api, _ = site.pair()
    answers = [site.post(api, study(count)) for count in (1, 100, 1)]

    small, large, other = (answer.headers["X-Payload-ID"] for answer in answers)
    failed = site.record(large, lambda record: record["state"] == "failed")
    assert f"max size {MAX_MESSAGE_BYTES}" in failed["last_error"]
    assert failed["attempts"] == 1
    for payload_id in (small, other):
        site.opened(payload_id)
    site.stop()
    assert {delivery.payload_id for delivery in site.take_requests()} == {small, other}
