"""The use case of a dead letter of the Workflow Manager: record that it refused a request of ours.

Only the payload id decides what happens to a dead letter. A foreign dead letter, or one whose
refusal cannot be recorded, is acknowledged too: otherwise it would be redelivered forever.
"""

import re
from dataclasses import dataclass

import orjson
import structlog

from shared.ids import PayloadIds, is_guid
from shared.ports import DeadLetter
from shared.record_store import Records
from shared.records import RecordUnreadable
from shared.refusals import Refusal, RefusalReason, Refusals
from shared.runtime.metrics import WorkerMetrics
from shared.time import Clock, iso_utc, utc_now
from worker.routing import resolve
from worker.workflow_manager import number_of

_log = structlog.get_logger()
_audit_log = structlog.get_logger("audit")

# A reason from the broker that is safe to log.
_REASON = re.compile(r"[a-z_]{1,32}")


@dataclass(frozen=True)
class RefusalNotes:
    """Records each refusal beside the record of its payload. Safe between threads."""

    records: Records
    refusals: Refusals
    payload_ids: PayloadIds
    metrics: WorkerMetrics
    clock: Clock = utc_now

    def __call__(self, letter: DeadLetter) -> None:
        """Record a refusal. Raises what the object store raises; it can then be called again."""
        kind = self._note(letter)
        self.metrics.dead_letters.labels(kind).inc()

    def _note(self, letter: DeadLetter) -> str:
        payload_id = _payload_id(letter.body)
        if payload_id is None:
            _log.warning("dead letter skipped: its body is not a workflow request")
            return "unreadable"
        if not self.payload_ids.minted(payload_id):
            return "foreign"
        try:
            versioned = self.records.find(payload_id)
        except RecordUnreadable:
            record = None
        else:
            if versioned is None:
                _log.error(
                    "dead letter skipped: its payload has no ingest record", payload_id=payload_id
                )
                return "without-record"
            record = versioned.record
        reason = _reason(letter.reason)
        refusal = Refusal(
            payload_id=payload_id,
            number=number_of(letter.message_id, payload_id),
            reason=reason,
            refused_at=letter.at or self.clock(),
        )
        if not self.refusals.note(refusal):
            _log.info("refusal already recorded", payload_id=payload_id, replay=refusal.number)
            return "noted-before"
        # The time of a replay would be that of the operator too.
        if record is not None and refusal.number == 0:
            seconds = (refusal.refused_at - record.received_at).total_seconds()
            self.metrics.refused_seconds.labels(resolve(record).rule).observe(max(0.0, seconds))
        _audit_log.info(
            "workflow request refused",
            outcome="refused",
            payload_id=payload_id,
            replay=refusal.number,
            reason=reason.value,
            refused_at=iso_utc(refusal.refused_at),
        )
        if reason is RefusalReason.OTHER:
            word = letter.reason if _REASON.fullmatch(letter.reason) else "none"
            _log.warning("request removed from its queue", payload_id=payload_id, x_death=word)
        return "noted"


def _payload_id(body: bytes) -> str | None:
    try:
        request = orjson.loads(body)
        payload_id = request["payload_id"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return payload_id.lower() if isinstance(payload_id, str) and is_guid(payload_id) else None


def _reason(word: str) -> RefusalReason:
    if word in (RefusalReason.REJECTED, RefusalReason.DELIVERY_LIMIT):
        return RefusalReason(word)
    return RefusalReason.OTHER
