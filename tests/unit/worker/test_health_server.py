"""The worker's health port with hostile clients."""

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from flask import Flask
from service import wait_for
from waitress import wasyncore

from worker.health_server import HealthServer

MAX_CONNECTIONS = 10


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr("worker.health_server._max_connections", lambda: MAX_CONNECTIONS)
    app = Flask(__name__, static_folder=None)
    app.add_url_rule("/live", "live", lambda: "live", methods=["GET", "POST"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = HealthServer(app, listener)
        thread = threading.Thread(target=server.run)
        thread.start()
        yield listener.getsockname()[1]
        # The loop ends with its last connection.
        wasyncore.close_all(server._map)
        thread.join()
        server.task_dispatcher.shutdown()


def live(port: int, body: bytes | None = None) -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET" if body is None else "POST", "/live", body)
        return connection.getresponse().status


@pytest.mark.parametrize("begun", [b"", b"GET /live HTTP/1.1\r\nHost: w"])
def test_idle_connections_need_no_threads_and_the_oldest_are_closed(
    port: int, begun: bytes
) -> None:
    assert live(port) == 200
    threads = threading.active_count()
    with ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            for _ in range(5 * MAX_CONNECTIONS)
        ]
        for connection in idle[-MAX_CONNECTIONS:]:
            connection.sendall(begun)

        assert live(port) == 200
        assert threading.active_count() == threads
        assert idle[0].recv(1) == b""


def test_a_body_is_refused_before_it_is_stored(port: int) -> None:
    assert live(port, bytes(4096)) == 413
    wait_for(lambda: live(port) == 200)
