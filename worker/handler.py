"""The use case of an event: route, write the sidecars, open the workflow request.

Every result is written to the record, and the relay announces the record again when it is due. An
event is therefore done once it has been handled, and the broker never needs to redeliver it.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import structlog

from shared import events
from shared.errors import (
    Permanent,
    StowgateError,
    Transient,
    Unroutable,
    VersionConflict,
)
from shared.ports import EventPublisher, ObjectStore, Publication, ReceivedMessage
from shared.record_store import Records, VersionedRecord
from shared.records import FIRST_DELIVERY, IngestRecord, Lease, State, first_lease
from shared.runtime.logs import where
from shared.runtime.metrics import Steps, WorkerMetrics
from shared.runtime.tracing import NO_SPANS, Attribute, Tracer
from shared.time import Clock, has_ended, utc_now
from worker.confirm import await_confirm
from worker.routing import resolve
from worker.sidecars import Sidecars, Stopping
from worker.workflow_manager import WorkflowManager

_log = structlog.get_logger()

# A payload fails when more workers than this have crashed on it, one after the other.
MAX_TAKEOVERS = 5

_FIRST_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 120.0

# Share of the lease that must be left when the request is published.
_BEFORE_PUBLISHING = 0.9

# The same for the first lease. An event that waits in the queue for longer costs a write.
_BEFORE_PUBLISHING_FIRST = 0.75

# Pause between two attempts to record that a request was published.
_NOTE_AGAIN_SECONDS = 1.0


class _NotNoted(Transient):
    """The request was published, but the store could not record that."""


class Handler:
    def __init__(
        self,
        *,
        records: Records,
        record_missing: Callable[[str, str], None],
        instances: ObjectStore,
        publisher: EventPublisher,
        workflow_manager: WorkflowManager,
        sidecar_writers: ThreadPoolExecutor,
        owner: str,
        lease: timedelta,
        metrics: WorkerMetrics,
        clock: Clock = utc_now,
        publish_replay: Callable[[str], None] = lambda _: None,
        tracer: Tracer = NO_SPANS,
    ) -> None:
        """`owner` identifies this worker in its leases and is unique. `lease` is their duration: a
        running worker renews its lease, and other workers take over from a crashed one when it
        expires. `record_missing` receives the id of a payload whose record is lost, and the
        evidence. `publish_replay` receives the id of each opened payload that an event names."""
        self._records = records
        self._record_missing = record_missing
        self._publisher = publisher
        self._workflow_manager = workflow_manager
        self._owner = owner
        self._lease = lease
        self._metrics = metrics
        self._clock = clock
        self._publish_replay = publish_replay
        self._tracer = tracer
        self._stopping = threading.Event()
        self._sidecars = Sidecars(instances, sidecar_writers, self._stopping)

    def stop(self) -> None:
        """Return the payloads in progress to the queue, within a second or two."""
        self._stopping.set()

    def __call__(self, message: ReceivedMessage) -> None:
        """Handle an event. Raises `MalformedEvent`."""
        try:
            event = events.decode(message.body)
        except events.NewerEvent as error:
            _log.warning("event skipped; a relay will announce the record again", error=str(error))
            return
        with structlog.contextvars.bound_contextvars(
            payload_id=event.payload_id, correlation_id=event.correlation_id
        ):
            try:
                if message.redelivered:
                    self.open_workflow_request(event.payload_id)
                else:
                    self.open_workflow_request(
                        event.payload_id, event.new_record, event.new_version
                    )
            except VersionConflict:
                _log.info("another worker has the record")
            except StowgateError as error:
                _log.warning(
                    "could not read the ingest record; the relay will try again", error=str(error)
                )

    def open_workflow_request(
        self,
        payload_id: str,
        new_record: VersionedRecord | None = None,
        new_version: str | None = None,
    ) -> None:
        """Open the payload's workflow request, if its record is pending and not leased.

        `new_version` is the version of the record that the first delivery of its event names. While
        the record has that version, its first lease is this worker's. `new_record` is the record,
        if it came with the event; it is not read again.

        Raises `VersionConflict` if another worker changed the record, and the errors of the object
        store if the record could not be read or written.
        """
        if new_record is not None and self._has_first_lease(new_record.record):
            self._open_first(new_record)
            return
        versioned = self._records.find(payload_id)
        if versioned is None:
            # An event is published after its record only, and records are never removed.
            _log.error("the payload of the event has no ingest record; its objects are kept")
            self._record_missing(payload_id, "an event announced it")
            return
        if versioned.record.state is State.OPENED:
            self._records.remove_leftover(versioned, self._clock())
            self._publish_replay(payload_id)
        if versioned.record.state is not State.PENDING:
            return
        if versioned.version == new_version and self._has_first_lease(versioned.record):
            self._open_first(versioned)
            return
        lease = versioned.record.lease
        if lease is not None and not has_ended(lease.until, self._clock()):
            return
        self._open_leased(self._acquire(versioned))

    def _open_first(self, versioned: VersionedRecord) -> None:
        """Open the request under the record's first lease, which is not written again."""
        first_attempt = replace(versioned.record, attempts=1)
        self._open_leased(LeasedRecord(self._records, replace(versioned, record=first_attempt)))

    def _has_first_lease(self, record: IngestRecord) -> bool:
        lease = record.lease
        return (
            record.state is State.PENDING
            and lease is not None
            and lease.owner == FIRST_DELIVERY
            and not has_ended(lease.until, self._clock())
        )

    def _acquire(self, versioned: VersionedRecord) -> "LeasedRecord":
        record = versioned.record
        # A lease of its own remains when the store failed while this worker wrote the result.
        crashed = record.lease.owner if record.lease else None
        taken_over = crashed not in (None, self._owner, FIRST_DELIVERY)
        if taken_over:
            self._metrics.lease_takeovers.inc()
        leased = LeasedRecord(self._records, versioned)
        leased.change(
            lease=self._new_lease(),
            attempts=record.attempts + 1,
            takeovers=record.takeovers + taken_over,
        )
        return leased

    def _new_lease(self) -> Lease:
        return Lease(self._owner, self._clock() + self._lease)

    def _open_leased(self, leased: "LeasedRecord") -> None:
        self._tracer.note(
            {
                Attribute.PAYLOAD_ID: leased.record.payload_id,
                Attribute.ATTEMPTS: leased.record.attempts,
                Attribute.TAKEOVERS: leased.record.takeovers,
            }
        )
        if leased.record.takeovers > MAX_TAKEOVERS and leased.record.opened_at is None:
            self._fail(
                leased,
                f"{leased.record.takeovers} workers crashed while they processed this payload; "
                "find the cause in their logs, fix it, and replay the payload",
            )
            return
        try:
            self._open(leased)
        except VersionConflict:
            raise
        except Stopping:
            self._release(leased)
        except Transient as error:
            self._try_later(leased, error)
        except Permanent as error:
            self._fail(leased, str(error))
        except MemoryError:
            self._try_later(leased, Transient("the worker ran out of memory; give it more"))
        except Exception as error:  # noqa: BLE001
            if self._stopping.is_set():
                # While the interpreter shuts down, calls fail for reasons unrelated to the payload.
                self._release(leased)
                return
            # A bug that one payload triggers must not stop the others. The error's text may contain
            # a value of the dataset, so only its type and place are reported.
            self._fail(
                leased,
                f"internal server error ({type(error).__name__} at {where(error)}); fix it, then "
                "replay the payload",
            )

    def _release(self, leased: "LeasedRecord") -> None:
        leased.change(lease=None, attempts=leased.record.attempts - 1, due_at=self._clock())
        _log.info("returned to the queue (shutting down)")

    def _open(self, leased: "LeasedRecord") -> None:
        record = leased.record
        steps = Steps(self._metrics.step_seconds)
        if record.attempts == 1:
            steps.add("wait", (self._clock() - record.received_at).total_seconds())
        route = resolve(record)
        request = self._workflow_manager.request(record, route)
        if record.opened_at is None:
            if record.attempts > 1:
                # While the broker is still away, writing the sidecars again would be wasted.
                self._publisher.ping()
            keep_lease = partial(self._keep_lease, leased)
            again = record.attempts > 1
            with self._tracer.span("write sidecars"):
                self._sidecars.write(
                    record.payload_id,
                    self._records.instances(record),
                    record.file_count,
                    keep_lease,
                    again=again,
                )
            steps.done("sidecars")
            instances = self._records.instances(record)
            message = self._workflow_manager.message(record, request, instances)
            keep_lease(at_least=_BEFORE_PUBLISHING)
            with self._tracer.publishing(message) as sent:
                await_confirm(
                    self._publisher.begin(sent),
                    self._stopping,
                    partial(self._keep_lease_while_waiting, leased),
                )
            steps.done("publish")
        with self._tracer.span("write opened record"):
            self._note_opened(
                leased,
                route=route.rule,
                workflows=route.workflows,
                opened_at=record.opened_at or self._clock(),
                last_error=None,
                workflow_request=request,
            )
        steps.done("note")
        seconds = max(0.0, (self._clock() - record.received_at).total_seconds())
        self._metrics.opened.labels(route.rule).inc()
        self._metrics.opened_seconds.labels(route.rule).observe(seconds)
        _log.info(
            "workflow request opened",
            route=route.rule,
            workflows=route.workflows,
            file_count=record.file_count,
            attempts=record.attempts,
            seconds=round(seconds, 4),
            step_seconds=steps.seconds,
        )

    def _keep_lease_while_waiting(self, leased: "LeasedRecord", publication: Publication) -> None:
        if self._holds(leased, at_least=0.5):
            return
        overdue = publication.overdue
        if overdue is not None:
            _log.warning("workflow request not confirmed; still waiting", reason=overdue)
        leased.change(lease=self._new_lease(), last_error=overdue or leased.record.last_error)

    def _note_opened(self, leased: "LeasedRecord", **changes: Any) -> None:
        """Settle the record of a published request; until that is done it may be published again.

        Raises `_NotNoted` if the store fails until the lease is about to expire.
        """
        while True:
            try:
                return leased.settle(State.OPENED, **changes)
            except VersionConflict:
                versioned = self._records.find(leased.record.payload_id)
                if versioned is None or versioned.record.state is not State.OPENED:
                    raise
                # An earlier try succeeded and its answer was lost, or another worker took over.
                return self._records.move(versioned)
            except StowgateError as error:
                if not self._holds(leased, at_least=0.25):
                    raise _NotNoted(f"the request was published, but {error}") from error
                time.sleep(_NOTE_AGAIN_SECONDS)

    def _keep_lease(self, leased: "LeasedRecord", at_least: float = 0.5) -> None:
        """Renew the lease if less than the share `at_least` is left. Raises `Stopping`."""
        if self._stopping.is_set():
            raise Stopping("the worker is shutting down")
        if not self._holds(leased, at_least):
            leased.change(lease=self._new_lease())

    def _holds(self, leased: "LeasedRecord", at_least: float) -> bool:
        """Whether the share `at_least` of the lease is left; of a first lease at most 3/4."""
        lease, duration = leased.record.lease, self._lease
        if lease is None:
            return False
        if lease.owner == FIRST_DELIVERY:
            duration, at_least = first_lease(self._lease), min(at_least, _BEFORE_PUBLISHING_FIRST)
        return lease.has_left(at_least, duration, self._clock())

    def _try_later(self, leased: "LeasedRecord", error: Transient) -> None:
        self._metrics.attempts_failed.labels("transient").inc()
        self._tracer.fail(type(error).__name__)
        if isinstance(error, Unroutable):
            self._metrics.unroutable.inc()
        attempts = leased.record.attempts
        wait_seconds = retry_seconds(attempts)
        leased.change(
            lease=None,
            takeovers=0,
            last_error=str(error),
            due_at=self._clock() + timedelta(seconds=wait_seconds),
            # From then on only the record is written, and the request is not published again.
            opened_at=self._clock() if isinstance(error, _NotNoted) else leased.record.opened_at,
        )
        _log.warning(
            "workflow request not opened; trying again",
            error=str(error),
            attempts=attempts,
            wait_seconds=round(wait_seconds, 1),
        )

    def _fail(self, leased: "LeasedRecord", reason: str) -> None:
        self._metrics.attempts_failed.labels("permanent").inc()
        self._tracer.fail("failed permanently")
        leased.settle(State.FAILED, last_error=reason)
        _log.error("workflow request failed permanently", error=reason)


class LeasedRecord:
    """A record under this worker's lease, in its latest version."""

    def __init__(self, records: Records, versioned: VersionedRecord) -> None:
        self._records = records
        self._versioned = versioned

    @property
    def record(self) -> IngestRecord:
        return self._versioned.record

    def change(self, **changes: Any) -> None:
        self._versioned = self._records.change(self._versioned, **changes)

    def settle(self, state: State, **changes: Any) -> None:
        self._versioned = self._records.settle(self._versioned, state, **changes)


def retry_seconds(attempts: int) -> float:
    """Return the wait before the next attempt: it doubles each time, with jitter that spreads out
    payloads that failed together."""
    maximum = min(_MAX_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2.0 ** min(attempts - 1, 16))
    return maximum * random.uniform(0.75, 1.0)  # noqa: S311
