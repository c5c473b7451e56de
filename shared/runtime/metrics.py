"""The Prometheus metrics. Labels never hold identifiers of data or of persons."""

import os
from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from shared.settings.services import METRICS_FOLDER

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ApiMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.posts = Counter(
            "stowgate_posts", "STOW-RS requests by status code", ["status"], registry=registry
        )
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
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
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
    def __init__(self, registry: CollectorRegistry) -> None:
        self.opened = Counter(
            "stowgate_workflow_requests_opened",
            "opened workflow requests by the rule that chose the workflows",
            ["route"],
            registry=registry,
        )
        self.attempts_failed = Counter(
            "stowgate_attempts_failed",
            "failed attempts to open a workflow request: transient or permanent",
            ["kind"],
            registry=registry,
        )
        self.unroutable = Counter(
            "stowgate_unroutable",
            "returned workflow requests: the Workflow Manager's queue is missing",
            registry=registry,
        )
        self.lease_takeovers = Counter(
            "stowgate_lease_takeovers",
            "records taken over from a crashed worker",
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
        self.backlog = Backlog(registry)


class HealthMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.dependency_up = Gauge(
            "stowgate_dependency_up",
            "1 if the dependency answered when /health/ready last looked, else 0",
            ["dependency"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )


class Backlog(Collector):
    """Gauges of pending, failed and refused payloads, which only the leader measures.

    The other workers do not export them: their zeros or old values would distort a sum or maximum.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauges: tuple[Metric, ...] = ()
        self._refused: tuple[Metric, ...] = ()
        registry.register(self)

    def measured(self, *, pending: int, oldest_pending_seconds: float, failed: int) -> None:
        self._gauges = (
            GaugeMetricFamily("stowgate_pending", "pending payloads", pending),
            GaugeMetricFamily(
                "stowgate_oldest_pending_seconds",
                "age of the oldest pending payload; 0 if there is none",
                oldest_pending_seconds,
            ),
            GaugeMetricFamily(
                "stowgate_failed",
                "failed payloads: see `stowgate payloads list --state failed`",
                failed,
            ),
        )

    def measured_refused(self, count: int) -> None:
        self._refused = (
            GaugeMetricFamily(
                "stowgate_refused",
                "payloads refused by the Workflow Manager: see "
                "`stowgate payloads list --state refused`",
                count,
            ),
        )

    def forget(self) -> None:
        self._gauges = ()
        self._refused = ()

    def collect(self) -> Iterable[Metric]:
        return self._gauges + self._refused


def exposition(registry: CollectorRegistry) -> bytes:
    """Return the metrics in the text format, merged over all API processes."""
    if METRICS_FOLDER in os.environ:
        merged = CollectorRegistry()
        multiprocess.MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        registry = merged
    return generate_latest(registry)
