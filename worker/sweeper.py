"""Removes what is left of uploads without a record, and Idempotency-Keys past their time.

Before an upload's objects go it is given up, so that no record can come to refer to them. Those of
other producers in the same bucket are never touched: a payload id tells whether it was minted here.
Nor are those of a payload that had a record once: see `shared/sweep_cursor.py`.
"""

import math
import random
from contextlib import suppress
from datetime import timedelta

import structlog

from shared.errors import ObjectMissing, StowgateError, Transient, VersionConflict
from shared.ids import PayloadIds, minted_before
from shared.ports import ListedObject, ObjectStore
from shared.record_store import TOMBSTONE_TTL, Records
from shared.records import CLAIM_FOLDERS, IDEMPOTENCY_TTL, claim_folder, payload_id_of
from shared.runtime.metrics import WorkerMetrics
from shared.sweep_cursor import SweepCursor
from shared.time import MAX_AHEAD, Clock, utc_now

_log = structlog.get_logger()

_JSON = "application/json"

_SIDECAR = ".dcm.json"

# What is passed over is named once; not more of it is remembered.
_MAX_NAMED = 1000


class _HadRecord(Exception):
    """The payload may have had a record that was lost."""


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
        pause: timedelta,
        metrics: WorkerMetrics,
        clock: Clock = utc_now,
    ) -> None:
        """`grace` is longer than any upload can take that is still acknowledged, and `pause` is
        between two sweeps."""
        self._instances = instances
        self._state = state
        self._records = records
        self._cursor = cursor
        self._payload_ids = payload_ids
        self._grace = grace
        self._metrics = metrics
        self._clock = clock
        self._claim_folders = min(CLAIM_FOLDERS, math.ceil(CLAIM_FOLDERS * pause / IDEMPOTENCY_TTL))
        # At random, lest the folders after it wait for a worker that is never started anew.
        self._next_claim_folder = random.randrange(CLAIM_FOLDERS)  # noqa: S311
        self._named: set[str] = set()

    def sweep(self) -> None:
        """One pass. Errors of the object store and of what it holds are logged; the next pass goes
        on."""
        for part in (self._sweep_tombstones, self._sweep_claims, self._sweep_payloads):
            try:
                part()
            except StowgateError as error:
                _log.warning("sweep could not finish", error=str(error))
                if isinstance(error, Transient):
                    return

    def _sweep_payloads(self) -> None:
        until = minted_before(self._clock() - self._grace)
        for payload_id in self._instances.folders(self._cursor.read().after):
            if payload_id > until:
                break
            if self._payload_ids.minted(payload_id):
                try:
                    self._abandon(payload_id)
                except _HadRecord:
                    return
        self._cursor.move(until)

    def _sweep_tombstones(self) -> None:
        # An upload of which a key was taken may go on for as long as any other.
        kept = TOMBSTONE_TTL + self._grace
        for tombstone in [
            found for found in self._records.tombstones() if self._is_past(found, kept)
        ]:
            payload_id = payload_id_of(tombstone.key)
            # It may have stored more since it was given up.
            try:
                is_done = self._abandon(payload_id)
            except _HadRecord:
                is_done = True
            if is_done:
                self._remove(self._state, [tombstone.key])

    def _sweep_claims(self) -> None:
        """Look at as many folders of claims as it takes to come to each once a day."""
        for _ in range(self._claim_folders):
            claims = self._state.list(claim_folder(self._next_claim_folder))
            past = [found.key for found in claims if self._is_past(found, IDEMPOTENCY_TTL)]
            self._remove(self._state, past)
            self._next_claim_folder = (self._next_claim_folder + 1) % CLAIM_FOLDERS

    def _abandon(self, payload_id: str) -> bool:
        """Remove what is there of an upload without a record; whether nothing is left of it.

        Raises `_HadRecord`. A worker writes sidecars only for a payload with a record. Whether
        records were lost is asked last, so that no restore can come between the look for this one
        and the answer.
        """
        try:
            if not self._records.give_up(payload_id):
                return False
        except StowgateError as error:
            # Whatever keeps its record from us, it may be data that somebody wants back.
            self._pass_over(self._state, error)
            return False
        keys = [found.key for found in self._instances.list(f"{payload_id}/")]
        if any(key.endswith(_SIDECAR) for key in keys):
            self._cursor.record_missing(payload_id, "a worker has written its metadata")
        if payload_id <= self._cursor.read().since:
            raise _HadRecord
        try:
            # Before the instances, by which the next sweep finds what is left.
            self._records.attachments.remove(payload_id)
        except StowgateError as error:
            self._pass_over(self._state, error)
            return False
        if not self._remove(self._instances, keys):
            return False
        if keys:
            self._metrics.swept.inc(len(keys))
            _log.info("swept", payload_id=payload_id, objects=len(keys))
        return True

    def _remove(self, store: ObjectStore, keys: list[str]) -> bool:
        """Remove these; False where one may not be removed, which must not keep the rest."""
        try:
            store.delete(keys)
        except StowgateError as error:
            self._pass_over(store, error)
            return False
        return True

    def _pass_over(self, store: ObjectStore, error: StowgateError) -> None:
        """Name once what is about one object alone. Raises what says that the store is away."""
        store.ping()
        words = str(error)
        if words not in self._named and len(self._named) < _MAX_NAMED:
            self._named.add(words)
            _log.error("passed over by the sweep", error=words)

    def _is_past(self, found: ListedObject, kept: timedelta) -> bool:
        now = self._clock()
        if found.modified_at <= now + MAX_AHEAD:
            return found.modified_at + kept < now
        # It was written when a clock was ahead, and counts as written now.
        with suppress(ObjectMissing, VersionConflict):
            stored = self._state.get(found.key)
            self._state.replace(found.key, stored.data, stored.version, _JSON)
        return False
