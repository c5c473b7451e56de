"""What Stowgate counts, for Prometheus. No label ever holds an identifier of data or a person."""

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
            "stowgate_posts", "STOW-RS requests by answer", ["status"], registry=registry
        )
        self.instances = Counter(
            "stowgate_instances",
            "instances by what became of them; a reason is one of PS3.18's",
            ["outcome"],
            registry=registry,
        )
        self.received_bytes = Counter(
            "stowgate_received_bytes", "bytes of instances stored", registry=registry
        )
        self.post_seconds = Histogram(
            "stowgate_post_seconds",
            "from a request's head to its answer",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=registry,
        )
        self.uploads = Gauge(
            "stowgate_uploads_in_progress",
            "uploads being received now",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.uploads_waiting = Gauge(
            "stowgate_uploads_waiting",
            "uploads that wait for their turn",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.unannounced = Counter(
            "stowgate_announcements_failed",
            "events the broker did not take; the relay sends them later",
            registry=registry,
        )


class WorkerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.opened = Counter(
            "stowgate_workflow_requests_opened",
            "workflow requests by the rule that chose the workflows",
            ["route"],
            registry=registry,
        )
        self.attempts_failed = Counter(
            "stowgate_attempts_failed",
            "attempts to open a request, by whether another follows",
            ["kind"],
            registry=registry,
        )
        self.unroutable = Counter(
            "stowgate_unroutable",
            "workflow requests that came back: the Workflow Manager has no queue",
            registry=registry,
        )
        self.lease_takeovers = Counter(
            "stowgate_lease_takeovers",
            "records taken from a worker that did not finish",
            registry=registry,
        )
        self.announced_again = Counter(
            "stowgate_announced_again", "events the relay sent", registry=registry
        )
        self.swept = Counter(
            "stowgate_swept_objects",
            "objects removed that no record claims",
            registry=registry,
        )
        self.dead_letters = Counter(
            "stowgate_dead_letters",
            "dead letters of the Workflow Manager's queue, by what they were: `noted` is a refusal "
            "of a request of Stowgate's, counted once",
            ["kind"],
            registry=registry,
        )
        self.replayed = Counter(
            "stowgate_replays_published",
            "workflow requests that were published again after a refusal",
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
    """What waits and what failed, of all workers together, as the one that leads measures it.

    The others show none of these gauges: a value of theirs would be a zero or an old one, which
    maximum and sum over all would mistake for what is there.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauges: tuple[Metric, ...] = ()
        self._refused: tuple[Metric, ...] = ()
        registry.register(self)

    def measured(self, *, pending: int, oldest_pending_seconds: float, failed: int) -> None:
        self._gauges = (
            GaugeMetricFamily("stowgate_pending", "records not opened yet", pending),
            GaugeMetricFamily(
                "stowgate_oldest_pending_seconds",
                "age of the record that waits longest, 0 when none does",
                oldest_pending_seconds,
            ),
            GaugeMetricFamily(
                "stowgate_failed",
                "payloads that failed: see `stowgate payloads list --state failed`",
                failed,
            ),
        )

    def measured_refused(self, count: int) -> None:
        self._refused = (
            GaugeMetricFamily(
                "stowgate_refused",
                "payloads that the Workflow Manager refused: see "
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
    """The text format, over all processes where several serve as one."""
    if METRICS_FOLDER in os.environ:
        merged = CollectorRegistry()
        multiprocess.MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        registry = merged
    return generate_latest(registry)
