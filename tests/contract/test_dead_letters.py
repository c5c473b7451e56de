"""Dead letters of the Workflow Manager's queue, on a real RabbitMQ."""

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pika
import pytest
import structlog.testing
from pika.adapters.blocking_connection import BlockingChannel
from service import wait_for
from workflow_manager_double import declare

from shared.adapters.queues import DeadLetterQueue
from shared.adapters.rabbitmq.dead_letters import RabbitDeadLetterConsumer
from shared.errors import BrokerUnavailable, StoreUnavailable
from shared.ports import DeadLetter

KEY = "md.workflow.request"


@dataclass
class Received:
    """A handler that keeps the dead letters, and can run a callback for each."""

    then: Callable[[DeadLetter], object] = lambda _: None
    letters: list[DeadLetter] = field(default_factory=list)

    def __call__(self, letter: DeadLetter) -> None:
        self.letters.append(letter)
        self.then(letter)


class Broker:
    """The Workflow Manager's exchange and queue, with names of this test."""

    def __init__(self, url: str, channel: BlockingChannel, stack: ExitStack) -> None:
        self.name = f"stowgate-test-{secrets.token_hex(6)}"
        self.dead_letter_exchange = f"{self.name}-dead-letter"
        self.queue = DeadLetterQueue(
            exchange=self.dead_letter_exchange,
            routing_key=KEY,
            queue=f"{self.name}.refusals",
            dead_letter=f"{self.name}.dead",
        )
        self.channel = channel
        self._url = url
        self._stack = stack

    def start_workflow_manager(self) -> None:
        declare(self.channel, self.name, KEY, self.name, self.dead_letter_exchange)

    def consumer(self, handle: Callable[[DeadLetter], None] | None) -> RabbitDeadLetterConsumer:
        consumer = RabbitDeadLetterConsumer(self._url, queue=self.queue, close_seconds=5)
        self._stack.callback(consumer.close)
        if handle is not None:
            consumer.start(handle)
        return consumer

    def publish(self, body: bytes, headers: dict[str, Any] | None = None) -> None:
        properties = pika.BasicProperties(message_id="a message", headers=headers)
        self.channel.basic_publish(self.name, KEY, body, properties, mandatory=True)

    def dead_letter(self, body: bytes, headers: dict[str, Any] | None = None) -> None:
        """Publish a message, as any client could."""
        properties = pika.BasicProperties(headers=headers)
        self.channel.basic_publish(self.dead_letter_exchange, KEY, body, properties)

    def refuse(self, times: int, requeue: bool) -> None:
        """Reject the message in the Workflow Manager's queue that many times."""
        for _ in range(times):
            method = wait_for(lambda: self.channel.basic_get(self.name)[0])
            self.channel.basic_reject(method.delivery_tag, requeue=requeue)

    def waiting(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)


@pytest.fixture
def broker(broker_url: str) -> Iterator[Broker]:
    with (
        pika.BlockingConnection(pika.URLParameters(broker_url)) as connection,
        ExitStack() as stack,
    ):
        broker = Broker(broker_url, connection.channel(), stack)
        try:
            yield broker
        finally:
            stack.close()
            with pika.BlockingConnection(pika.URLParameters(broker_url)) as last:
                channel = last.channel()
                for queue in (broker.name, f"{broker.name}-dead-letter", broker.queue.queue):
                    channel.queue_delete(queue)
                for exchange in (
                    broker.name,
                    broker.dead_letter_exchange,
                    broker.queue.dead_letter,
                ):
                    channel.exchange_delete(exchange)


def _until_ready(consumer: RabbitDeadLetterConsumer) -> None:
    def ready() -> bool:
        try:
            consumer.ping()
        except BrokerUnavailable:
            return False
        return True

    wait_for(ready)


def test_a_rejected_message_is_received_with_its_reason_and_time(broker: Broker) -> None:
    broker.start_workflow_manager()
    received = Received()
    _until_ready(broker.consumer(received))
    began = datetime.now(UTC)

    broker.publish(b"rejected")
    broker.refuse(1, requeue=False)

    (letter,) = wait_for(lambda: received.letters)
    assert (letter.body, letter.message_id, letter.reason) == (b"rejected", "a message", "rejected")
    assert letter.at is not None
    assert abs((letter.at - began).total_seconds()) < 60


def test_a_message_that_was_requeued_three_times_is_received_as_over_the_limit(
    broker: Broker,
) -> None:
    broker.start_workflow_manager()
    received = Received()
    _until_ready(broker.consumer(received))

    broker.publish(b"requeued")
    broker.refuse(4, requeue=True)

    (letter,) = wait_for(lambda: received.letters)
    assert (letter.body, letter.reason) == (b"requeued", "delivery_limit")


