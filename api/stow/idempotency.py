"""The Idempotency-Key of a POST: sent again, it gets the first answer and opens nothing new.

A key is claimed by an object in the state bucket that names the payload id which the POST will
have. Whether that POST came to its end is told by the ingest record under that id, and the record
holds the first answer: there is one commit point, with a key as without one.
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

    may_retry = True


class ClaimUnreadable(Permanent):
    """What lies in a claim's place is damaged, or was written by a newer Stowgate."""


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
    """A key that this POST holds until `until`, as long as it renews it."""

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
        """Renew the claim when less than that part of it is left.

        More than all of it is left where the clock was set back; nobody else believes in that.
        Raises `StillRunning` where another POST took it over, because this one stood still.
        """
        now = self._clock()
        if not self._lease * at_least < self._claim.until - now <= self._lease:
            self._write(now + self._lease)

    def release(self) -> None:
        """Let the key be used again, after a POST that opened nothing. Raises as `keep`."""
        self._write(self._claim.claimed_at)

    def _write(self, until: datetime) -> None:
        claim = replace(self._claim, until=until)
        try:
            self._version = self._store.replace(self._key, _encode(claim), self._version, _JSON)
        except VersionConflict as error:
            raise StillRunning("another request with this Idempotency-Key took over") from error
        self._claim = claim


class IdempotencyKeys:
    """Every call may raise what the object store raises."""

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
        """Claim the key, or return the payload id of the POST that had it before.

        Raises `BadRequest` for a key that is none, `StillRunning`, and `ClaimUnreadable`.
        """
        if not _GRAMMAR.fullmatch(key):
            raise BadRequest("Idempotency-Key must be 1 to 255 visible ASCII characters")
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
                            # By a clock that was ahead: the day for which it is kept begins now.
                            again = _encode(replace(first, claimed_at=now))
                            self._store.replace(place, again, found.version, _JSON)
                        return first.payload_id
                    version = self._store.replace(place, _encode(claim), found.version, _JSON)
            except VersionConflict:
                continue
            return ClaimedKey(self._store, place, claim, version, self._lease, self._clock)

    def _counts(self, first: _Claim, now: datetime) -> bool:
        """Whether the POST that had the key is on record. Raises `StillRunning`.

        One that has not ended in time is given up, so that its record cannot come any more.
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
    """What a body holds, whatever boundary its sender made up this time."""

    def __init__(self, part_digests: Iterable[str] = ()) -> None:
        self._whole = hashlib.sha256()
        self._separator = b""
        for digest in part_digests:
            self.add(digest)

    def add(self, part_digest: str) -> None:
        self._whole.update(self._separator + part_digest.encode())
        self._separator = b"\n"

    def __str__(self) -> str:
        return self._whole.hexdigest()


def _decode(data: bytes, place: str) -> _Claim:
    try:
        return _Claim(**_SCHEMA.load(versions.loads(data, _VERSION)))
    except (ValueError, ValidationError) as error:
        raise ClaimUnreadable(
            f"{place} in the state bucket {versions.why_unreadable(error)}"
        ) from error


def _encode(claim: _Claim) -> bytes:
    return orjson.dumps({"version": _VERSION, **_SCHEMA.dump(asdict(claim))})
