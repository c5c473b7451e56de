"""Exchanges, queues and properties of messages at a real RabbitMQ."""

from dataclasses import replace
from functools import partial

import pytest
import structlog.testing
from brokers import Handled, Rabbit, eventually, pings, publish, publishes

from shared.adapters.rabbitmq.publisher import RabbitEventPublisher
from shared.errors import BrokerUnavailable, Unroutable


def test_the_message_properties_arrive_unchanged(rabbit: Rabbit) -> None:
    publisher = rabbit.publisher()
    publisher.ping()
    queue = rabbit.bind_foreign_queue()
    message = rabbit.foreign_message()
    publish(publisher, message)
    method, properties, body = rabbit.channel.basic_get(queue, auto_ack=True)
    assert (method.exchange, method.routing_key) == (message.exchange, message.routing_key)
    assert body == message.body
    given = {name: value for name, value in vars(properties).items() if value is not None}
    assert given == {
        "content_type": "application/json",
        "delivery_mode": 2,
        "message_id": message.message_id,
        "correlation_id": message.correlation_id,
        "type": message.type,
        "app_id": message.app_id,
        "timestamp": message.timestamp,
    }


def test_a_request_is_sent_once_the_missing_queue_exists(rabbit: Rabbit) -> None:
    publisher = rabbit.publisher()
    message = rabbit.foreign_message()
    with pytest.raises(Unroutable):
        publish(publisher, message)
    queue = rabbit.bind_foreign_queue()
    publish(publisher, message)
    assert rabbit.channel.basic_get(queue, auto_ack=True)[1].message_id == message.message_id


def test_a_message_that_the_broker_refuses_counts_as_unpublished(rabbit: Rabbit) -> None:
    publisher = rabbit.publisher()
    publisher.ping()
    rabbit.bind_foreign_queue(**{"x-max-length": 1, "x-overflow": "reject-publish"})
    publish(publisher, rabbit.foreign_message())
    with pytest.raises(BrokerUnavailable, match="refused message"):
        publish(publisher, rabbit.foreign_message())


def test_two_releases_with_different_queue_arguments_work_side_by_side(
    rabbit: Rabbit,
) -> None:
    publish(rabbit.publisher(), rabbit.message(b"of this release"))
    rabbit.queue = replace(rabbit.queue, delivery_limit=7, max_dead_letters=3)
    handled = Handled()
    with structlog.testing.capture_logs() as log:
        rabbit.consumer().start(handled)
        publish(rabbit.publisher(), rabbit.message(b"of the next"))
        eventually(lambda: handled.bodies == [b"of this release", b"of the next"])
    causes = [entry["cause"] for entry in log if "is used as it is" in entry["event"]]
    assert len(causes) == 4
    assert all("inequivalent arg" in cause for cause in causes)
    assert any(f"'{rabbit.queue.queue}'" in cause for cause in causes)
    assert any(f"'{rabbit.queue.dead_letter}'" in cause for cause in causes)


def test_a_queue_that_cannot_be_declared_is_reported_with_the_cause(rabbit: Rabbit) -> None:
    rabbit.queue = replace(rabbit.queue, max_dead_letters=-1)
    with pytest.raises(BrokerUnavailable, match=r"invalid arg 'x-max-length'.*dead'"):
        publish(rabbit.publisher(), rabbit.message())


def test_the_newest_dead_letters_are_kept_up_to_a_bound(rabbit: Rabbit) -> None:
    rabbit.queue = replace(rabbit.queue, max_dead_letters=2)
    rabbit.publisher().ping()
    rabbit.channel.confirm_delivery()
    for number in range(5):
        rabbit.channel.basic_publish(rabbit.queue.dead_letter, "", b"%d" % number)
    eventually(lambda: rabbit.waiting(rabbit.queue.dead_letter) == 2)
    assert rabbit.dead_letters() == [b"3", b"4"]


