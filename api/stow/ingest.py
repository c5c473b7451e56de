"""The use case of a POST: check, store, record.

The commit point is the ingest record, which is written when the body is complete and every instance
is stored. Nothing is acknowledged or announced before.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import structlog

from api.http.problems import SenderTooSlow
from api.stow.answer import Answer
from api.stow.idempotency import ClaimedKey, StillRunning
from api.stow.response import Outcome
from api.stow.upload import ReceivedPart, Upload, Uploads
from api.vae.registry import Vae
from shared.attachments import MAX_INLINE_BYTES, Attachment
from shared.errors import StowgateError
from shared.record_store import Records, UploadGivenUp, VersionedRecord
from shared.records import FIRST_DELIVERY, FirstAnswer, IngestRecord, Lease
from shared.runtime.metrics import ApiMetrics
from shared.runtime.tracing import NO_SPANS, Attribute, Tracer
from shared.time import Clock, utc_now

_log = structlog.get_logger()

# `destination` of a request without a VAE.
DEFAULT_DESTINATION = "default"

# Share of the claim on an Idempotency-Key that must be left when the record is written.
_BEFORE_COMMIT = 0.9


@dataclass(frozen=True)
class Target:
    """The parameters in the URL: the study of the instances, the workflow and the VAE."""

    study_uid: str | None = None
    workflow: str | None = None
    vae: Vae | None = None


@dataclass(frozen=True)
class Receipt:
    """The numbers of stored instances and failed parts, the answer, and the new record.

    `added` is None if nothing was stored.
    """

    stored: int
    failed: int
    answer: Answer
    stored_bytes: int
    added: VersionedRecord | None = None

    @property
    def payload_id(self) -> str | None:
        return self.added.record.payload_id if self.added else None


Render = Callable[[Outcome, Callable[[], None]], Answer]
"""Renders the answer; the second argument is a heartbeat, to be called from time to time."""


class Ingest:
    def __init__(
        self,
        *,
        uploads: Uploads,
        records: Records,
        recorded: Callable[[], None],
        metrics: ApiMetrics,
        mint: Callable[[datetime], str],
        first_lease: timedelta,
        clock: Clock = utc_now,
        tracer: Tracer = NO_SPANS,
    ) -> None:
        """`recorded` is called after each record, and must not wait. `first_lease` is the time that
        the worker has that receives the event of a new record first."""
        self._uploads = uploads
        self._records = records
        self._recorded = recorded
        self._metrics = metrics
        self._mint = mint
        self._first_lease = first_lease
        self._clock = clock
        self._tracer = tracer

    def ingest(
        self,
        parts: Iterable[ReceivedPart],
        target: Target,
        source: str,
        correlation_id: str,
        render: Render,
        claimed: ClaimedKey | None = None,
        done: Callable[[str], None] = lambda _: None,
        *,
        caller: str | None = None,
    ) -> Receipt | None:
        """Store the parts of a request, and write its record; return None if it has no parts.

        The answer is rendered once, before the record is written. With a `claimed` Idempotency-Key
        it is kept with the record. On an error the stored objects are removed.

        Args:
            source: The sender's name or address for the Workflow Manager.
            caller: The name of the authenticated sender.
            done: Called at the end of each step with its name: `receive` (with most of the storing,
                which runs beside it), `store`, `render` and `record`.

        Raises:
            Problem: The request is refused.
            StoreFull: Nothing was stored for lack of space.
            StowgateError: As the object store raises it.
        """
        received_at = self._clock()
        payload_id = claimed.payload_id if claimed else self._mint(received_at)
        keep_key = claimed.keep if claimed else _nothing
        upload = Upload(
            payload_id,
            self._uploads,
            self._records.attachments,
            vae=target.vae,
            study_uid=target.study_uid,
            heartbeat=keep_key,
        )
        with closing(upload), ExitStack() as unanswered, ExitStack() as undo:
            if claimed:
                undo.callback(_release, claimed)
            self._uploads.check_room()
            undo.callback(upload.discard)
            with self._tracer.span("receive instances"):
                for part in parts:
                    upload.receive(part)
            done("receive")
            with self._tracer.span("store instances", began_at=upload.first_put_at):
                upload.finish()
                self._tracer.note(
                    {
                        Attribute.INSTANCES_STORED: upload.stored_count,
                        Attribute.INSTANCES_FAILED: upload.failed_count,
                        Attribute.STORED_BYTES: upload.stored_bytes,
                    }
                )
            done("store")
            if not upload.outcomes:
                return None
            answer = render(upload, keep_key)
            unanswered.callback(answer.body.close)
            done("render")
            receipt = Receipt(upload.stored_count, upload.failed_count, answer, upload.stored_bytes)
            if not receipt.stored:
                unanswered.pop_all()
                self._count(upload)
                return receipt
            now = self._clock()
            record = IngestRecord(
                payload_id=payload_id,
                correlation_id=correlation_id,
                received_at=received_at,
                source=source,
                destination=target.vae.name if target.vae else DEFAULT_DESTINATION,
                workflow=target.workflow,
                vae_workflows=target.vae.workflows if target.vae else None,
                file_count=upload.stored_count,
                instances=upload.recorded_instances(),
                due_at=now,
                lease=Lease(FIRST_DELIVERY, now + self._first_lease),
                size_bytes=upload.stored_bytes,
                caller=caller,
                first_answer=_first_answer(answer, upload) if claimed else None,
                traceparent=self._tracer.current(),
            )
            if claimed:
                claimed.keep(at_least=_BEFORE_COMMIT)
            self._check_time(received_at)
            # A write that fails may still have happened, so from here on the objects stay. Without
            # a record the sweep removes them later.
            undone = undo.pop_all()
            try:
                with self._tracer.span("write record"):
                    added = self._records.add(record)
            except UploadGivenUp as error:
                undone.close()
                raise SenderTooSlow(str(error)) from error
            unanswered.pop_all()
            done("record")
            self._recorded()
            self._count(upload)
            return replace(receipt, added=added)

    def _check_time(self, received_at: datetime) -> None:
        limit_seconds = self._uploads.settings.max_upload_seconds
        if self._clock() - received_at > timedelta(seconds=limit_seconds):
            raise SenderTooSlow(
                f"the upload took longer than {limit_seconds:g} s; send it in several requests"
            )

    def _count(self, upload: Upload) -> None:
        self._metrics.received_bytes.inc(upload.stored_bytes)
        for outcome, count in upload.outcomes.items():
            self._metrics.instances.labels(outcome).inc(count)


def _first_answer(answer: Answer, upload: Upload) -> FirstAnswer:
    body: str | None = None
    if answer.body.size_bytes <= MAX_INLINE_BYTES:
        body = answer.body.open().read().decode()
    else:
        upload.attach(Attachment.ANSWER, answer.body)
    return FirstAnswer(str(upload.fingerprint), answer.status, answer.content_type, body)


def _nothing() -> None:
    """The heartbeat of an upload without an Idempotency-Key."""


def _release(claimed: ClaimedKey) -> None:
    try:
        claimed.release()
    except (StowgateError, StillRunning) as error:
        _log.warning(
            "could not release an Idempotency-Key; its lease will expire", error=str(error)
        )
