"""Removes what is left of uploads without a record, and Idempotency-Keys past their time.

Before an upload's objects go it is given up, so that no record can come to refer to them. Those of
other producers in the same bucket are never touched: a payload id tells whether it was minted here.
Nor are those of a payload that had a record once: see `shared/sweep_cursor.py`.
"""

from contextlib import suppress
from datetime import timedelta

import structlog

from shared.errors import ObjectMissing, StowgateError, VersionConflict
from shared.ids import PayloadIds, minted_before
from shared.metrics import WorkerMetrics
from shared.ports import ListedObject, ObjectStore
from shared.records import FENCES_KEPT, KEYS_KEPT, KEYS_PREFIX, Records, payload_id_of
from shared.sweep_cursor import SweepCursor
from shared.time import MAX_AHEAD, Clock, utc_now

_log = structlog.get_logger()

_JSON = "application/json"

_SIDECAR = ".dcm.json"


class Sweeper:
    def __init__(
        self,
        *,
        instances: ObjectStore,
        state: ObjectStore,
        records: Records,
        cursor: SweepCursor,
        payload_ids: PayloadIds,
        grace: timedelta,
        metrics: WorkerMetrics,
        clock: Clock = utc_now,
    ) -> None:
        """`grace` is longer than any upload can take that is still acknowledged."""
        self._instances = instances
        self._state = state
        self._records = records
        self._cursor = cursor
        self._payload_ids = payload_ids
        self._grace = grace
        self._metrics = metrics
        self._clock = clock

    def sweep(self) -> None:
        """One pass. Errors of the object store and of what it holds end it and are logged; the next
        one goes on."""
        try:
            self._sweep_fences()
            self._sweep_keys()
            self._sweep_payloads()
        except StowgateError as error:
            _log.warning("sweep could not finish", error=str(error))

    def _sweep_payloads(self) -> None:
        until = minted_before(self._clock() - self._grace)
        for payload_id in self._instances.folders(self._cursor.read().after):
            if payload_id > until:
                break
            is_abandoned = self._payload_ids.minted(payload_id) and self._give_up(payload_id)
            if is_abandoned and not self._remove(payload_id):
                return
        self._cursor.move(until)

    def _give_up(self, payload_id: str) -> bool:
        try:
            return self._records.give_up(payload_id)
        except StowgateError as error:
            # Whatever keeps its record from us, it may be data that somebody wants back.
            self._records.ping()
            _log.error("payload passed over by the sweep", error=str(error))
            return False

    def _remove(self, payload_id: str) -> bool:
        """Remove the objects of an upload that was given up; False where it may have had a record.

        A worker writes sidecars only for a payload with a record. Whether records were lost is
        asked last, so that no restore can come between the look for this one and the answer.
        """
        keys = [found.key for found in self._instances.list(f"{payload_id}/")]
        if any(key.endswith(_SIDECAR) for key in keys):
            self._cursor.record_missing(payload_id, "a worker has written its metadata")
        if payload_id <= self._cursor.read().since:
            return False
        if keys:
            self._instances.delete(keys)
            self._metrics.swept.inc(len(keys))
            _log.info("swept", payload_id=payload_id, objects=len(keys))
        return True

    def _sweep_fences(self) -> None:
        # An upload of which a key was taken may go on for as long as any other.
        kept = FENCES_KEPT + self._grace
        for fence in [found for found in self._records.fences() if self._is_past(found, kept)]:
            payload_id = payload_id_of(fence.key)
            # It may have stored more since it was given up.
            if self._give_up(payload_id):
                self._remove(payload_id)
                self._records.remove_fence(payload_id)

    def _sweep_keys(self) -> None:
        claims = self._state.list(KEYS_PREFIX)
        self._state.delete([found.key for found in claims if self._is_past(found, KEYS_KEPT)])

    def _is_past(self, found: ListedObject, kept: timedelta) -> bool:
        now = self._clock()
        if found.modified_at <= now + MAX_AHEAD:
            return found.modified_at + kept < now
        # It was written when a clock was ahead, and counts as written now.
        with suppress(ObjectMissing, VersionConflict):
            held = self._state.get(found.key)
            self._state.replace(found.key, held.data, held.version, _JSON)
        return False
