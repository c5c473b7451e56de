"""The contract of every event broker, then tests of single adapters."""

import contextlib
import json
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import pika
import pika.frame
import pytest
import structlog.testing
from proxy import Proxy

from shared.adapters.folder.publisher import FolderEventPublisher
from shared.adapters.memory import MemoryBroker
from shared.adapters.queues import EventQueue, TopicExchange
from shared.adapters.rabbitmq.publisher import RabbitEventConsumer, RabbitEventPublisher
from shared.errors import BrokerUnavailable, MalformedEvent, Unroutable
from shared.ports import EventConsumer, EventPublisher, Message, ReceivedMessage

R = TypeVar("R")

PATIENCE_SECONDS = 30.0


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not within the test's patience"
        time.sleep(0.01)


def within_patience(call: Callable[[], R]) -> R:
    """Fail instead of hanging if `call` never returns."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result(PATIENCE_SECONDS)
    finally:
        pool.shutdown(wait=False)


class Handled:
    """A handler that keeps the events, and can run a callback for each."""

    def __init__(self, then: Callable[[bytes], object] = lambda _: None) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self._then = then

    def __call__(self, message: ReceivedMessage) -> None:
        self.headers.append(message.headers)
        self.bodies.append(message.body)
        self._then(message.body)


class Broker(Protocol):
    queue: EventQueue

    def publisher(self) -> EventPublisher: ...

    def consumer(self, concurrency: int = 1, close_seconds: float = 10.0) -> EventConsumer: ...

    def dead_letters(self) -> list[bytes]: ...

    def message(self, body: bytes = b"{}", routing_key: str | None = None) -> Message: ...


def random_queue() -> EventQueue:
    name = f"stowgate-test-{secrets.token_hex(8)}"
    return EventQueue(
        exchange=name, routing_key="event", queue=f"{name}.events", dead_letter=f"{name}.dead"
    )


def message_for(queue: EventQueue, body: bytes = b"{}", routing_key: str | None = None) -> Message:
    return Message(
        exchange=queue.exchange,
        routing_key=queue.routing_key if routing_key is None else routing_key,
        body=body,
        message_id=secrets.token_hex(16),
        correlation_id="7a1d2c54-9a53-4a52-b5a7-19e4a3f1a001",
        type="SomethingHappened",
        app_id="stowgate-test",
        timestamp=1_700_000_000,
    )


class InMemory:
    def __init__(self, closing: contextlib.ExitStack) -> None:
        self.queue = random_queue()
        self._closing = closing
        self._broker = MemoryBroker(self.queue)

    def publisher(self) -> EventPublisher:
        publisher = self._broker.publisher()
        self._closing.callback(publisher.close)
        return publisher

    def consumer(self, concurrency: int = 1, close_seconds: float = 10.0) -> EventConsumer:
        consumer = self._broker.consumer(
            self.queue, concurrency=concurrency, close_seconds=close_seconds
        )
        self._closing.callback(consumer.close)
        return consumer

    def dead_letters(self) -> list[bytes]:
        return [letter.message.body for letter in self._broker.dead_letters(self.queue)]

    def message(self, body: bytes = b"{}", routing_key: str | None = None) -> Message:
        return message_for(self.queue, body, routing_key)


class Rabbit:
    """`url` is the broker itself; the adapters may be sent through a proxy instead."""

    def __init__(self, url: str, closing: contextlib.ExitStack) -> None:
        self.url = url
        self.queue = random_queue()
        self.foreign = TopicExchange(f"{self.queue.exchange}.foreign")
        self._closing = closing
        connection = pika.BlockingConnection(pika.URLParameters(url))
        closing.callback(connection.close)
        self.channel = connection.channel()
        closing.callback(self._delete_everything)

    def publisher(
        self,
        url: str | None = None,
        confirm_seconds: float = 10,
        answer_seconds: float = 10,
        expected_queue: str | None = None,
    ) -> RabbitEventPublisher:
        publisher = RabbitEventPublisher(
            url or self.url,
            topology=[self.queue, self.foreign],
            expected_queue=expected_queue,
            confirm_seconds=confirm_seconds,
            answer_seconds=answer_seconds,
        )
        self._closing.callback(publisher.close)
        return publisher

    def consumer(
        self,
        concurrency: int = 1,
        close_seconds: float = 10.0,
        url: str | None = None,
        answer_seconds: float = 10,
    ) -> EventConsumer:
        consumer = RabbitEventConsumer(
            url or self.url,
            queue=self.queue,
            concurrency=concurrency,
            answer_seconds=answer_seconds,
            close_seconds=close_seconds,
        )
        self._closing.callback(consumer.close)
        return consumer

    def dead_letters(self) -> list[bytes]:
        bodies = []
        while (got := self.channel.basic_get(self.queue.dead_letter))[0] is not None:
            bodies.append(got[2])
        self.channel.basic_nack(multiple=True, requeue=True)
        return bodies

    def message(self, body: bytes = b"{}", routing_key: str | None = None) -> Message:
        return message_for(self.queue, body, routing_key)

    def foreign_message(self) -> Message:
        return message_for(
            EventQueue(self.foreign.name, "some.request", "none of ours", "none of ours")
        )

    @property
    def foreign_queue(self) -> str:
        return f"{self.foreign.name}.queue"

    @property
    def other_queue(self) -> str:
        """A consumer that receives every event."""
        return f"{self.foreign.name}.audit"

    def bind_foreign_queue(self, **arguments: object) -> str:
        self.channel.exchange_declare(self.foreign.name, "topic", durable=True)
        self.channel.queue_declare(self.foreign_queue, durable=True, arguments=arguments)
        self.channel.queue_bind(self.foreign_queue, self.foreign.name, routing_key="some.request")
        return self.foreign_queue

    def waiting(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)

    def _delete_everything(self) -> None:
        own = (self.queue.queue, self.queue.dead_letter)
        for queue in (*own, self.foreign_queue, self.other_queue):
            self.channel.queue_delete(queue)
        for exchange in (self.queue.exchange, self.queue.dead_letter, self.foreign.name):
            self.channel.exchange_delete(exchange)
        self.channel.exchange_delete(self.other_queue)


@pytest.fixture(params=["memory", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    with contextlib.ExitStack() as closing:
        if request.param == "memory":
            yield InMemory(closing)
        else:
            yield Rabbit(request.getfixturevalue("broker_url"), closing)


@pytest.fixture
def rabbit(broker_url: str) -> Iterator[Rabbit]:
    with contextlib.ExitStack() as closing:
        yield Rabbit(broker_url, closing)


def test_a_published_event_reaches_the_handler_with_its_body(broker: Broker) -> None:
    handled = Handled()
    broker.consumer().start(handled)
    body = '{"payload_id": "ü", "nul": "\\u0000"}'.encode()
    broker.publisher().publish(broker.message(body))
    eventually(lambda: handled.bodies == [body])


def test_events_published_before_any_consumer_existed_are_delivered_in_order(
    broker: Broker,
) -> None:
    bodies = [b"%d" % number for number in range(20)]
    publisher = broker.publisher()
    for body in bodies:
        publisher.publish(broker.message(body))
    handled = Handled()
    broker.consumer().start(handled)
    eventually(lambda: handled.bodies == bodies)


def test_up_to_concurrency_events_are_handled_at_once(broker: Broker) -> None:
    all_in_hand = threading.Barrier(3)
    lock = threading.Lock()
    now, most, done = 0, 0, 0

    def handle(_message: ReceivedMessage) -> None:
        nonlocal now, most, done
        with lock:
            now += 1
            most = max(most, now)
        all_in_hand.wait(PATIENCE_SECONDS)
        with lock:
            now -= 1
            done += 1

    publisher = broker.publisher()
    for _ in range(9):
        publisher.publish(broker.message())
    broker.consumer(concurrency=3).start(handle)
    eventually(lambda: done == 9)
    assert most == 3
    assert broker.dead_letters() == []


def test_a_malformed_event_is_dead_lettered_and_its_neighbours_are_handled(broker: Broker) -> None:
    def refuse_poison(body: bytes) -> None:
        if body == b"poison":
            raise MalformedEvent("not one of ours")

    publisher = broker.publisher()
    for body in (b"before", b"poison", b"after"):
        publisher.publish(broker.message(body))
    handled = Handled(refuse_poison)
    consumer = broker.consumer(concurrency=3)
    consumer.start(handled)
    eventually(lambda: broker.dead_letters() == [b"poison"])
    eventually(lambda: len(handled.bodies) == 3)
    consumer.close()
    assert Counter(handled.bodies) == Counter([b"before", b"poison", b"after"])
    assert broker.consumer().backlog() == 0


def test_an_event_whose_handler_fails_is_dead_lettered_and_the_next_is_handled(
    broker: Broker,
) -> None:
    def fail_once(body: bytes) -> None:
        if body == b"bug":
            raise KeyError("something nobody thought of")

    publisher = broker.publisher()
    publisher.publish(broker.message(b"bug"))
    handled = Handled(fail_once)
    broker.consumer().start(handled)
    eventually(lambda: broker.dead_letters() == [b"bug"])
    publisher.publish(broker.message(b"next"))
    eventually(lambda: handled.bodies == [b"bug", b"next"])


def test_a_failed_handler_is_logged_without_the_exceptions_text(
    broker: Broker,
) -> None:
    patient_name = "DOE^JOHN"

    def quote_the_dataset(_message: ReceivedMessage) -> None:
        raise ValueError(patient_name)

    with structlog.testing.capture_logs() as log:
        broker.publisher().publish(broker.message())
        broker.consumer().start(quote_the_dataset)
        eventually(broker.dead_letters)
    (entry,) = [entry for entry in log if entry.get("queue") == broker.queue.queue]
    assert entry["reason"] == "ValueError"
    assert "quote_the_dataset" in entry["traceback"]
    assert patient_name not in str(entry)


def test_an_unroutable_message_is_reported_with_exchange_and_routing_key(
    broker: Broker,
) -> None:
    publisher = broker.publisher()
    with pytest.raises(Unroutable) as raised:
        publisher.publish(broker.message(routing_key="nobody.listens"))
    assert broker.queue.exchange in str(raised.value)
    assert "nobody.listens" in str(raised.value)
    publisher.publish(broker.message())


def test_the_backlog_counts_undelivered_events(broker: Broker) -> None:
    publisher = broker.publisher()
    for _ in range(5):
        publisher.publish(broker.message())
    released = threading.Event()
    handled = Handled(lambda _: released.wait(PATIENCE_SECONDS))
    consumer = broker.consumer(concurrency=2)
    eventually(lambda: consumer.backlog() == 5)
    consumer.start(handled)
    eventually(lambda: len(handled.bodies) == 2)
    eventually(lambda: consumer.backlog() == 3)
    released.set()
    eventually(lambda: consumer.backlog() == 0)
    eventually(lambda: len(handled.bodies) == 5)


def test_the_consumers_of_a_queue_are_counted(broker: Broker) -> None:
    first, second = broker.consumer(), broker.consumer()
    assert first.consumers() == 0
    first.start(Handled())
    second.start(Handled())
    eventually(lambda: second.consumers() == 2)
    second.close()
    eventually(lambda: first.consumers() == 1)


def test_close_waits_for_the_event_in_progress_and_consumes_no_more(broker: Broker) -> None:
    in_hand, released = threading.Event(), threading.Event()

    def handle(_message: ReceivedMessage) -> None:
        in_hand.set()
        released.wait(PATIENCE_SECONDS)

    publisher = broker.publisher()
    publisher.publish(broker.message(b"in hand"))
    publisher.publish(broker.message(b"waiting"))
    consumer = broker.consumer(close_seconds=PATIENCE_SECONDS)
    consumer.start(handle)
    assert in_hand.wait(PATIENCE_SECONDS)
    closing = threading.Thread(target=consumer.close)
    closing.start()
    eventually(lambda: not pings(consumer))
    consumer.close()
    assert closing.is_alive()
    released.set()
    closing.join(PATIENCE_SECONDS)
    assert not closing.is_alive()

    rest = Handled()
    broker.consumer().start(rest)
    eventually(lambda: rest.bodies == [b"waiting"])


def test_close_requeues_events_that_do_not_finish_in_time(broker: Broker) -> None:
    in_hand, released, finished = threading.Event(), threading.Event(), threading.Event()

    def handle(_message: ReceivedMessage) -> None:
        in_hand.set()
        released.wait(PATIENCE_SECONDS)
        finished.set()

    broker.publisher().publish(broker.message(b"unfinished"))
    hanging = broker.consumer(close_seconds=0.05)
    hanging.start(handle)
    assert in_hand.wait(PATIENCE_SECONDS)
    hanging.close()

    again = Handled()
    successor = broker.consumer()
    successor.start(again)
    eventually(lambda: again.bodies == [b"unfinished"])
    released.set()
    assert finished.wait(PATIENCE_SECONDS)
    successor.close()
    assert again.bodies == [b"unfinished"]
    assert broker.consumer().backlog() == 0
    assert broker.dead_letters() == []


def test_events_are_distributed_among_consumers(broker: Broker) -> None:
    both_busy = threading.Barrier(2)
    first = Handled(lambda _: both_busy.wait(PATIENCE_SECONDS))
    second = Handled(lambda _: both_busy.wait(PATIENCE_SECONDS))
    broker.consumer().start(first)
    broker.consumer().start(second)
    publisher = broker.publisher()
    publisher.publish(broker.message(b"1"))
    publisher.publish(broker.message(b"2"))
    eventually(lambda: sorted(first.bodies + second.bodies) == [b"1", b"2"])
    assert len(first.bodies) == 1


def test_many_threads_publish_at_once_and_nothing_is_lost(broker: Broker) -> None:
    publisher = broker.publisher()
    handled = Handled()
    broker.consumer(concurrency=4).start(handled)

    def publish(thread: int) -> None:
        for number in range(200):
            publisher.publish(broker.message(b"%d/%d" % (thread, number)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(8)))
    eventually(lambda: len(handled.bodies) >= 1600)
    assert Counter(handled.bodies) == Counter(
        b"%d/%d" % (thread, number) for thread in range(8) for number in range(200)
    )


def test_concurrent_routable_and_unroutable_messages_are_distinguished(broker: Broker) -> None:
    publisher = broker.publisher()

    def is_unroutable(number: int) -> bool:
        try:
            publisher.publish(broker.message(routing_key="nobody.listens" if number % 2 else None))
        except Unroutable:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(is_unroutable, range(400))) == [bool(n % 2) for n in range(400)]


def test_both_ends_answer_a_ping_until_they_are_closed(broker: Broker) -> None:
    publisher, consumer = broker.publisher(), broker.consumer()
    publisher.ping()
    consumer.start(Handled())
    consumer.ping()
    publisher.close()
    consumer.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        publisher.ping()
    with pytest.raises(BrokerUnavailable, match="closed"):
        publisher.publish(broker.message())
    with pytest.raises(BrokerUnavailable, match="closed"):
        consumer.ping()
    with pytest.raises(BrokerUnavailable, match="closed"):
        consumer.backlog()


def test_closing_twice_or_without_a_start_does_nothing(broker: Broker) -> None:
    for end in (broker.publisher(), broker.consumer()):
        end.close()
        end.close()


def test_a_consumer_cannot_be_started_twice(broker: Broker) -> None:
    consumer = broker.consumer()
    consumer.start(Handled())
    with pytest.raises(RuntimeError, match="already been started"):
        consumer.start(Handled())


@pytest.mark.parametrize("field", ["routing_key", "correlation_id", "message_id"])
def test_a_message_that_amqp_cannot_carry_is_rejected(field: str) -> None:
    properties = vars(message_for(random_queue())) | {field: "é" * 128}
    with pytest.raises(ValueError, match=f"{field} of a message has 256 bytes"):
        Message(**properties)


def test_a_full_memory_queue_refuses_messages_until_it_has_room_again() -> None:
    queue = random_queue()
    broker = MemoryBroker(queue, capacity=2)
    publisher = broker.publisher()
    publisher.publish(message_for(queue))
    publisher.publish(message_for(queue))
    with pytest.raises(BrokerUnavailable, match="has its maximum of 2 messages"):
        publisher.publish(message_for(queue))
    handled = Handled()
    consumer = broker.consumer(queue, concurrency=1)
    consumer.start(handled)
    eventually(lambda: len(handled.bodies) == 2)
    publisher.publish(message_for(queue))
    eventually(lambda: len(handled.bodies) == 3)
    consumer.close()


def test_the_memory_broker_keeps_the_last_dead_letters_with_their_reasons() -> None:
    queue = replace(random_queue(), max_dead_letters=2)
    broker = MemoryBroker(queue)

    def refuse(message: ReceivedMessage) -> None:
        raise MalformedEvent(f"event {message.body.decode()} is none")

    publisher = broker.publisher()
    for number in range(3):
        publisher.publish(message_for(queue, b"%d" % number))
    consumer = broker.consumer(queue, concurrency=1)
    consumer.start(refuse)
    eventually(
        lambda: (
            [letter.reason for letter in broker.dead_letters(queue)]
            == ["event 1 is none", "event 2 is none"]
        )
    )
    consumer.close()


def test_the_message_properties_arrive_unchanged(rabbit: Rabbit) -> None:
    publisher = rabbit.publisher()
    publisher.ping()
    queue = rabbit.bind_foreign_queue()
    message = rabbit.foreign_message()
    publisher.publish(message)
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
        publisher.publish(message)
    queue = rabbit.bind_foreign_queue()
    publisher.publish(message)
    assert rabbit.channel.basic_get(queue, auto_ack=True)[1].message_id == message.message_id


def test_a_message_that_the_broker_refuses_counts_as_unpublished(rabbit: Rabbit) -> None:
    publisher = rabbit.publisher()
    publisher.ping()
    rabbit.bind_foreign_queue(**{"x-max-length": 1, "x-overflow": "reject-publish"})
    publisher.publish(rabbit.foreign_message())
    with pytest.raises(BrokerUnavailable, match="refused message"):
        publisher.publish(rabbit.foreign_message())


def test_two_releases_with_different_queue_arguments_work_side_by_side(
    rabbit: Rabbit,
) -> None:
    rabbit.publisher().publish(rabbit.message(b"of this release"))
    rabbit.queue = replace(rabbit.queue, delivery_limit=7, max_dead_letters=3)
    handled = Handled()
    with structlog.testing.capture_logs() as log:
        rabbit.consumer().start(handled)
        rabbit.publisher().publish(rabbit.message(b"of the next"))
        eventually(lambda: handled.bodies == [b"of this release", b"of the next"])
    causes = [entry["cause"] for entry in log if "is used as it is" in entry["event"]]
    assert len(causes) == 4
    assert all("inequivalent arg" in cause for cause in causes)
    assert any(f"'{rabbit.queue.queue}'" in cause for cause in causes)
    assert any(f"'{rabbit.queue.dead_letter}'" in cause for cause in causes)


def test_a_queue_that_cannot_be_declared_is_reported_with_the_cause(rabbit: Rabbit) -> None:
    rabbit.queue = replace(rabbit.queue, max_dead_letters=-1)
    with pytest.raises(BrokerUnavailable, match=r"invalid arg 'x-max-length'.*dead'"):
        rabbit.publisher().publish(rabbit.message())


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
    publish = partial(publisher.publish, rabbit.foreign_message())
    for call in (publish, publisher.ping):
        with pytest.raises(Unroutable, match=f"no queue '{rabbit.foreign_queue}'"):
            call()
    assert rabbit.waiting(rabbit.other_queue) == 0

    rabbit.bind_foreign_queue()

    eventually(lambda: pings(publisher))
    publisher.publish(rabbit.foreign_message())
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
        rabbit.publisher(expected_queue=rabbit.foreign_queue).publish(rabbit.foreign_message())
    assert rabbit.waiting(rabbit.other_queue) == 0


def test_a_deleted_exchange_is_declared_again(rabbit: Rabbit) -> None:
    publisher = rabbit.publisher()
    publisher.publish(rabbit.message())
    rabbit.channel.exchange_delete(rabbit.queue.exchange)
    with pytest.raises(BrokerUnavailable, match="no exchange"):
        publisher.publish(rabbit.message())
    eventually(lambda: publishes(publisher, rabbit.message()))


def test_a_consumer_redeclares_its_deleted_queue_and_continues(rabbit: Rabbit) -> None:
    handled = Handled()
    consumer = rabbit.consumer()
    consumer.start(handled)
    publisher = rabbit.publisher()
    publisher.publish(rabbit.message(b"before"))
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
    rabbit.publisher().publish(rabbit.message(b"event"))
    eventually(lambda: handled.bodies == [b"event"])
    assert idle.backlog() == 0


@pytest.mark.parametrize("bad", ["memory", "amqp://user:pa/word@host:5672/v", "http://h:1/"])
def test_an_invalid_broker_url_is_rejected_without_quoting_it(bad: str) -> None:
    with pytest.raises(ValueError, match="URL is not valid") as raised:
        RabbitEventPublisher(bad, topology=[])
    assert "word" not in str(raised.value).replace("password", "")
    assert raised.value.__suppress_context__


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    with Proxy(broker_url, keeps_requests=True) as proxy:
        yield proxy


def publishes(publisher: EventPublisher, message: Message) -> bool:
    try:
        publisher.publish(message)
    except (BrokerUnavailable, Unroutable):
        return False
    return True


def begins(publisher: EventPublisher, message: Message) -> bool:
    try:
        publisher.begin(message)
    except BrokerUnavailable:
        return False
    return True


def pings(end: EventPublisher | EventConsumer) -> bool:
    try:
        end.ping()
    except (BrokerUnavailable, Unroutable):
        return False
    return True


def test_nothing_connects_before_the_first_use(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url)
    rabbit.consumer(url=proxy.url)
    assert proxy.accepted == 0
    publisher.publish(rabbit.message())
    assert proxy.accepted == 1


def test_an_unreachable_broker_is_reported_with_cause_and_time_without_password(
    rabbit: Rabbit,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    publisher = rabbit.publisher(f"amqp://somebody:swordfish@127.0.0.1:{port}/some-vhost")
    with pytest.raises(BrokerUnavailable) as raised:
        publisher.publish(rabbit.message())
    text = str(raised.value)
    assert f"127.0.0.1:{port}, vhost some-vhost" in text
    assert "Connection refused" in text
    assert "not connected since 20" in text
    assert "swordfish" not in text


def test_a_refused_password_is_not_reported(rabbit: Rabbit, proxy: Proxy) -> None:
    address = proxy.url.rpartition("@")[2]
    publisher = rabbit.publisher(f"amqp://guest:swordfish@{address}")
    with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED") as raised:
        publisher.publish(rabbit.message())
    assert "swordfish" not in str(raised.value)


def test_a_publisher_reconnects_after_a_lost_connection(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url)
    publisher.publish(rabbit.message())
    proxy.cut()
    eventually(lambda: not pings(publisher))
    with pytest.raises(BrokerUnavailable, match="not connected since"):
        publisher.publish(rabbit.message())
    proxy.heal()
    eventually(lambda: publishes(publisher, rabbit.message()))


def test_messages_confirmed_before_a_connection_broke_are_in_the_queue(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    publisher = rabbit.publisher(proxy.url, confirm_seconds=5)
    publisher.ping()
    stop = threading.Event()
    confirmed: list[bytes] = []

    def publish(thread: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            body = b"%d/%d" % (thread, number)
            if publishes(publisher, rabbit.message(body)):
                confirmed.append(body)
            else:
                stop.wait(0.01)

    def at_least(count: int) -> bool:
        return len(confirmed) >= count

    with ThreadPoolExecutor(4) as pool:
        publishing = [pool.submit(publish, thread) for thread in range(4)]
        for enough in (50, 100, 150):
            eventually(partial(at_least, enough))
            proxy.reset()
        eventually(partial(at_least, 200))
        stop.set()
        for each in publishing:
            each.result(PATIENCE_SECONDS)

    handled = Handled()
    rabbit.consumer(concurrency=4).start(handled)
    eventually(lambda: set(confirmed) <= set(handled.bodies))


def test_a_silent_broker_delays_no_publisher_beyond_its_deadline(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    publisher = rabbit.publisher(proxy.url, confirm_seconds=1)
    publisher.publish(rabbit.message())
    proxy.swallow()
    with ThreadPoolExecutor(16) as pool:
        errors = [pool.submit(publisher.publish, rabbit.message()).exception for _ in range(16)]
        assert {type(error(timeout=15)) for error in errors} == {BrokerUnavailable}
    proxy.heal()
    eventually(lambda: publishes(publisher, rabbit.message()))


def test_a_silent_broker_is_dropped_before_pika_misses_its_heartbeats(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    publisher, consumer = rabbit.publisher(proxy.url), rabbit.consumer(url=proxy.url)
    publisher.publish(rabbit.message())
    consumer.ping()
    proxy.swallow()
    publication = publisher.begin(rabbit.message())
    with structlog.testing.capture_logs() as log:
        with pytest.raises(BrokerUnavailable, match=r"not even a heartbeat; .*may have arrived"):
            publication.wait(PATIENCE_SECONDS)
        with pytest.raises(BrokerUnavailable, match="not connected since"):
            publisher.begin(rabbit.message())
        eventually(lambda: len([e for e in log if "not even" in e.get("cause", "")]) == 2)
    proxy.heal()
    eventually(lambda: publishes(publisher, rabbit.message()))


def test_a_late_confirm_counts_and_its_message_is_not_sent_again(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    publisher = rabbit.publisher(proxy.url, confirm_seconds=0.2)
    publisher.ping()
    message = rabbit.message(b"once")
    proxy.hold_answers()
    publication = publisher.begin(message)
    assert not publication.wait(0)
    for _ in range(3):
        with pytest.raises(
            BrokerUnavailable, match=f"has not confirmed message {message.message_id}"
        ):
            publisher.publish(message)
    assert publication.overdue is not None
    eventually(lambda: publisher.overdue)
    assert not publication.wait(0)

    proxy.release_answers()

    assert publication.wait(PATIENCE_SECONDS)
    eventually(lambda: publisher.overdue is None)
    publisher.publish(rabbit.message(b"next"))
    assert proxy.accepted == 1
    handled = Handled()
    rabbit.consumer().start(handled)
    eventually(lambda: handled.bodies == [b"once", b"next"])


def test_a_confirmed_message_can_be_published_again(rabbit: Rabbit) -> None:
    publisher, message = rabbit.publisher(), rabbit.message()
    publisher.publish(message)
    publisher.publish(message)
    eventually(lambda: rabbit.waiting(rabbit.queue.queue) == 2)


def test_a_large_message_gets_the_time_that_a_slow_line_needs(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url, confirm_seconds=1)
    publisher.ping()
    rabbit.bind_foreign_queue()
    proxy.slow_down(20e6 / 8)
    # Like the request of a POST with 20,000 instances, which may take more than three seconds.
    large = publisher.begin(replace(rabbit.foreign_message(), body=bytes(8_700_000)))
    with ThreadPoolExecutor(2) as pool:
        neighbours = [pool.submit(publisher.publish, rabbit.message()) for _ in range(2)]
        for neighbour in neighbours:
            neighbour.result(PATIENCE_SECONDS)
    assert large.wait(PATIENCE_SECONDS)
    assert large.overdue is None
    assert proxy.accepted == 1


def test_a_broker_that_never_answers_is_given_up_at_the_deadline(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    proxy.swallow()
    publisher = rabbit.publisher(proxy.url, answer_seconds=0.2)
    with pytest.raises(BrokerUnavailable, match="first connection is still being made"):
        within_patience(lambda: publisher.publish(rabbit.message()))
    proxy.heal()
    eventually(lambda: publishes(publisher, rabbit.message()))


def test_closing_does_not_wait_for_a_silent_broker(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url)
    publisher.publish(rabbit.message())
    proxy.swallow()
    within_patience(publisher.close)
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "stowgate publisher"])


def test_a_publisher_recovers_from_a_temporary_lack_of_threads(
    rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = rabbit.publisher()

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as lack:
        lack.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            publisher.publish(rabbit.message())

    publisher.publish(rabbit.message())


def test_closing_while_connecting_logs_nothing_and_leaves_no_thread(rabbit: Rabbit) -> None:
    with structlog.testing.capture_logs() as log:
        for _ in range(20):
            publisher = rabbit.publisher()
            publisher.start()
            publisher.close()
    assert [entry for entry in log if entry["log_level"] == "error"] == []
    assert "stowgate publisher" not in {thread.name for thread in threading.enumerate()}


def test_a_broker_in_alarm_is_unavailable_until_it_accepts_messages_again(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    publisher = rabbit.publisher(proxy.url)
    publisher.publish(rabbit.message())
    blocked = pika.frame.Method(0, pika.spec.Connection.Blocked(reason="low on memory"))
    proxy.tell_clients(blocked.marshal())
    eventually(lambda: not pings(publisher))
    with pytest.raises(BrokerUnavailable, match="low on memory"):
        publisher.publish(rabbit.message())
    proxy.tell_clients(pika.frame.Method(0, pika.spec.Connection.Unblocked()).marshal())
    eventually(lambda: publishes(publisher, rabbit.message()))
    assert proxy.accepted == 1


def test_a_message_in_transit_during_an_alarm_is_not_sent_again(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    publisher, message = rabbit.publisher(proxy.url), rabbit.message()
    publisher.ping()
    proxy.hold_answers()
    publication = publisher.begin(message)
    eventually(lambda: message.message_id.encode() in proxy.asked)
    blocked = pika.frame.Method(0, pika.spec.Connection.Blocked(reason="low on disk"))
    proxy.tell_clients(blocked.marshal())
    eventually(lambda: not begins(publisher, message))
    assert not publication.wait(0)

    proxy.tell_clients(pika.frame.Method(0, pika.spec.Connection.Unblocked()).marshal())
    proxy.release_answers()

    assert publication.wait(PATIENCE_SECONDS)
    assert proxy.accepted == 1
    assert rabbit.waiting(rabbit.queue.queue) == 1


def test_the_expected_queue_is_not_checked_for_each_message(rabbit: Rabbit, proxy: Proxy) -> None:
    rabbit.bind_foreign_queue()
    publisher = rabbit.publisher(proxy.url, expected_queue=rabbit.foreign_queue)
    for _ in range(200):
        publisher.publish(rabbit.foreign_message())
    # Class and method of queue.declare (AMQP 0-9-1, 1.7.2.1), and its reserved short.
    look = b"\x00\x32\x00\x0a\x00\x00" + bytes([len(rabbit.foreign_queue)])
    looks = proxy.asked.count(look + rabbit.foreign_queue.encode())
    assert 1 <= looks < 20


@pytest.mark.parametrize("end", ["publisher", "consumer"])
def test_unanswered_questions_do_not_exhaust_the_channels(
    rabbit: Rabbit, proxy: Proxy, end: str
) -> None:
    url = f"{proxy.url}?channel_max=20"
    asking: EventPublisher | EventConsumer = (
        rabbit.publisher(url, answer_seconds=0.1)
        if end == "publisher"
        else rabbit.consumer(url=url, answer_seconds=0.1)
    )
    eventually(lambda: pings(asking))
    proxy.lose_answers(True)
    for _ in range(30):
        assert not pings(asking)
    proxy.lose_answers(False)

    eventually(lambda: pings(asking))


def test_late_answers_do_not_drop_the_connection(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url, answer_seconds=0.1)
    eventually(lambda: pings(publisher))
    for _ in range(10):
        proxy.hold_answers()
        with pytest.raises(BrokerUnavailable, match="no answer within"):
            publisher.ping()
        proxy.release_answers()
        eventually(lambda: pings(publisher))
    assert proxy.accepted == 1


def test_a_consumer_reconnects_and_continues(rabbit: Rabbit, proxy: Proxy) -> None:
    handled = Handled()
    consumer = rabbit.consumer(url=proxy.url)
    consumer.start(handled)
    publisher = rabbit.publisher()
    publisher.publish(rabbit.message(b"1"))
    eventually(lambda: handled.bodies == [b"1"])
    proxy.cut()
    publisher.publish(rabbit.message(b"2"))
    eventually(lambda: not pings(consumer))
    proxy.heal()
    eventually(lambda: b"2" in handled.bodies)
    eventually(lambda: pings(consumer))


def test_an_event_in_progress_is_redelivered_after_a_lost_connection_and_acked_once(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    released = threading.Event()
    deliveries: list[bytes] = []

    def hang_at_first(message: ReceivedMessage) -> None:
        deliveries.append(message.body)
        if len(deliveries) == 1:
            released.wait(PATIENCE_SECONDS)

    consumer = rabbit.consumer(concurrency=2, url=proxy.url)
    consumer.start(hang_at_first)
    publisher = rabbit.publisher()
    publisher.publish(rabbit.message(b"in hand"))
    eventually(lambda: deliveries == [b"in hand"])
    proxy.reset()
    eventually(lambda: deliveries == [b"in hand"] * 2)
    connections = proxy.accepted
    released.set()
    publisher.publish(rabbit.message(b"next"))
    eventually(lambda: deliveries[2:] == [b"next"])
    consumer.close()
    # A stale ack would have closed the channel, and the connection with it.
    assert proxy.accepted == connections
    assert rabbit.consumer().backlog() == 0


def test_a_message_file_shows_properties_and_body(tmp_path: Path) -> None:
    folder = tmp_path / "workflow-requests"
    publisher = FolderEventPublisher(folder)
    message = replace(
        message_for(random_queue(), '{"payload_id": "ü", "workflows": []}'.encode()),
        headers={"traceparent": "00-1"},
    )
    publisher.ping()
    publisher.publish(message)
    publisher.publish(message)
    (file,) = folder.iterdir()
    assert file.name == f"{message.message_id}.json"
    text = file.read_text(encoding="utf-8")
    assert '\n  "body": {\n    "payload_id": "ü",' in text
    assert json.loads(text) == {
        "properties": {
            "content_type": "application/json",
            "delivery_mode": 2,
            "message_id": message.message_id,
            "app_id": message.app_id,
            "correlation_id": message.correlation_id,
            "type": message.type,
            "timestamp": message.timestamp,
            "exchange": message.exchange,
            "routing_key": message.routing_key,
            "headers": {"traceparent": "00-1"},
        },
        "body": {"payload_id": "ü", "workflows": []},
    }


def test_an_unwritable_folder_is_an_unavailable_broker(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    publisher = FolderEventPublisher(in_the_way / "workflow-requests")
    with pytest.raises(BrokerUnavailable, match=r"cannot write to .*workflow-requests"):
        publisher.publish(message_for(random_queue()))
    with pytest.raises(BrokerUnavailable, match=r"cannot write to .*workflow-requests"):
        publisher.ping()


def test_a_message_file_that_cannot_be_renamed_leaves_nothing_behind(tmp_path: Path) -> None:
    message = message_for(random_queue())
    (tmp_path / f"{message.message_id}.json").mkdir()
    with pytest.raises(BrokerUnavailable):
        FolderEventPublisher(tmp_path).publish(message)
    assert [path.name for path in tmp_path.iterdir()] == [f"{message.message_id}.json"]


@pytest.mark.parametrize("message_id", ["../escape", "", ".hidden", "a/b"])
def test_a_message_id_that_is_not_a_file_name_is_rejected(tmp_path: Path, message_id: str) -> None:
    folder = tmp_path / "folder"
    properties = vars(message_for(random_queue())) | {"message_id": message_id}
    with pytest.raises(ValueError, match="file name"):
        FolderEventPublisher(folder).publish(Message(**properties))
    assert list(tmp_path.iterdir()) == []
