"""Publishes the workflow request of a refused payload again: the same body, with the next number.

A replay is an object in the state bucket until its request is published. A worker leases it, as it
leases a record, so that two workers never publish it at the same time. The API announces a replay
to a worker; if that event is lost, `publish_due` finds the replay.
"""

import threading
from datetime import timedelta
from functools import partial
from typing import Any

import structlog

from shared.errors import Permanent, Transient, VersionConflict
from shared.ports import EventPublisher, Message, ObjectStore, Publication
from shared.record_store import Records
from shared.records import IngestRecord, Lease, State
from shared.refusals import (
    OBJECTS_GONE,
    ObjectsGone,
    PayloadState,
    Refusal,
    RefusalReason,
    Refusals,
    Replay,
    VersionedReplay,
    has_objects,
)
from shared.runtime.metrics import WorkerMetrics
from shared.runtime.tracing import NO_SPANS, Tracer
from shared.time import Clock, has_ended, utc_now
from worker.confirm import await_confirm
from worker.handler import retry_seconds
from worker.routing import resolve
from worker.workflow_manager import WorkflowManager

_log = structlog.get_logger()


class Replays:
    def __init__(
        self,
        *,
        records: Records,
        refusals: Refusals,
        instances: ObjectStore,
        publisher: EventPublisher,
        workflow_manager: WorkflowManager,
        owner: str,
        lease: timedelta,
        metrics: WorkerMetrics,
        clock: Clock = utc_now,
        tracer: Tracer = NO_SPANS,
    ) -> None:
        """`owner` and `lease` are those of the handler."""
        self._records = records
        self._refusals = refusals
        self._instances = instances
        self._publisher = publisher
        self._workflow_manager = workflow_manager
        self._owner = owner
        self._lease = lease
        self._metrics = metrics
        self._clock = clock
        self._tracer = tracer
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    def publish(self, payload_id: str) -> None:
        """Publish the payload's replay, if one is due and no other worker has it.

        A failure is written to the replay, which is then tried again. Raises the errors of the
        object store if that fails, and `VersionConflict` if another worker changed the replay.
        """
        number = self._refusals.last_replay(payload_id)
        if number is not None:
            self._publish(payload_id, number)

    def publish_due(self) -> None:
        """Publish every due replay, and measure the refused payloads.

        Raises what the object store raises.
        """
        count, oldest, replays = 0, None, []
        for payload_id, outcome in self._refusals.outcomes():
            if outcome.state_when_opened is PayloadState.REFUSED:
                count, oldest = count + 1, payload_id
            if outcome.replay is not None:
                replays.append((payload_id, outcome.replay))
        self._metrics.backlog.measured("refused", count, oldest)
        for payload_id, number in replays:
            if self._stopping.is_set():
                return
            try:
                self._publish(payload_id, number)
            except VersionConflict:
                _log.info("another worker has the replay", payload_id=payload_id)
            except Permanent as error:
                _log.error("replay skipped", payload_id=payload_id, error=str(error))

    def _publish(self, payload_id: str, number: int) -> None:
        versioned = self._refusals.replay(payload_id, number)
        if versioned is None:
            return
        outcome = self._refusals.outcome(payload_id)
        if outcome.replayed >= number or (outcome.refused or 0) >= number:
            # Its worker crashed or paused before it recorded the publication.
            self._refusals.note_replayed(payload_id, number, self._clock())
            return
        if not self._is_due(versioned.replay):
            return
        found = self._records.find(payload_id)
        if found is None or found.record.state is not State.OPENED:
            return
        leased = LeasedReplay(self._refusals, versioned)
        leased.change(lease=self._new_lease(), attempts=versioned.replay.attempts + 1)
        self._publish_leased(found.record, leased)

    def _is_due(self, replay: Replay) -> bool:
        now = self._clock()
        if replay.lease is not None and not has_ended(replay.lease.until, now):
            return False
        return replay.attempts == 0 or has_ended(replay.due_at, now)

    def _publish_leased(self, record: IngestRecord, leased: "LeasedReplay") -> None:
        payload_id, number = record.payload_id, leased.replay.number
        try:
            if not has_objects(self._instances, payload_id):
                raise ObjectsGone(OBJECTS_GONE)
            with self._tracer.publishing(
                self._message(record, number), record.traceparent
            ) as message:
                await_confirm(
                    self._publisher.begin(message),
                    self._stopping,
                    partial(self._keep_lease, leased),
                )
        except VersionConflict:
            raise
        except Transient as error:
            self._try_later(leased, error)
        except Permanent as error:
            self._refusals.note(
                Refusal(payload_id, number, RefusalReason.NOT_SENT, self._clock(), str(error))
            )
            self._refusals.forget_replay(payload_id, number)
            _log.error("replay failed", payload_id=payload_id, replay=number, error=str(error))
        else:
            self._refusals.note_replayed(payload_id, number, self._clock())
            self._metrics.replayed.inc()
            _log.info("workflow request published again", payload_id=payload_id, replay=number)

    def _message(self, record: IngestRecord, number: int) -> Message:
        request = record.workflow_request or self._workflow_manager.request(record, resolve(record))
        instances = self._records.instances(record)
        return self._workflow_manager.message(record, request, instances, number)

    def _keep_lease(self, leased: "LeasedReplay", publication: Publication) -> None:
        lease = leased.replay.lease
        if lease is None or not lease.has_left(0.5, self._lease, self._clock()):
            last_error = publication.overdue or leased.replay.last_error
            leased.change(lease=self._new_lease(), last_error=last_error)

    def _try_later(self, leased: "LeasedReplay", error: Transient) -> None:
        wait_seconds = retry_seconds(leased.replay.attempts)
        leased.change(
            lease=None,
            last_error=str(error),
            due_at=self._clock() + timedelta(seconds=wait_seconds),
        )
        _log.warning(
            "replay not published; trying again",
            payload_id=leased.replay.payload_id,
            error=str(error),
            wait_seconds=round(wait_seconds, 1),
        )

    def _new_lease(self) -> Lease:
        return Lease(self._owner, self._clock() + self._lease)


class LeasedReplay:
    """A replay under this worker's lease, in its latest version."""

    def __init__(self, refusals: Refusals, versioned: VersionedReplay) -> None:
        self._refusals = refusals
        self._versioned = versioned

    @property
    def replay(self) -> Replay:
        return self._versioned.replay

    def change(self, **changes: Any) -> None:
        self._versioned = self._refusals.change(self._versioned, **changes)