def test_the_workflow_managers_own_dead_letter_queue_still_gets_its_copy(
    broker: Broker,
) -> None:
    broker.start_workflow_manager()
    received = Received()
    _until_ready(broker.consumer(received))

    broker.publish(b"rejected")
    broker.refuse(1, requeue=False)

    wait_for(lambda: received.letters)
    wait_for(lambda: broker.waiting(f"{broker.name}-dead-letter") == 1)


def test_a_missing_exchange_is_reported_with_the_setting_that_names_it(broker: Broker) -> None:
    received = Received()
    consumer = broker.consumer(received)

    with pytest.raises(BrokerUnavailable) as raised:
        consumer.ping()

    assert f"has no exchange '{broker.dead_letter_exchange}'" in str(raised.value)
    assert "STOWGATE_WORKFLOW_MANAGER_DEAD_LETTER_EXCHANGE" in str(raised.value)


def test_refusals_are_received_once_the_exchange_appears_without_a_restart(broker: Broker) -> None:
    received = Received()
    consumer = broker.consumer(received)
    with pytest.raises(BrokerUnavailable):
        consumer.ping()

    broker.start_workflow_manager()
    _until_ready(consumer)

    broker.publish(b"rejected")
    broker.refuse(1, requeue=False)
    wait_for(lambda: received.letters)


def test_the_queue_is_bound_again_after_the_exchange_was_deleted_and_redeclared(
    broker: Broker,
) -> None:
    broker.start_workflow_manager()
    received = Received()
    consumer = broker.consumer(received)
    _until_ready(consumer)

    broker.channel.exchange_delete(broker.dead_letter_exchange)
    broker.start_workflow_manager()

    def received_one() -> bool:
        broker.dead_letter(b"x")
        return bool(received.letters)

    wait_for(received_one)


def test_a_refusal_waits_in_the_queue_without_a_consumer(broker: Broker) -> None:
    broker.start_workflow_manager()
    _until_ready(broker.consumer(None))

    broker.publish(b"rejected")
    broker.refuse(1, requeue=False)
    wait_for(lambda: broker.waiting(broker.queue.queue) == 1)

    received = Received()
    broker.consumer(received)
    wait_for(lambda: received.letters)


def test_recording_a_refusal_is_retried_until_it_succeeds(broker: Broker) -> None:
    broker.start_workflow_manager()
    tries = iter([StoreUnavailable("away"), StoreUnavailable("away"), None])

    def fail(_: DeadLetter) -> None:
        error = next(tries)
        if error is not None:
            raise error

    received = Received(fail)
    _until_ready(broker.consumer(received))

    with structlog.testing.capture_logs() as log:
        broker.dead_letter(b"x")
        wait_for(lambda: len(received.letters) == 3)
        wait_for(lambda: broker.waiting(broker.queue.queue) == 0)
    assert [line["error"] for line in log if "error" in line] == ["away", "away"]


def test_a_refusal_in_progress_returns_to_the_queue_when_its_worker_stops(broker: Broker) -> None:
    broker.start_workflow_manager()
    in_hand = threading.Event()

    def fail(_: DeadLetter) -> None:
        in_hand.set()
        raise StoreUnavailable("away")

    consumer = broker.consumer(Received(fail))
    _until_ready(consumer)
    broker.dead_letter(b"x")
    assert in_hand.wait(30)

    consumer.close()

    wait_for(lambda: broker.waiting(broker.queue.queue) == 1)


def test_a_dead_letter_that_triggers_a_bug_is_rejected_and_the_next_is_handled(
    broker: Broker,
) -> None:
    broker.start_workflow_manager()
    broker.channel.exchange_declare(broker.queue.dead_letter, "fanout")
    broker.channel.queue_declare(f"{broker.name}-aside", exclusive=True)
    broker.channel.queue_bind(f"{broker.name}-aside", broker.queue.dead_letter)

    def fail(letter: DeadLetter) -> None:
        if letter.body == b"bug":
            raise KeyError(letter.body)

    received = Received(fail)
    _until_ready(broker.consumer(received))

    broker.dead_letter(b"bug")
    broker.dead_letter(b"next")

    wait_for(lambda: [letter.body for letter in received.letters] == [b"bug", b"next"])
    wait_for(lambda: broker.waiting(f"{broker.name}-aside") == 1)


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {"x-death": "text"},
        {"x-death": []},
        {"x-death": [1]},
        {"x-death": [{"reason": 7, "time": "noon"}]},
    ],
)
def test_a_dead_letter_with_invalid_headers_has_no_reason(
    broker: Broker, headers: dict[str, Any] | None
) -> None:
    broker.start_workflow_manager()
    received = Received()
    _until_ready(broker.consumer(received))

    broker.dead_letter(b"x", headers)

    (letter,) = wait_for(lambda: received.letters)
    assert (letter.reason, letter.at, letter.message_id) == ("", None, "")
