"""The contract of every event broker, then the broker in memory."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import structlog.testing
from brokers import (
    PATIENCE_SECONDS,
    Broker,
    Handled,
    Told,
    eventually,
    message_for,
    pings,
    publish,
    random_queue,
)

from shared.adapters.memory import MemoryBroker
from shared.errors import BrokerUnavailable, MalformedEvent, Unroutable
from shared.ports import Message, ReceivedMessage


def test_a_published_event_reaches_the_handler_with_its_body(broker: Broker) -> None:
    handled = Handled()
    broker.consumer().start(handled)
    body = '{"payload_id": "ü", "nul": "\\u0000"}'.encode()
    publish(broker.publisher(), broker.message(body))
    eventually(lambda: handled.bodies == [body])


def test_events_published_before_any_consumer_existed_are_delivered_in_order(
    broker: Broker,
) -> None:
    bodies = [b"%d" % number for number in range(20)]
    publisher = broker.publisher()
    for body in bodies:
        publish(publisher, broker.message(body))
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
        publish(publisher, broker.message())
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
        publish(publisher, broker.message(body))
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
    publish(publisher, broker.message(b"bug"))
    handled = Handled(fail_once)
    broker.consumer().start(handled)
    eventually(lambda: broker.dead_letters() == [b"bug"])
    publish(publisher, broker.message(b"next"))
    eventually(lambda: handled.bodies == [b"bug", b"next"])


def test_a_failed_handler_is_logged_without_the_exceptions_text(
    broker: Broker,
) -> None:
    patient_name = "DOE^JOHN"

    def quote_the_dataset(_message: ReceivedMessage) -> None:
        raise ValueError(patient_name)

    with structlog.testing.capture_logs() as log:
        publish(broker.publisher(), broker.message())
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
        publish(publisher, broker.message(routing_key="nobody.listens"))
    assert broker.queue.exchange in str(raised.value)
    assert "nobody.listens" in str(raised.value)
    publish(publisher, broker.message())


def test_whoever_does_not_wait_is_told_of_the_confirm_or_the_error(broker: Broker) -> None:
    publisher = broker.publisher()
    told = Told()
    publisher.begin(broker.message()).on_settled(told)
    eventually(lambda: told == [None])

    try:
        publisher.begin(broker.message(routing_key="nobody.listens")).on_settled(told)
    except Unroutable as at_once:
        told(at_once)

    eventually(lambda: len(told) == 2)
    assert isinstance(told[1], Unroutable)


def test_the_backlog_counts_undelivered_events(broker: Broker) -> None:
    publisher = broker.publisher()
    for _ in range(5):
        publish(publisher, broker.message())
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
    publish(publisher, broker.message(b"in hand"))
    publish(publisher, broker.message(b"waiting"))
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


def test_close_requeues_events_that_do_not_finish_in_time_and_marks_them_as_redelivered(
    broker: Broker,
) -> None:
    in_hand, released, finished = threading.Event(), threading.Event(), threading.Event()
    redelivered = []

    def handle(message: ReceivedMessage) -> None:
        redelivered.append(message.redelivered)
        in_hand.set()
        released.wait(PATIENCE_SECONDS)
        finished.set()

    publish(broker.publisher(), broker.message(b"unfinished"))
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
    assert (redelivered, again.redelivered) == ([False], [True])
    assert broker.consumer().backlog() == 0
    assert broker.dead_letters() == []


def test_events_are_distributed_among_consumers(broker: Broker) -> None:
    both_busy = threading.Barrier(2)
    first = Handled(lambda _: both_busy.wait(PATIENCE_SECONDS))
    second = Handled(lambda _: both_busy.wait(PATIENCE_SECONDS))
    broker.consumer().start(first)
    broker.consumer().start(second)
    publisher = broker.publisher()
    publish(publisher, broker.message(b"1"))
    publish(publisher, broker.message(b"2"))
    eventually(lambda: sorted(first.bodies + second.bodies) == [b"1", b"2"])
    assert len(first.bodies) == 1


def test_many_threads_publish_at_once_and_nothing_is_lost(broker: Broker) -> None:
    publisher = broker.publisher()
    handled = Handled()
    broker.consumer(concurrency=4).start(handled)

    def publish_many(thread: int) -> None:
        for number in range(200):
            publish(publisher, broker.message(b"%d/%d" % (thread, number)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish_many, range(8)))
    eventually(lambda: len(handled.bodies) >= 1600)
    assert Counter(handled.bodies) == Counter(
        b"%d/%d" % (thread, number) for thread in range(8) for number in range(200)
    )


def test_concurrent_routable_and_unroutable_messages_are_distinguished(broker: Broker) -> None:
    publisher = broker.publisher()

    def is_unroutable(number: int) -> bool:
        try:
            publish(publisher, broker.message(routing_key="nobody.listens" if number % 2 else None))
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
        publish(publisher, broker.message())
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
    publish(publisher, message_for(queue))
    publish(publisher, message_for(queue))
    with pytest.raises(BrokerUnavailable, match="has its maximum of 2 messages"):
        publish(publisher, message_for(queue))
    handled = Handled()
    consumer = broker.consumer(queue, concurrency=1)
    consumer.start(handled)
    eventually(lambda: len(handled.bodies) == 2)
    publish(publisher, message_for(queue))
    eventually(lambda: len(handled.bodies) == 3)
    consumer.close()


def test_the_memory_broker_keeps_the_last_dead_letters_with_their_reasons() -> None:
    queue = replace(random_queue(), max_dead_letters=2)
    broker = MemoryBroker(queue)

    def refuse(message: ReceivedMessage) -> None:
        raise MalformedEvent(f"event {message.body.decode()} is none")

    publisher = broker.publisher()
    for number in range(3):
        publish(publisher, message_for(queue, b"%d" % number))
    consumer = broker.consumer(queue, concurrency=1)
    consumer.start(refuse)
    eventually(
        lambda: (
            [letter.reason for letter in broker.dead_letters(queue)]
            == ["event 1 is none", "event 2 is none"]
        )
    )
    consumer.close()
