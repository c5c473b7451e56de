"""Health and metrics of a worker, which need no authentication."""

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import requests
from service import Service, running, wait_for
from wire import connect


@pytest.fixture(scope="module")
def broker() -> str:
    """A broker that refuses connections."""
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    return f"amqp://guest:guest@127.0.0.1:{port}/a-secret-vhost"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Service]:
    with running("worker", tmp_path_factory.mktemp("worker"), STOWGATE_BROKER=broker) as service:
        yield service


def threads(service: Service) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    found = re.search(r"^Threads:\s+(\d+)$", status, re.MULTILINE)
    assert found
    return int(found[1])


def test_many_connections_to_a_worker_need_no_threads_and_it_stays_live(
    worker: Service,
) -> None:
    assert worker.get("/health/live").status_code == 200
    before = threads(worker)
    with ExitStack() as stack:
        for number in range(300):
            sock = stack.enter_context(connect(worker))
            sock.sendall(b"GET /health/live HTTP/1.1\r\n" * (number % 2))

        assert worker.get("/health/live").status_code == 200
        # The threads that connect to the broker come and go.
        assert threads(worker) < before + 20


def test_a_worker_reports_states_over_http_and_logs_the_reasons(worker: Service) -> None:
    ready = worker.get("/health/ready")

    assert ready.status_code == 200
    assert ready.json() == {
        "status": "degraded",
        "dependencies": {
            "object_store": {"status": "ready"},
            "free_space": {"status": "ready"},
            "broker": {"status": "down"},
            "workflow_manager_queue": {"status": "down"},
            "workflow_manager_refusals": {"status": "down"},
        },
    }
    wait_for(lambda: '"dependency": "broker", "error"' in worker.log.read_text())
    assert requests.get(f"{worker.url}/metrics", timeout=60).status_code == 200
