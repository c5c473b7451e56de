"""The use case of a POST: check, store, record.

The ingest record is written when the body has ended properly and every instance is stored: the
commit point. Until then nothing is acknowledged and nothing announced.
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
from shared.record_store import Records, UploadGivenUp
from shared.records import FirstAnswer, IngestRecord
from shared.runtime.metrics import ApiMetrics
from shared.time import Clock, utc_now

_log = structlog.get_logger()

# `destination` of a request that names no VAE.
DEFAULT_DESTINATION = "default"

# How long a new record is left to the event that announces it before the relay steps in.
ANNOUNCEMENT_GRACE = timedelta(seconds=5)

# How much must be left of the claim on an Idempotency-Key for the write that counts.
_BEFORE_COMMIT = 0.9


@dataclass(frozen=True)
class Target:
    """What the URL says: the study all instances should belong to, and where they are meant."""

    study_uid: str | None = None
    workflow: str | None = None
    vae: Vae | None = None


@dataclass(frozen=True)
class Receipt:
    """How many instances were stored and how many parts failed, and the answer that says so.

    `payload_id` is None where nothing was stored and no record written.
    """

    payload_id: str | None
    stored: int
    failed: int
    answer: Answer


Render = Callable[[Outcome, Callable[[], None]], Answer]
"""Renders the answer; the second argument is called now and then meanwhile."""


class Ingest:
    def __init__(
        self,
        *,
        uploads: Uploads,
        records: Records,
        recorded: Callable[[], None],
        metrics: ApiMetrics,
        mint: Callable[[datetime], str],
        clock: Clock = utc_now,
    ) -> None:
        """`recorded` is called behind each record, and must not wait."""
        self._uploads = uploads
        self._records = records
        self._recorded = recorded
        self._metrics = metrics
        self._mint = mint
        self._clock = clock

    def ingest(
        self,
        parts: Iterable[ReceivedPart],
        target: Target,
        source: str,
        correlation_id: str,
        render: Render,
        claimed: ClaimedKey | None = None,
    ) -> Receipt | None:
        """Take one request's parts; None where it had none.

        `source` is the sender's name or address for the Workflow Manager. The answer is rendered
        once, before the record is written, and kept with it where an Idempotency-Key is `claimed`.
        Raises a `Problem` for a request that is refused as a whole, `StoreFull` where nothing was
        stored for want of room, and what the object store raises when it cannot do its work. What
        was stored by then is removed again.
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
            for part in parts:
                upload.receive(part)
            upload.finish()
            if not upload.outcomes:
                return None
            answer = render(upload, keep_key)
            unanswered.callback(answer.body.close)
            receipt = Receipt(payload_id, upload.stored_count, upload.failed_count, answer)
            if not receipt.stored:
                unanswered.pop_all()
                self._count(upload)
                return replace(receipt, payload_id=None)
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
                due_at=self._clock() + ANNOUNCEMENT_GRACE,
                first_answer=_first_answer(answer, upload) if claimed else None,
            )
            if claimed:
                claimed.keep(at_least=_BEFORE_COMMIT)
            self._check_time(received_at)
            # A write that fails may have happened all the same, so from here on the objects stay;
            # without a record, the sweep by age removes them.
            undone = undo.pop_all()
            try:
                self._records.add(record)
            except UploadGivenUp as error:
                undone.close()
                raise SenderTooSlow(str(error)) from error
            unanswered.pop_all()
            self._recorded()
            self._count(upload)
            return receipt

    def _check_time(self, received_at: datetime) -> None:
        if self._clock() - received_at > self._uploads.limits.upload:
            limit_seconds = self._uploads.limits.upload.total_seconds()
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
    """Between two pieces of an upload without an Idempotency-Key."""


def _release(claimed: ClaimedKey) -> None:
    try:
        claimed.release()
    except (StowgateError, StillRunning) as error:
        _log.warning(
            "an Idempotency-Key is not released; its lease ends by itself", error=str(error)
        )
