"""RabbitMQ as several nodes, and a password that changes while a service runs."""

import contextlib
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from brokers import Handled, Rabbit, eventually, pings, publishes
from proxy import Proxy

from shared.adapters.rabbitmq.connection import broker_urls
from shared.adapters.rabbitmq.publisher import RabbitEventConsumer, RabbitEventPublisher
from shared.errors import BrokerUnavailable
from shared.settings.loader import BadSetting, load
from shared.settings.services import CommonSettings


@pytest.fixture
def nodes(broker_url: str) -> Iterator[list[Proxy]]:
    """Two addresses of the broker that fail on their own."""
    with Proxy(broker_url) as one, Proxy(broker_url) as other:
        yield [one, other]


def several(nodes: list[Proxy]) -> str:
    return ",".join(node.url for node in nodes)


def test_a_node_that_is_gone_is_left_for_another_in_either_order(
    rabbit: Rabbit, nodes: list[Proxy]
) -> None:
    handled = Handled()
    rabbit.consumer(url=several(nodes)).start(handled)
    publisher = rabbit.publisher(several(nodes))
    eventually(lambda: pings(publisher))
    for number, gone in enumerate([*nodes, nodes[0]]):
        for node in nodes:
            if node is gone:
                node.cut()
            else:
                node.heal()
        body = b"%d" % number
        eventually(partial(publishes, publisher, rabbit.message(body)))
        eventually(partial(handled.bodies.__contains__, body))


def test_nobody_is_bound_to_the_first_address(rabbit: Rabbit, nodes: list[Proxy]) -> None:
    """So services spread over the nodes."""
    for _ in range(24):
        publisher = rabbit.publisher(several(nodes))
        publisher.ping()
        publisher.close()
    assert all(node.accepted for node in nodes)


def test_what_is_wrong_with_a_node_names_it(rabbit: Rabbit) -> None:
    with socket.socket() as one, socket.socket() as other:
        ports = []
        for taken in (one, other):
            taken.bind(("127.0.0.1", 0))
            ports.append(taken.getsockname()[1])
        url = ",".join(f"amqp://user:hidden-word@127.0.0.1:{port}/vhost" for port in ports)
        publisher = rabbit.publisher(url)
        with pytest.raises(BrokerUnavailable) as caught:
            publisher.ping()
    words = str(caught.value)
    assert f"RabbitMQ at 127.0.0.1:{ports[0]} or 127.0.0.1:{ports[1]}, vhost vhost" in words
    assert any(f"127.0.0.1:{port}: Connection refused" in words for port in ports)
    assert "hidden-word" not in words


def test_a_password_is_read_again_for_each_new_connection(
    rabbit: Rabbit, nodes: list[Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = urlsplit(nodes[0].url)
    file = tmp_path / "password"
    file.write_text("not-any-more\n")
    monkeypatch.setenv("STOWGATE_BROKER", f"amqp://{url.username}@127.0.0.1:{url.port}{url.path}")
    monkeypatch.setenv("STOWGATE_BROKER_PASSWORD_FILE", str(file))
    settings = load(CommonSettings)
    with contextlib.ExitStack() as closing:
        publisher = RabbitEventPublisher(
            settings.broker, topology=[rabbit.queue], password=settings.current("broker_password")
        )
        closing.callback(publisher.close)
        consumer = RabbitEventConsumer(
            settings.broker,
            queue=rabbit.queue,
            concurrency=1,
            password=settings.current("broker_password"),
        )
        closing.callback(consumer.close)
        with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED") as caught:
            publisher.ping()
        assert "not-any-more" not in str(caught.value)
        file.unlink()
        eventually(lambda: not pings(publisher))
        file.write_text(unquote(url.password or "") + "\n")
        eventually(lambda: pings(publisher))
        eventually(lambda: pings(consumer))


@pytest.mark.parametrize(
    "value",
    ["amqp://a:b@one:5672,two:5672", "memory,amqp://a:b@one", "amqp://a:b@one,memory", ",", ""],
)
def test_addresses_that_cannot_be_told_apart_stop_the_start(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOWGATE_BROKER", value)
    if not value:
        assert load(CommonSettings).broker == "memory"
        return
    with pytest.raises(BadSetting, match="STOWGATE_BROKER is"):
        load(CommonSettings)


def test_a_comma_in_a_password_parts_no_addresses() -> None:
    urls = "amqp://a:x,y@one:5672/v,amqps://a:x,y@two:5671/v"
    assert broker_urls(urls) == ["amqp://a:x,y@one:5672/v", "amqps://a:x,y@two:5671/v"]
