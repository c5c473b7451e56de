"""Connections to a real RabbitMQ that are lost, silent, slow or blocked."""

import gc
import socket
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pika
import pika.frame
import pytest
import structlog.testing
from brokers import (
    PATIENCE_SECONDS,
    Handled,
    Rabbit,
    Told,
    begins,
    eventually,
    pings,
    publish,
    publishes,
    within_patience,
)
from prometheus_client import CollectorRegistry
from proxy import Proxy

from shared.errors import BrokerUnavailable
from shared.ports import EventConsumer, EventPublisher, ReceivedMessage
from shared.runtime.measured import Calls, MeasuredEventPublisher
from shared.runtime.metrics import BackendMetrics


def test_nothing_connects_before_the_first_use(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url)
    rabbit.consumer(url=proxy.url)
    assert proxy.accepted == 0
    publish(publisher, rabbit.message())
    assert proxy.accepted == 1


def test_an_unreachable_broker_is_reported_with_cause_and_time_without_password(
    rabbit: Rabbit,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    publisher = rabbit.publisher(f"amqp://somebody:swordfish@127.0.0.1:{port}/some-vhost")
    with pytest.raises(BrokerUnavailable) as raised:
        publish(publisher, rabbit.message())
    text = str(raised.value)
    assert f"127.0.0.1:{port}, vhost some-vhost" in text
    assert "Connection refused" in text
    assert "not connected since 20" in text
    assert "swordfish" not in text


def test_a_refused_password_is_not_reported(rabbit: Rabbit, proxy: Proxy) -> None:
    address = proxy.url.rpartition("@")[2]
    publisher = rabbit.publisher(f"amqp://guest:swordfish@{address}")
    with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED") as raised:
        publish(publisher, rabbit.message())
    assert "swordfish" not in str(raised.value)


def test_a_publisher_reconnects_after_a_lost_connection(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url)
    publish(publisher, rabbit.message())
    proxy.cut()
    eventually(lambda: not pings(publisher))
    with pytest.raises(BrokerUnavailable, match="not connected since"):
        publish(publisher, rabbit.message())
    proxy.heal()
    eventually(lambda: publishes(publisher, rabbit.message()))


def test_messages_confirmed_before_a_connection_broke_are_in_the_queue(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    publisher = rabbit.publisher(proxy.url, confirm_seconds=5)
    publisher.ping()
    stop = threading.Event()
    confirmed: list[bytes] = []

    def publish_many(thread: int) -> None:
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
        publishing = [pool.submit(publish_many, thread) for thread in range(4)]
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
    publish(publisher, rabbit.message())
    proxy.swallow()
    with ThreadPoolExecutor(16) as pool:
        errors = [pool.submit(publish, publisher, rabbit.message()).exception for _ in range(16)]
        assert {type(error(timeout=15)) for error in errors} == {BrokerUnavailable}
    proxy.heal()
    eventually(lambda: publishes(publisher, rabbit.message()))


@pytest.fixture
def unanswered(rabbit: Rabbit, proxy: Proxy) -> EventPublisher:
    """A connected publisher to which no confirm comes until `proxy.release_answers`."""
    publisher = rabbit.publisher(proxy.url)
    publisher.ping()
    proxy.hold_answers()
    return publisher


def test_whoever_does_not_wait_is_told_when_the_connection_is_lost(
    rabbit: Rabbit, proxy: Proxy, unanswered: EventPublisher
) -> None:
    told = Told()
    unanswered.begin(rabbit.message()).on_settled(told)
    eventually(lambda: rabbit.waiting(rabbit.queue.queue) == 1)
    assert told == []

    proxy.reset()

    eventually(lambda: told)
    (error,) = told
    assert isinstance(error, BrokerUnavailable)
    assert "may have arrived" in str(error)


def test_closing_waits_for_the_confirms_of_what_was_sent(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url)
    publisher.ping()
    proxy.delay(0.1)
    told = Told()
    for _ in range(50):
        publisher.begin(rabbit.message()).on_settled(told)

    publisher.close()

    assert told == [None] * 50


def test_a_silent_broker_holds_all_up_for_one_deadline_after_the_start(
    rabbit: Rabbit, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float | None] = []

    class Waiting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout)
            return super().wait(timeout)

    proxy.swallow()
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Event", Waiting)
        publisher = rabbit.publisher(proxy.url, answer_seconds=0.2)
    for _ in range(2):
        with pytest.raises(BrokerUnavailable):
            publisher.begin(rabbit.message())
    assert waited[-1] == 0


def test_a_settled_publication_leaves_nothing_to_the_garbage_collector(rabbit: Rabbit) -> None:
    calls = Calls(BackendMetrics(CollectorRegistry()).broker_call_seconds)
    publisher = MeasuredEventPublisher(rabbit.publisher(), calls, "publish_event")
    told = Told()
    message = rabbit.message()
    alive = weakref.ref(message)
    gc.disable()
    try:
        publisher.begin(message).on_settled(told)
        del message
        eventually(lambda: told == [None])
        eventually(lambda: alive() is None)
    finally:
        gc.enable()


def test_messages_over_the_maximum_in_transit_are_refused_and_later_ones_sent(
    rabbit: Rabbit, proxy: Proxy, unanswered: EventPublisher
) -> None:
    told = Told()
    for number in range(1010):
        unanswered.begin(rabbit.message(b"%d" % number)).on_settled(told)

    eventually(lambda: len(told) == 10)
    assert all("is the maximum" in str(error) for error in told)
    proxy.release_answers()
    eventually(lambda: told[10:] == [None] * 1000)
    publish(unanswered, rabbit.message())
    assert rabbit.waiting(rabbit.queue.queue) == 1001


def test_a_silent_broker_is_dropped_before_pika_misses_its_heartbeats(
    rabbit: Rabbit, proxy: Proxy
) -> None:
    publisher, consumer = rabbit.publisher(proxy.url), rabbit.consumer(url=proxy.url)
    publish(publisher, rabbit.message())
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
    publisher = rabbit.publisher(proxy.url, confirm_seconds=0.2, expected_queue=rabbit.queue.queue)
    publisher.ping()
    message = rabbit.message(b"once")
    proxy.hold_answers()
    publication = publisher.begin(message)
    assert not publication.wait(0)
    for _ in range(3):
        with pytest.raises(
            BrokerUnavailable, match=f"has not confirmed message {message.message_id}"
        ):
            publish(publisher, message)
    assert publication.overdue is not None
    eventually(lambda: not pings(publisher))
    with pytest.raises(BrokerUnavailable, match="has not confirmed"):
        publisher.ping()
    assert not publication.wait(0)

    proxy.release_answers()

    assert publication.wait(PATIENCE_SECONDS)
    eventually(lambda: pings(publisher))
    publish(publisher, rabbit.message(b"next"))
    assert proxy.accepted == 1
    handled = Handled()
    rabbit.consumer().start(handled)
    eventually(lambda: handled.bodies == [b"once", b"next"])


def test_a_confirmed_message_can_be_published_again(rabbit: Rabbit) -> None:
    publisher, message = rabbit.publisher(), rabbit.message()
    publish(publisher, message)
    publish(publisher, message)
    eventually(lambda: rabbit.waiting(rabbit.queue.queue) == 2)


def test_a_large_message_gets_the_time_that_a_slow_line_needs(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url, confirm_seconds=1)
    publisher.ping()
    rabbit.bind_foreign_queue()
    proxy.slow_down(20e6 / 8)
    # Like the request of a POST with 20,000 instances, which may take more than three seconds.
    large = publisher.begin(replace(rabbit.foreign_message(), body=bytes(8_700_000)))
    with ThreadPoolExecutor(2) as pool:
        neighbours = [pool.submit(publish, publisher, rabbit.message()) for _ in range(2)]
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
        within_patience(lambda: publish(publisher, rabbit.message()))
    proxy.heal()
    eventually(lambda: publishes(publisher, rabbit.message()))


def test_closing_does_not_wait_for_a_silent_broker(rabbit: Rabbit, proxy: Proxy) -> None:
    publisher = rabbit.publisher(proxy.url)
    publish(publisher, rabbit.message())
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
            publish(publisher, rabbit.message())

    publish(publisher, rabbit.message())


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
    publish(publisher, rabbit.message())
    blocked = pika.frame.Method(0, pika.spec.Connection.Blocked(reason="low on memory"))
    proxy.tell_clients(blocked.marshal())
    eventually(lambda: not pings(publisher))
    with pytest.raises(BrokerUnavailable, match="low on memory"):
        publish(publisher, rabbit.message())
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
        publish(publisher, rabbit.foreign_message())
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
    publish(publisher, rabbit.message(b"1"))
    eventually(lambda: handled.bodies == [b"1"])
    proxy.cut()
    publish(publisher, rabbit.message(b"2"))
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
    publish(publisher, rabbit.message(b"in hand"))
    eventually(lambda: deliveries == [b"in hand"])
    proxy.reset()
    eventually(lambda: deliveries == [b"in hand"] * 2)
    connections = proxy.accepted
    released.set()
    publish(publisher, rabbit.message(b"next"))
    eventually(lambda: deliveries[2:] == [b"next"])
    consumer.close()
    # A stale ack would have closed the channel, and the connection with it.
    assert proxy.accepted == connections
    assert rabbit.consumer().backlog() == 0
