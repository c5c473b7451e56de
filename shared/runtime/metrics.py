"""The Prometheus metrics, which `docs/metrics.md` lists.

Labels never hold identifiers of data or of persons, nor any other text from outside.
"""

import os
import time
from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from shared.ids import minted_at
from shared.settings.services import METRICS_FOLDER
from shared.time import Clock, utc_now

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a single call to the store up to an upload, or an outage, of a quarter of an hour.
_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0),
)


class Steps:
    """The steps of one POST or workflow request, each measured from the end of the one before."""

    def __init__(self, histogram: Histogram, began_at: float | None = None) -> None:
        """`began_at` is the beginning of the first step by the monotonic clock; default: now."""
        self.seconds: dict[str, float] = {}
        self._histogram = histogram
        self._last_at = time.monotonic() if began_at is None else began_at

    def done(self, step: str) -> None:
        """Observe the time since the end of the step before."""
        now = time.monotonic()
        seconds, self._last_at = now - self._last_at, now
        self.add(step, seconds)

    def add(self, step: str, seconds: float) -> None:
        """Observe a step that was measured otherwise; not below 0, where two clocks differ."""
        seconds = max(0.0, seconds)
        self.seconds[step] = round(seconds, 4)
        self._histogram.labels(step).observe(seconds)


class BackendMetrics:
    """The calls to the object store and to the broker, of both services."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.store_call_seconds = Histogram(
            "stowgate_store_call_seconds",
            "time of a call to the object store, with its retries",
            ["operation", "outcome"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.broker_call_seconds = Histogram(
            "stowgate_broker_call_seconds",
            "time of a call to the broker; of a publication, until its confirm",
            ["operation", "outcome"],
            buckets=_BUCKETS,
            registry=registry,
        )


class ApiMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.posts = Counter(
            "stowgate_posts", "STOW-RS requests by status code", ["status"], registry=registry
        )
        # From the start, so that the first error is an increase.
        for status in ("200", "202", "500", "503", "507"):
            self.posts.labels(status)
        self.instances = Counter(
            "stowgate_instances",
            "instances by outcome: stored, or a warning or failure reason of PS3.18",
            ["outcome"],
            registry=registry,
        )
        self.received_bytes = Counter(
            "stowgate_received_bytes", "bytes of instances stored", registry=registry
        )
        self.post_seconds = Histogram(
            "stowgate_post_seconds",
            "time from the request head to the answer",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.post_step_seconds = Histogram(
            "stowgate_post_step_seconds",
            "time of each step of a POST",
            ["step"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.posts_refused = Counter(
            "stowgate_posts_refused",
            "STOW-RS requests that were answered with an error, by reason",
            ["reason"],
            registry=registry,
        )
        self.uploads = Gauge(
            "stowgate_uploads_in_progress",
            "uploads in progress",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.uploads_waiting = Gauge(
            "stowgate_uploads_waiting",
            "uploads that wait for a free slot",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.unannounced = Counter(
            "stowgate_announcements_failed",
            "events that the broker did not accept; the relay sends them later",
            registry=registry,
        )


class WorkerMetrics:
    def __init__(self, registry: CollectorRegistry, clock: Clock = utc_now) -> None:
        self.opened = Counter(
            "stowgate_workflow_requests_opened",
            "opened workflow requests by the rule that chose the workflows",
            ["route"],
            registry=registry,
        )
        self.opened_seconds = Histogram(
            "stowgate_post_to_opened_seconds",
            "time from a POST to its opened workflow request, by the same rule",
            ["route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.refused_seconds = Histogram(
            "stowgate_post_to_refused_seconds",
            "time from a POST to the refusal of its workflow request, by the same rule",
            ["route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "stowgate_request_step_seconds",
            "time of each step of a workflow request",
            ["step"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.attempts_failed = Counter(
            "stowgate_attempts_failed",
            "failed attempts to open a workflow request: transient or permanent",
            ["kind"],
            registry=registry,
        )
        # From the start, so that the first failure is an increase.
        for kind in ("transient", "permanent"):
            self.attempts_failed.labels(kind)
        self.unroutable = Counter(
            "stowgate_unroutable",
            "returned workflow requests: the Workflow Manager's queue is missing",
            registry=registry,
        )
        self.lease_takeovers = Counter(
            "stowgate_lease_takeovers",
            "records taken over from a crashed worker that had written a lease; on the first "
            "delivery of an event it writes none",
            registry=registry,
        )
        self.announced_again = Counter(
            "stowgate_announced_again", "events sent by the relay", registry=registry
        )
        self.swept = Counter(
            "stowgate_swept_objects",
            "objects removed that belong to no record",
            registry=registry,
        )
        self.dead_letters = Counter(
            "stowgate_dead_letters",
            "dead letters of the Workflow Manager's queue by kind: `noted` is a refusal of a "
            "Stowgate request, counted once",
            ["kind"],
            registry=registry,
        )
        self.replayed = Counter(
            "stowgate_replays_published",
            "workflow requests published again after a refusal",
            registry=registry,
        )
        self.backlog = Backlog(registry, clock)


class HealthMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.dependency_up = Gauge(
            "stowgate_dependency_up",
            "1 if the dependency answered when /health/ready last looked, else 0",
            ["dependency"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )


_BACKLOG = {
    "pending": "pending payloads",
    "failed": "failed payloads: see `stowgate payloads list --state failed`",
    "refused": "payloads refused by the Workflow Manager: see "
    "`stowgate payloads list --state refused`",
}


class Backlog(Collector):
    """Gauges of pending, failed and refused payloads, which only the leader measures.

    The other workers do not export them: their zeros or old values would distort a sum or maximum.
    """

    def __init__(self, registry: CollectorRegistry, clock: Clock) -> None:
        self._clock = clock
        self._payloads: dict[str, tuple[int, str | None]] = {}
        self._queued_events: int | None = None
        registry.register(self)

    def measured(self, state: str, count: int, oldest: str | None) -> None:
        """`oldest` is the id of the oldest payload of that state, if there is one."""
        self._payloads[state] = count, oldest

    def measured_queue(self, events: int) -> None:
        self._queued_events = events

    def forget(self) -> None:
        self._payloads = {}
        self._queued_events = None

    def collect(self) -> Iterable[Metric]:
        for state, (count, oldest) in list(self._payloads.items()):
            yield GaugeMetricFamily(f"stowgate_{state}", _BACKLOG[state], count)
            # Computed for each scrape, so that the age also grows while the store is unavailable.
            age = self._clock() - minted_at(oldest) if oldest else None
            yield GaugeMetricFamily(
                f"stowgate_oldest_{state}_seconds",
                f"time since the POST of the oldest {state} payload; 0 if there is none",
                max(0.0, age.total_seconds()) if age else 0.0,
            )
        queued_events = self._queued_events
        if queued_events is not None:
            yield GaugeMetricFamily(
                "stowgate_queued_events",
                "events that wait in the broker's queue for a worker",
                queued_events,
            )


def exposition(registry: CollectorRegistry, facts: CollectorRegistry) -> bytes:
    """Return the metrics in the text format.

    Args:
        registry: Has what this process counts. With several API processes, the counts of all are
            merged.
        facts: Has what every process reads alike (`shared/runtime/facts.py`).
    """
    # The time of creation of each counter, which would double their number.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    if METRICS_FOLDER in os.environ:
        merged = CollectorRegistry()
        multiprocess.MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        registry = merged
    return generate_latest(registry) + generate_latest(facts)
