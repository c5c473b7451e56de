"""Health over HTTP while a dependency does not answer."""

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from flask import Flask
from prometheus_client import CollectorRegistry
from service import wait_for
from structlog.testing import capture_logs

from shared.errors import StoreUnavailable
from shared.runtime.backends import Dependency
from shared.runtime.health import Readiness, health_views
from shared.runtime.metrics import HealthMetrics

STORE = "http://10.0.0.7:9000/monaideploy: cannot reach the bucket"


class Engine:
    """Answers at once, fails, or blocks the caller until it is released."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.asked = 0
        self.silent = False
        self.goes_on = threading.Event()

    def ping(self) -> None:
        self.asked += 1
        if self.silent:
            self.goes_on.wait(60)
        if self.fault is not None:
            raise StoreUnavailable(self.fault)


class Probe:
    """The health of a service with this dependency, for concurrent callers."""

    def __init__(self, engine: Engine, *, may_read: bool = True) -> None:
        self.now = 1000.0
        dependencies = {
            "object_store": Dependency(engine.ping, essential=True),
            "broker": Dependency(lambda: None, essential=False),
        }
        self.registry = CollectorRegistry()
        self.readiness = Readiness(dependencies, HealthMetrics(self.registry), lambda: self.now)
        self._app = Flask(__name__, static_folder=None)
        views = health_views(self.readiness, self.registry, CollectorRegistry(), lambda: may_read)
        self._app.add_url_rule("/health/ready", view_func=views["health.ready"])
        self._app.add_url_rule("/metrics", view_func=views["health.metrics"])

    def ready(self) -> tuple[int, Mapping[str, Any], str]:
        answer = self._app.test_client().get("/health/ready")
        return answer.status_code, json.loads(answer.data), answer.headers["Age"]

    def metrics(self) -> str:
        return self._app.test_client().get("/metrics").text


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def askers(engine: Engine) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as pool:
        yield pool
        engine.goes_on.set()


def test_one_caller_waits_for_a_silent_store_and_the_others_get_the_last_report(
    engine: Engine, askers: ThreadPoolExecutor
) -> None:
    probe = Probe(engine)
    assert probe.ready()[0] == 200
    engine.silent, engine.fault = True, STORE
    looking = askers.submit(probe.ready)
    wait_for(lambda: engine.asked == 2)
    probe.now += 7

    others = [askers.submit(probe.ready) for _ in range(19)]
    wait(others, timeout=60)

    assert not looking.done()
    assert engine.asked == 2
    assert {other.result()[0] for other in others} == {200}
    assert {other.result()[2] for other in others} == {"7"}
    engine.goes_on.set()
    assert looking.result()[1]["status"] == "down"
    assert probe.ready()[1]["status"] == "down"


@pytest.mark.parametrize("last_seconds_ago", [None, 3600])
def test_while_the_first_check_runs_others_get_the_status_unknown(
    engine: Engine, askers: ThreadPoolExecutor, last_seconds_ago: float | None
) -> None:
    probe = Probe(engine)
    if last_seconds_ago is not None:
        assert probe.ready()[0] == 200
        probe.now += last_seconds_ago
    asked = engine.asked
    engine.silent = True
    looking = askers.submit(probe.ready)
    wait_for(lambda: engine.asked == asked + 1)

    others = [askers.submit(probe.ready) for _ in range(3)]
    wait(others, timeout=60)

    assert not looking.done()
    assert {(status, body["status"]) for status, body, _ in _results(others)} == {(200, "unknown")}
    engine.goes_on.set()
    assert looking.result()[0] == 200


def test_concurrent_first_callers_all_get_the_report_of_one(
    engine: Engine, askers: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.runtime.health._WAIT_SECONDS", 60.0)
    probe = Probe(engine)
    engine.silent = True
    asking = [askers.submit(probe.ready) for _ in range(5)]
    wait_for(lambda: engine.asked == 1)

    engine.goes_on.set()

    assert {status for status, _, _ in _results(asking)} == {200}


def _results(futures: "list[Future[Any]]") -> list[Any]:
    return [future.result() for future in futures]


@pytest.mark.parametrize("may_read", [False, True])
def test_faults_are_shown_only_with_permission_to_read(engine: Engine, may_read: bool) -> None:
    engine.fault = STORE

    status, body, _ = Probe(engine, may_read=may_read).ready()

    assert (status, body["status"]) == (200, "down")
    detail = {"detail": STORE} if may_read else {}
    assert body["dependencies"] == {
        "object_store": {"status": "down", **detail},
        "broker": {"status": "ready"},
    }


def test_each_change_of_a_dependency_is_logged_once_with_the_reason(engine: Engine) -> None:
    probe = Probe(engine, may_read=False)
    with capture_logs() as logged:
        for fault in (None, STORE, STORE, None, None):
            engine.fault = fault
            probe.ready()

    assert [(line["event"], line["dependency"], line.get("error")) for line in logged] == [
        ("dependency down", "object_store", STORE),
        ("dependency ready again", "object_store", None),
    ]


def test_a_replica_stays_ready_while_the_store_is_down(engine: Engine) -> None:
    """All replicas share it: senders would meet an empty load balancer in place of a 503."""
    probe = Probe(engine)
    for fault, state, up in ((None, "ready", 1.0), (STORE, "down", 0.0), (None, "ready", 1.0)):
        engine.fault = fault
        status, body, _ = probe.ready()
        assert (status, body["status"]) == (200, state)
        labels = {"dependency": "object_store"}
        assert probe.registry.get_sample_value("stowgate_dependency_up", labels) == up


def test_a_replica_that_stops_is_not_ready(engine: Engine) -> None:
    probe = Probe(engine)
    assert probe.ready()[0] == 200
    probe.readiness.stop()
    status, body, _ = probe.ready()
    assert (status, body["status"]) == (503, "stopping")


def test_a_scrape_starts_a_check_and_does_not_wait_for_it(engine: Engine) -> None:
    engine.silent = True
    probe = Probe(engine)
    up = 'stowgate_dependency_up{dependency="object_store"} 1.0'

    for _ in range(3):
        assert up not in probe.metrics()
    wait_for(lambda: engine.asked == 1)
    engine.goes_on.set()

    wait_for(lambda: up in probe.metrics())
    assert engine.asked == 1
    probe.now += 6
    probe.metrics()
    wait_for(lambda: engine.asked == 2)
