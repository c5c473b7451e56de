"""Health and metrics over HTTP, the same for the API and the worker."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import structlog
from flask import Response
from flask.typing import ResponseReturnValue
from prometheus_client import CollectorRegistry

from shared.errors import StowgateError
from shared.runtime.backends import Dependency
from shared.runtime.metrics import CONTENT_TYPE, HealthMetrics, exposition

_log = structlog.get_logger()

# Maximum age of a report that is reused, and how long a caller waits for a newer one.
_RECENT_SECONDS = 30.0
_WAIT_SECONDS = 0.5

# Maximum age of a report for which no scrape starts another check.
_FRESH_SECONDS = 5.0


@dataclass(frozen=True)
class Report:
    """For each dependency None, or its fault; `checked_at` is by the monotonic clock."""

    checked_at: float
    faults: Mapping[str, str | None]


class Readiness:
    """Checks the dependencies, for one caller at a time.

    A silent dependency delays that caller for seconds. All other callers get the last report, so
    that each does not block a thread. Every change is logged, with its reason.
    """

    def __init__(
        self,
        dependencies: Mapping[str, Dependency],
        metrics: HealthMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dependencies = dependencies
        self._metrics = metrics
        self._clock = clock
        self._is_stopping = False
        self._checking = threading.Lock()
        self._last: Report | None = None

    def check(self) -> Report | None:
        """Return a report, or None if there is no recent one and a check is in progress."""
        last = self._last
        is_recent = last is not None and self._clock() - last.checked_at < _RECENT_SECONDS
        if not self._checking.acquire(timeout=0 if is_recent else _WAIT_SECONDS):
            return last if is_recent else None
        try:
            # Another caller may have checked while this one waited.
            if self._last is last:
                self._last = self._check_all()
            return self._last
        finally:
            self._checking.release()

    def check_in_background(self) -> None:
        """Check for the next scrape, if the last check is some seconds ago.

        No scrape waits for a silent dependency, and no metric waits for a health probe.
        """
        last = self._last
        is_fresh = last is not None and self._clock() - last.checked_at < _FRESH_SECONDS
        if not is_fresh and not self._checking.locked():
            threading.Thread(target=self.check, name="health check", daemon=True).start()

    def stop(self) -> None:
        """From now on, send this replica nothing new."""
        self._is_stopping = True

    def status(self, report: Report | None) -> str:
        """`ready`, or what the faults mean for uploads: `degraded` if they still succeed,
        `down` where they are refused for now, `unknown` while the first check is under way; and
        `stopping`."""
        if self._is_stopping:
            return "stopping"
        if report is None:
            return "unknown"
        down = [name for name, fault in report.faults.items() if fault is not None]
        if any(self._dependencies[name].essential for name in down):
            return "down"
        return "degraded" if down else "ready"

    def age_seconds(self, report: Report | None) -> int:
        return int(self._clock() - report.checked_at) if report else 0

    def _check_all(self) -> Report:
        faults = {name: _fault(dependency) for name, dependency in self._dependencies.items()}
        before = self._last.faults if self._last else {}
        for name, fault in faults.items():
            self._metrics.dependency_up.labels(name).set(fault is None)
            was_down = before.get(name) is not None
            if fault is not None and not was_down:
                _log.warning("dependency down", dependency=name, error=fault)
            elif fault is None and was_down:
                _log.info("dependency ready again", dependency=name)
        return Report(self._clock(), faults)


def health_views(
    readiness: Readiness,
    registry: CollectorRegistry,
    facts: CollectorRegistry,
    may_read: Callable[[], bool],
) -> dict[str, Callable[[], ResponseReturnValue]]:
    """Return the views by endpoint. `registry` and `facts` are those of `exposition`.

    Only a caller that `may_read` is told why a dependency is down, as the reasons name addresses,
    buckets and folders.

    `ready` says whether this replica can answer, not whether uploads succeed: all replicas share
    store and broker, and a load balancer without any replica would tell senders less than one does.
    """

    def live() -> ResponseReturnValue:
        return {"status": "live"}

    def startup() -> ResponseReturnValue:
        return {"status": "started"}

    def ready() -> ResponseReturnValue:
        report = readiness.check()
        faults = report.faults if report else {}
        shows_faults = any(faults.values()) and may_read()
        status = readiness.status(report)
        return (
            {
                "status": status,
                "dependencies": {
                    name: _state(fault, shows_faults) for name, fault in faults.items()
                },
            },
            HTTPStatus.SERVICE_UNAVAILABLE if status == "stopping" else HTTPStatus.OK,
            # RFC 9111 5.1
            {"Age": str(readiness.age_seconds(report))},
        )

    def metrics() -> Response:
        readiness.check_in_background()
        return Response(exposition(registry, facts), content_type=CONTENT_TYPE)

    return {
        "health.live": live,
        "health.startup": startup,
        "health.ready": ready,
        "health.metrics": metrics,
    }


def _fault(dependency: Dependency) -> str | None:
    try:
        dependency.ping()
    except StowgateError as error:
        return str(error)
    return None


def _state(fault: str | None, shows_fault: bool) -> dict[str, str]:
    if fault is None:
        return {"status": "ready"}
    return {"status": "down", "detail": fault} if shows_fault else {"status": "down"}
