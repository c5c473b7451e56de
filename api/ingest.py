"""The use case of a POST: check, store, record.

The ingest record is written when the body has ended properly and every instance is stored: the
commit point. Until then nothing is acknowledged and nothing announced.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import structlog

from api.idempotency import ClaimedKey, StillRunning, fingerprint
from api.problems import SenderTooSlow
from api.store_response import Failed, Stored
from api.upload import ReceivedPart, Upload, Uploads
from shared.errors import StowgateError
from shared.metrics import ApiMetrics
from shared.records import FirstAnswer, IngestRecord, Records, UploadGivenUp
from shared.time import Clock, utc_now
from shared.vae import Vae

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
    """What became of the parts, in the order of the request. `payload_id` is None where nothing
    was stored and no record written."""

    payload_id: str | None
    stored: list[Stored]
    failed: list[Failed]


@dataclass(frozen=True)
class Keyed:
    """A POST with an Idempotency-Key: its claim on the key, and how its answer is rendered."""

    claimed: ClaimedKey
    answer: Callable[[Receipt, str], FirstAnswer]


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
        keyed: "Keyed | None" = None,
    ) -> Receipt | None:
        """Take one request's parts; None where it had none.

        `source` is the sender's name or address as the Workflow Manager takes it. Raises a
        `Problem` for a request that is refused as a whole, `StoreFull` where nothing was stored for
        want of room, and what the object store raises when it cannot do its work. What was stored
        by then is removed again.
        """
        received_at = self._clock()
        payload_id = keyed.claimed.payload_id if keyed else self._mint(received_at)
        with ExitStack() as undo:
            if keyed:
                undo.callback(_release, keyed.claimed)
            self._uploads.check_room()
            keep_key = keyed.claimed.keep if keyed else _nothing
            upload = Upload(payload_id, self._uploads, target.vae, keep_key)
            undo.callback(upload.discard)
            for part in parts:
                upload.receive(part)
            upload.finish()
            if not upload.arrivals:
                return None
            stored, failed = upload.outcome(target.study_uid)
            receipt = Receipt(payload_id, stored, failed)
            if not stored:
                self._count(receipt, 0)
                return replace(receipt, payload_id=None)
            record = IngestRecord(
                payload_id=payload_id,
                correlation_id=correlation_id,
                received_at=received_at,
                source=source,
                destination=target.vae.name if target.vae else DEFAULT_DESTINATION,
                workflow=target.workflow,
                vae_workflows=target.vae.workflows if target.vae else None,
                instances=upload.instances,
                due_at=self._clock() + ANNOUNCEMENT_GRACE,
                first_answer=keyed.answer(receipt, fingerprint(upload.digests)) if keyed else None,
            )
            if keyed:
                keyed.claimed.keep(at_least=_BEFORE_COMMIT)
            self._check_time(received_at)
            # A write that fails may have happened all the same, so from here on the objects stay;
            # without a record, the sweep by age removes them.
            undone = undo.pop_all()
        try:
            self._records.add(record)
        except UploadGivenUp as error:
            undone.close()
            raise SenderTooSlow(str(error)) from error
        self._recorded()
        self._count(receipt, sum(i.size_bytes for i in record.instances))
        return receipt

    def _check_time(self, received_at: datetime) -> None:
        if self._clock() - received_at > self._uploads.limits.upload:
            limit_seconds = self._uploads.limits.upload.total_seconds()
            raise SenderTooSlow(
                f"the upload took longer than {limit_seconds:g} s; send it in several requests"
            )

    def _count(self, receipt: Receipt, size_bytes: int) -> None:
        self._metrics.received_bytes.inc(size_bytes)
        for instance in receipt.stored:
            outcome = f"{instance.warning:04X}" if instance.warning else "stored"
            self._metrics.instances.labels(outcome).inc()
        for failure in receipt.failed:
            self._metrics.instances.labels(f"{failure.reason:04X}").inc()


def _nothing() -> None:
    """Between two pieces of an upload without an Idempotency-Key."""


def _release(claimed: ClaimedKey) -> None:
    try:
        claimed.release()
    except (StowgateError, StillRunning) as error:
        _log.warning(
            "an Idempotency-Key is not released; its lease ends by itself", error=str(error)
        )
