"""Removes the objects of uploads without a record, and expired Idempotency-Keys.

Before an upload's objects are removed the upload is given up, so that no record can refer to them
later. Two kinds of payload are never touched: those of other producers in the same bucket, which
the payload id shows, and those that once had a record (see `shared/sweep_cursor.py`).
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

# Each skipped object is logged once; the memory for that is bounded.
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
        """`grace` must exceed the duration of every upload that can still be acknowledged; `pause`
        is the time between two sweeps."""
        self._instances = instances
        self._state = state
        self._records = records
        self._cursor = cursor
        self._payload_ids = payload_ids
        self._grace = grace
        self._metrics = metrics
        self._clock = clock
        self._claim_folders = min(CLAIM_FOLDERS, math.ceil(CLAIM_FOLDERS * pause / IDEMPOTENCY_TTL))
        # Random, so that frequent restarts do not always sweep the same folders.
        self._next_claim_folder = random.randrange(CLAIM_FOLDERS)  # noqa: S311
        self._named: set[str] = set()

    def sweep(self) -> None:
        """Run one pass. Errors are logged, and the next pass continues."""
        for part in (self._sweep_tombstones, self._sweep_claims, self._sweep_payloads):
            try:
                part()
            except StowgateError as error:
                _log.warning("sweep did not finish", error=str(error))
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
        # An upload with an Idempotency-Key may still run for the grace period.
        kept = TOMBSTONE_TTL + self._grace
        for tombstone in [
            found for found in self._records.tombstones() if self._is_past(found, kept)
        ]:
            payload_id = payload_id_of(tombstone.key)
            # It may have stored more objects since it was given up.
            try:
                is_done = self._abandon(payload_id)
            except _HadRecord:
                is_done = True
            if is_done:
                self._remove(self._state, [tombstone.key])

    def _sweep_claims(self) -> None:
        """Check some folders of claims: with each pass the next ones, and each at least once a
        day."""
        for _ in range(self._claim_folders):
            claims = self._state.list(claim_folder(self._next_claim_folder))
            past = [found.key for found in claims if self._is_past(found, IDEMPOTENCY_TTL)]
            self._remove(self._state, past)
            self._next_claim_folder = (self._next_claim_folder + 1) % CLAIM_FOLDERS

    def _abandon(self, payload_id: str) -> bool:
        """Remove the objects of an upload without a record; return whether all are gone.

        Raises `_HadRecord`. A sidecar proves that there was a record, as a worker writes one only
        for a payload with a record. The check for lost records comes after the search for this
        record: a restore between the two would otherwise go unnoticed.
        """
        try:
            if not self._records.give_up(payload_id):
                return False
        except StowgateError as error:
            # The record may exist and only be unreadable, so the data stays.
            self._pass_over(self._state, error)
            return False
        keys = [found.key for found in self._instances.list(f"{payload_id}/")]
        if any(key.endswith(_SIDECAR) for key in keys):
            self._cursor.record_missing(payload_id, "a worker wrote its metadata")
        if payload_id <= self._cursor.read().since:
            raise _HadRecord
        try:
            # Attachments first: the next sweep finds the rest by the instances.
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
        """Remove the objects; return False if some could not be removed."""
        try:
            store.delete(keys)
        except StowgateError as error:
            self._pass_over(store, error)
            return False
        return True

    def _pass_over(self, store: ObjectStore, error: StowgateError) -> None:
        """Log once an error that concerns one object. Raises if the whole store is unavailable."""
        store.ping()
        words = str(error)
        if words not in self._named and len(self._named) < _MAX_NAMED:
            self._named.add(words)
            _log.error("skipped by the sweep", error=words)

    def _is_past(self, found: ListedObject, kept: timedelta) -> bool:
        now = self._clock()
        if found.modified_at <= now + MAX_AHEAD:
            return found.modified_at + kept < now
        # It was written while a clock was ahead: write it again, with the current time.
        with suppress(ObjectMissing, VersionConflict):
            stored = self._state.get(found.key)
            self._state.replace(found.key, stored.data, stored.version, _JSON)
        return False