def test_nothing_is_published_without_the_expected_queue_even_if_another_is_bound(
    rabbit: Rabbit,
) -> None:
    publisher = rabbit.publisher(expected_queue=rabbit.foreign_queue)
    rabbit.channel.exchange_declare(rabbit.foreign.name, "topic", durable=True)
    rabbit.channel.queue_declare(rabbit.other_queue)
    rabbit.channel.queue_bind(rabbit.other_queue, rabbit.foreign.name, "#")
    for call in (partial(publish, publisher, rabbit.foreign_message()), publisher.ping):
        with pytest.raises(Unroutable, match=f"no queue '{rabbit.foreign_queue}'"):
            call()
    assert rabbit.waiting(rabbit.other_queue) == 0

    rabbit.bind_foreign_queue()

    eventually(lambda: pings(publisher))
    publish(publisher, rabbit.foreign_message())
    assert (rabbit.waiting(rabbit.foreign_queue), rabbit.waiting(rabbit.other_queue)) == (1, 1)

    rabbit.channel.queue_delete(rabbit.foreign_queue)

    eventually(lambda: not publishes(publisher, rabbit.foreign_message()))
    assert not pings(publisher)


def test_an_alternate_exchange_does_not_replace_the_expected_queue(rabbit: Rabbit) -> None:
    rabbit.channel.exchange_declare(rabbit.other_queue, "fanout")
    rabbit.channel.queue_declare(rabbit.other_queue)
    rabbit.channel.queue_bind(rabbit.other_queue, rabbit.other_queue)
    rabbit.channel.exchange_declare(
        rabbit.foreign.name,
        "topic",
        durable=True,
        arguments={"alternate-exchange": rabbit.other_queue},
    )
    with pytest.raises(Unroutable, match="no queue"):
        publish(rabbit.publisher(expected_queue=rabbit.foreign_queue), rabbit.foreign_message())
    assert rabbit.waiting(rabbit.other_queue) == 0


def test_a_deleted_exchange_is_declared_again(rabbit: Rabbit) -> None:
    publisher = rabbit.publisher()
    publish(publisher, rabbit.message())
    rabbit.channel.exchange_delete(rabbit.queue.exchange)
    with pytest.raises(BrokerUnavailable, match="no exchange"):
        publish(publisher, rabbit.message())
    eventually(lambda: publishes(publisher, rabbit.message()))


def test_a_consumer_redeclares_its_deleted_queue_and_continues(rabbit: Rabbit) -> None:
    handled = Handled()
    consumer = rabbit.consumer()
    consumer.start(handled)
    publisher = rabbit.publisher()
    publish(publisher, rabbit.message(b"before"))
    eventually(lambda: handled.bodies == [b"before"])
    rabbit.channel.queue_delete(rabbit.queue.queue)
    eventually(lambda: publishes(publisher, rabbit.message(b"after")))
    eventually(lambda: b"after" in handled.bodies)


def test_counting_a_deleted_queue_fails_and_does_not_stop_the_consumer(
    rabbit: Rabbit,
) -> None:
    idle = rabbit.consumer()
    assert idle.backlog() == 0
    rabbit.channel.queue_delete(rabbit.queue.queue)
    with pytest.raises(BrokerUnavailable, match="no queue"):
        idle.backlog()
    handled = Handled()
    rabbit.consumer().start(handled)
    publish(rabbit.publisher(), rabbit.message(b"event"))
    eventually(lambda: handled.bodies == [b"event"])
    assert idle.backlog() == 0


@pytest.mark.parametrize("bad", ["memory", "amqp://user:pa/word@host:5672/v", "http://h:1/"])
def test_an_invalid_broker_url_is_rejected_without_quoting_it(bad: str) -> None:
    with pytest.raises(ValueError, match="URL is not valid") as raised:
        RabbitEventPublisher(bad, topology=[])
    assert "word" not in str(raised.value).replace("password", "")
    assert raised.value.__suppress_context__
