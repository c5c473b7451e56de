"""Removes what is left of uploads without a record, and Idempotency-Keys past their time.

Before an upload's objects go it is given up, so that no record can come to refer to them. Those of
other producers in the same bucket are never touched: a payload id tells whether it was minted here.
"""

from datetime import timedelta

import orjson
import structlog

from shared.errors import ObjectMissing, Permanent, StowgateError, VersionConflict
from shared.ids import PayloadIds, minted_before
from shared.metrics import WorkerMetrics
from shared.ports import ObjectStore
from shared.records import (
    FENCES_KEPT,
    KEYS_KEPT,
    KEYS_PREFIX,
    SWEEP_CURSOR,
    Records,
    begin_sweep,
)
from shared.time import Clock, utc_now

_log = structlog.get_logger()

_JSON = "application/json"


class CursorUnreadable(Permanent):
    """Where the sweep is to go on cannot be told."""


class Sweeper:
    def __init__(
        self,
        *,
        instances: ObjectStore,
        state: ObjectStore,
        records: Records,
        payload_ids: PayloadIds,
        grace: timedelta,
        metrics: WorkerMetrics,
        clock: Clock = utc_now,
    ) -> None:
        """`grace` is longer than any upload can take that is still acknowledged."""
        self._instances = instances
        self._state = state
        self._records = records
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
        except VersionConflict:
            _log.info("another worker swept meanwhile")
        except StowgateError as error:
            _log.warning("sweep could not finish", error=str(error))

    def _sweep_payloads(self) -> None:
        until = minted_before(self._clock() - self._grace)
        try:
            cursor = self._state.get(SWEEP_CURSOR)
        except ObjectMissing:
            begin_sweep(self._state, self._clock())
            return
        after = _decode(cursor.data)
        for payload_id in self._instances.folders(after):
            if payload_id > until:
                break
            if self._payload_ids.minted(payload_id) and self._give_up(payload_id):
                self._remove(payload_id)
        data = orjson.dumps({"after": max(after, until)})
        self._state.replace(SWEEP_CURSOR, data, cursor.version, _JSON)

    def _give_up(self, payload_id: str) -> bool:
        try:
            return self._records.give_up(payload_id)
        except StowgateError as error:
            # Whatever keeps its record from us, it may be data that somebody wants back.
            self._records.ping()
            _log.error("payload passed over by the sweep", error=str(error))
            return False

    def _remove(self, payload_id: str) -> None:
        keys = [found.key for found in self._instances.list(f"{payload_id}/")]
        if not keys:
            return
        self._instances.delete(keys)
        self._metrics.swept.inc(len(keys))
        _log.info("swept", payload_id=payload_id, objects=len(keys))

    def _sweep_fences(self) -> None:
        # An upload of which a key was taken may go on for as long as any other.
        for payload_id in self._records.given_up(self._clock() - self._grace - FENCES_KEPT):
            # It may have stored more since it was given up.
            if self._give_up(payload_id):
                self._remove(payload_id)
                self._records.remove_fence(payload_id)

    def _sweep_keys(self) -> None:
        past = self._clock() - KEYS_KEPT
        self._state.delete(
            [found.key for found in self._state.list(KEYS_PREFIX) if found.modified_at < past]
        )


def _decode(cursor: bytes) -> str:
    try:
        after = orjson.loads(cursor)["after"]
        if not isinstance(after, str):
            raise TypeError("no payload id")
    except (orjson.JSONDecodeError, TypeError, KeyError) as error:
        raise CursorUnreadable(
            f"{SWEEP_CURSOR} in the state bucket is damaged; move it away, and the sweep begins "
            "with what is uploaded from then on"
        ) from error
    return after
