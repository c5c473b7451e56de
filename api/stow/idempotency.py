"""The Idempotency-Key of a POST: a repeated POST gets the first answer and opens nothing new.

A claim of a key is an object in the state bucket with the payload id of the POST. The ingest record
with that id shows that the POST was completed, and holds its answer. So there is one commit point,
with or without a key.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta

import orjson
from marshmallow import EXCLUDE, Schema, ValidationError, fields

from api.http.problems import BadRequest, Conflict
from shared import versions
from shared.errors import ObjectMissing, Permanent, VersionConflict
from shared.ports import ObjectStore
from shared.record_store import Records
from shared.records import IDEMPOTENCY_TTL, claim_folder
from shared.time import MAX_AHEAD, Clock, UtcDateTime, has_ended, utc_now

_JSON = "application/json"
_GRAMMAR = re.compile(r"[!-~]{1,255}")


class StillRunning(Conflict):
    """The first POST with this key has not been answered yet."""

    reason = "in_progress"
    may_retry = True


class ClaimUnreadable(Permanent):
    """The claim is damaged, or was written by a newer Stowgate."""


@dataclass(frozen=True)
class _Claim:
    payload_id: str
    claimed_at: datetime
    until: datetime

    @property
    def released(self) -> bool:
        return self.until == self.claimed_at


class _ClaimSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    payload_id = fields.String(required=True)
    claimed_at = UtcDateTime(required=True)
    until = UtcDateTime(required=True)


_VERSION = 1
_SCHEMA = _ClaimSchema()


class ClaimedKey:
    """A key that this POST has claimed and must renew."""

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        claim: _Claim,
        version: str,
        lease: timedelta,
        clock: Clock,
    ) -> None:
        self._store = store
        self._key = key
        self._claim = claim
        self._version = version
        self._lease = lease
        self._clock = clock

    @property
    def payload_id(self) -> str:
        return self._claim.payload_id

    def keep(self, *, at_least: float = 0.5) -> None:
        """Renew the claim if less than the share `at_least` of its lease is left.

        A claim that lasts longer than its lease shows that the clock was set back; other processes
        ignore such a claim. Raises `StillRunning` if another POST has taken over the key, because
        this one was paused.
        """
        now = self._clock()
        if not self._lease * at_least < self._claim.until - now <= self._lease:
            self._write(now + self._lease)

    def release(self) -> None:
        """Release the key after a POST without a record. Raises what `keep` raises."""
        self._write(self._claim.claimed_at)

    def _write(self, until: datetime) -> None:
        claim = replace(self._claim, until=until)
        try:
            self._version = self._store.replace(self._key, _encode(claim), self._version, _JSON)
        except VersionConflict as error:
            raise StillRunning("another request with this Idempotency-Key took over") from error
        self._claim = claim


def checked_key(key: str | None) -> str | None:
    """Return the value of the header, if there is one. Raises `BadRequest` if it is not valid."""
    if key is not None and not _GRAMMAR.fullmatch(key):
        raise BadRequest("Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key


class IdempotencyKeys:
    """Claims keys. Every call may raise what the object store raises."""

    def __init__(
        self,
        store: ObjectStore,
        records: Records,
        mint: Callable[[datetime], str],
        lease: timedelta,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._records = records
        self._mint = mint
        self._lease = lease
        self._clock = clock

    def claim(self, caller: str, path: str, key: str) -> ClaimedKey | str:
        """Claim the key, or return the payload id of an earlier, completed POST with it.

        Raises `StillRunning` and `ClaimUnreadable`.
        """
        digest = hashlib.sha256("\0".join((caller, path, key)).encode()).hexdigest()
        place = f"{claim_folder(int(digest[:2], 16))}{digest}.json"
        while True:
            now = self._clock()
            claim = _Claim(self._mint(now), now, now + self._lease)
            try:
                found = self._store.get(place)
            except ObjectMissing:
                found = None
            try:
                if found is None:
                    version = self._store.create(place, _encode(claim), _JSON)
                else:
                    first = _decode(found.data, place)
                    if self._counts(first, now):
                        if first.claimed_at > now + MAX_AHEAD:
                            # Written while a clock was ahead: its time to live starts now.
                            again = _encode(replace(first, claimed_at=now))
                            self._store.replace(place, again, found.version, _JSON)
                        return first.payload_id
                    version = self._store.replace(place, _encode(claim), found.version, _JSON)
            except VersionConflict:
                continue
            return ClaimedKey(self._store, place, claim, version, self._lease, self._clock)

    def _counts(self, first: _Claim, now: datetime) -> bool:
        """Whether the first POST has a record. Raises `StillRunning`.

        An expired POST is given up, so that it cannot write a record later.
        """
        if first.claimed_at + IDEMPOTENCY_TTL <= now:
            return False
        if self._records.find(first.payload_id) is not None:
            return True
        if first.released:
            return False
        if not has_ended(first.until, now):
            raise StillRunning("the first request with this Idempotency-Key is still running")
        return not self._records.give_up(first.payload_id)


class Fingerprint:
    """A digest of the parts of a body, which does not depend on the boundary."""

    def __init__(self, part_digests: Iterable[str] = ()) -> None:
        self._digest = hashlib.sha256()
        self._separator = b""
        for digest in part_digests:
            self.add(digest)

    def add(self, part_digest: str) -> None:
        self._digest.update(self._separator + part_digest.encode())
        self._separator = b"\n"

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _decode(data: bytes, place: str) -> _Claim:
    try:
        return _Claim(**_SCHEMA.load(versions.loads(data, _VERSION)))
    except (ValueError, ValidationError) as error:
        raise ClaimUnreadable(
            f"{place} in the state bucket {versions.why_unreadable(error)}"
        ) from error


def _encode(claim: _Claim) -> bytes:
    return orjson.dumps({"version": _VERSION, **_SCHEMA.dump(asdict(claim))})
