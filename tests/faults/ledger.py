"""The books of a soak: what was sent and answered, what was requested of the Workflow Manager, and
what must agree when everything is at rest.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Request = tuple[str, int]
"""A payload id, and the number of one of its requests: 0 is the first, n the nth replay."""

WITNESS = "stowgate"
"""The folder in the payloads' bucket that is of no payload: it has the sweep's witness."""


@dataclass(frozen=True)
class Post:
    """One study to be sent until it is acknowledged. `sha256` is by SOP Instance UID; `workflows`
    and `destination` are what the workflow request must say; `key` is its Idempotency-Key."""

    number: int
    path: str
    study_uid: str
    series_uid: str
    sha256: Mapping[str, str]
    workflows: tuple[str, ...]
    destination: str
    key: str | None

    def object_key(self, payload_id: str, sop_instance_uid: str) -> str:
        return f"{payload_id}/dcm/{self.study_uid}/{self.series_uid}/{sop_instance_uid}.dcm"


@dataclass(frozen=True)
class Attempt:
    """One time that a POST was sent; times in seconds of the epoch. `status` is None where no
    answer came, and `error` says why. `stored` are the SOP Instance UIDs that the answer lists."""

    post: Post
    correlation_id: str
    api: str
    began: float
    ended: float
    status: int | None = None
    error: str | None = None
    payload_id: str | None = None
    stored: frozenset[str] = frozenset()
    answer_sha256: str | None = None

    @property
    def acknowledged(self) -> bool:
        return self.status in (200, 202)


@dataclass(frozen=True)
class Delivery:
    """One message taken from the Workflow Manager's queue; `redelivered` as AMQP has it. `number`
    is 0 for the first request of its payload, and n for the nth replay."""

    payload_id: str
    body: bytes
    request: Mapping[str, Any]
    redelivered: bool
    at: float
    violations: tuple[str, ...] = ()
    number: int = 0


@dataclass(frozen=True)
class Finding:
    """A row of the report: what is counted, and a line for each case."""

    name: str
    cases: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.cases)


@dataclass(frozen=True)
class Ledger:
    """Everything known at the end. `payloads` is what the API tells of each payload, by its id;
    `object_keys` are those of the payloads' bucket, and `sha256` that of each instance in it.

    `rejected` are the requests that the Workflow Manager rejected, and `dead_letters` those in its
    dead-letter queue, where the broker may have put more. `noted` are the refusals that Stowgate
    noted, and `replayed` the replays that it published."""

    attempts: Sequence[Attempt]
    deliveries: Sequence[Delivery]
    payloads: Mapping[str, Mapping[str, Any]]
    object_keys: frozenset[str]
    sha256: Mapping[str, str]
    rejected: frozenset[Request] = frozenset()
    dead_letters: frozenset[Request] = frozenset()
    noted: frozenset[Request] = frozenset()
    replayed: frozenset[Request] = frozenset()

    @cached_property
    def acknowledged(self) -> list[Attempt]:
        return [a for a in self.attempts if a.acknowledged]

    @cached_property
    def _by_correlation_id(self) -> dict[str, Attempt]:
        return {a.correlation_id: a for a in self.attempts}

    @cached_property
    def _deliveries_by_payload(self) -> dict[str, list[Delivery]]:
        found = defaultdict(list)
        for delivery in self.deliveries:
            found[delivery.payload_id].append(delivery)
        return dict(found)

    @cached_property
    def _deliveries_by_request(self) -> dict[Request, list[Delivery]]:
        found = defaultdict(list)
        for delivery in self.deliveries:
            found[delivery.payload_id, delivery.number].append(delivery)
        return dict(found)

    def _post_of(self, payload_id: str) -> Post | None:
        payload = self.payloads.get(payload_id)
        attempt = self._by_correlation_id.get(payload["correlation_id"]) if payload else None
        return attempt.post if attempt else None

    def must_be_zero(self) -> list[Finding]:
        rows: list[tuple[str, Iterable[str]]] = [
            ("acknowledged and lost", self._lost()),
            ("recorded, but no request opened", self._recorded_and_lost()),
            ("requests without a recorded POST of ours", self._unfounded()),
            ("doubled requests", self._doubled()),
            ("published more often than attempted", self._published_without_attempt()),
            ("requests that break the contract", self._violations()),
            ("requests that differ from their POST", self._differing()),
            ("stored bytes different or missing", self._different_bytes()),
            ("sidecars missing", self._sidecars_missing()),
            ("acknowledged, but not every instance", self._incomplete()),
            ("keys with more than one payload", self._keys_with_several_payloads()),
            ("keys with more than one answer", self._keys_with_several_answers()),
            ("refused and not noted", self._refused_and_not_noted()),
            ("noted and not refused", self._noted_and_not_refused()),
            ("replays lost", self._replays_lost()),
        ]
        return [Finding(name, tuple(cases)) for name, cases in rows]

    def _lost(self) -> Iterable[str]:
        for attempt in self.acknowledged:
            payload_id = attempt.payload_id
            payload = self.payloads.get(payload_id or "")
            if payload_id is None:
                yield f"{_name(attempt)}: {attempt.status} without a payload id"
            elif payload is None:
                yield f"{_name(attempt)}: payload {payload_id} has no record"
            elif payload["state"] != "opened":
                yield (
                    f"{_name(attempt)}: payload {payload_id} is {payload['state']} after "
                    f"{payload['attempts']} attempts: {payload['last_error']}"
                )
            elif payload_id not in self._deliveries_by_payload:
                yield f"{_name(attempt)}: payload {payload_id} is opened, but no request came"

    def _recorded_and_lost(self) -> Iterable[str]:
        acknowledged = {a.payload_id for a in self.acknowledged}
        for payload_id, payload in self.payloads.items():
            if payload_id in acknowledged:
                continue
            if payload["state"] != "opened" or payload_id not in self._deliveries_by_payload:
                yield f"payload {payload_id} is {payload['state']}: {payload['last_error']}"

    def _unfounded(self) -> Iterable[str]:
        for payload_id in self._deliveries_by_payload:
            if payload_id not in self.payloads:
                yield f"payload {payload_id}: there is no record"
            elif self._post_of(payload_id) is None:
                yield f"payload {payload_id}: nobody sent its correlation id"

    def _doubled(self) -> Iterable[str]:
        """A POST, which is one correlation id, with several payloads; or a payload with several
        requests. The same bytes again are told apart, see `published_twice`."""
        payloads = defaultdict(set)
        for payload_id, copies in self._deliveries_by_payload.items():
            payloads[copies[0].request["correlation_id"]].add(payload_id)
            if len({copy.body for copy in copies}) > 1:
                yield f"payload {payload_id}: requests that differ"
        for correlation_id, ids in payloads.items():
            if len(ids) > 1:
                yield f"POST {correlation_id}: payloads {', '.join(sorted(ids))}"

    def published_twice(self) -> Finding:
        """Payloads whose request reached the queue more than once, with the same bytes."""
        cases = []
        for (payload_id, number), copies in self._deliveries_by_request.items():
            times = _publications(copies)
            if times > 1:
                attempts = self.payloads.get(payload_id, {}).get("attempts")
                replay = f" (replay {number})" if number else ""
                cases.append(f"payload {payload_id} {times} times in {attempts} attempts{replay}:")
        return Finding("published twice", tuple(cases))

    def redelivered(self) -> int:
        """Copies that the broker delivered again; none is a publication."""
        groups = self._deliveries_by_request.values()
        return len(self.deliveries) - sum(map(_publications, groups))

    def _published_without_attempt(self) -> Iterable[str]:
        for (payload_id, number), copies in self._deliveries_by_request.items():
            attempts = self.payloads.get(payload_id, {}).get("attempts", 0)
            # Nothing says how often a replay was attempted once it was published. A worker that was
            # killed under the first lease wrote no attempt.
            if number == 0 and _publications(copies) > attempts + 1:
                yield f"payload {payload_id}: {_publications(copies)} times, {attempts} attempts"

    def _refused_and_not_noted(self) -> Iterable[str]:
        for payload_id, number in sorted(self.dead_letters - self.noted):
            yield f"payload {payload_id}, request {number}"

    def _noted_and_not_refused(self) -> Iterable[str]:
        for payload_id, number in sorted(self.noted - self.rejected - self.dead_letters):
            yield f"payload {payload_id}, request {number}"

    def _replays_lost(self) -> Iterable[str]:
        """All that was refused is replayed in the end; so each refusal has a replay that came."""
        for payload_id, number in sorted(self.noted):
            replay = (payload_id, number + 1)
            if replay not in self.replayed or replay not in self._deliveries_by_request:
                yield f"payload {payload_id}, replay {number + 1}"

    def _violations(self) -> Iterable[str]:
        for delivery in self.deliveries:
            for violation in delivery.violations:
                yield f"payload {delivery.payload_id}: {violation}"

    def _differing(self) -> Iterable[str]:
        for payload_id, copies in self._deliveries_by_payload.items():
            post = self._post_of(payload_id)
            if post is None:
                continue
            request = copies[0].request
            prefix = f"{payload_id}/"
            wanted = {post.object_key(payload_id, uid).removeprefix(prefix) for uid in post.sha256}
            if {entry["path"] for entry in request["payload"]} != wanted:
                yield f"POST {post.number}, payload {payload_id}: other instances"
            if tuple(request["workflows"]) != post.workflows:
                yield f"POST {post.number}, payload {payload_id}: {request['workflows']}"
            if request["trigger"]["destination"] != post.destination:
                yield f"POST {post.number}, payload {payload_id}: {request['trigger']}"

    def _different_bytes(self) -> Iterable[str]:
        wanted = {}
        for attempt in self.acknowledged:
            for uid in attempt.stored:
                key = attempt.post.object_key(attempt.payload_id or "", uid)
                wanted[key] = attempt.post.sha256.get(uid)
        for payload_id in self.payloads:
            if post := self._post_of(payload_id):
                wanted |= {post.object_key(payload_id, u): s for u, s in post.sha256.items()}
        for key, sha256 in wanted.items():
            found = self.sha256.get(key)
            if found != sha256:
                yield f"{key}: {'missing' if found is None else 'other bytes'}"

    def _sidecars_missing(self) -> Iterable[str]:
        for payload_id in self._deliveries_by_payload:
            if post := self._post_of(payload_id):
                for uid in post.sha256:
                    key = f"{post.object_key(payload_id, uid)}.json"
                    if key not in self.object_keys:
                        yield key

    def _incomplete(self) -> Iterable[str]:
        for attempt in self.acknowledged:
            if attempt.stored != set(attempt.post.sha256):
                yield f"{_name(attempt)}: {len(attempt.stored)} of {len(attempt.post.sha256)}"

    def _keys_with_several_payloads(self) -> Iterable[str]:
        payloads: dict[str, set[str | None]] = defaultdict(set)
        for payload_id in self.payloads:
            post = self._post_of(payload_id)
            if post is not None and post.key is not None:
                payloads[post.key].add(payload_id)
        for attempt in self.acknowledged:
            if attempt.post.key is not None:
                payloads[attempt.post.key].add(attempt.payload_id)
        for key, ids in payloads.items():
            if len(ids) > 1:
                yield f"{key}: {', '.join(sorted(map(str, ids)))}"

    def _keys_with_several_answers(self) -> Iterable[str]:
        answers = defaultdict(set)
        for attempt in self.acknowledged:
            if attempt.post.key is not None:
                answers[attempt.post.key].add((attempt.status, attempt.answer_sha256))
        for key, found in answers.items():
            if len(found) > 1:
                yield f"{key}: {len(found)} answers"

    def orphans(self) -> list[str]:
        """Objects of payloads without a record."""
        return orphans(self.object_keys, self.payloads)

    def recorded_without_answer(self) -> int:
        """Records of a POST whose sender never heard of them; it sent again under another id."""
        return len(set(self.payloads) - {a.payload_id for a in self.acknowledged})

    def answers(self) -> Counter[str]:
        return Counter(str(a.status or a.error) for a in self.attempts)


def orphans(object_keys: Iterable[str], payload_ids: Iterable[str]) -> list[str]:
    claimed = {*payload_ids, WITNESS}
    return [key for key in object_keys if key.partition("/")[0] not in claimed]


def _publications(copies: Sequence[Delivery]) -> int:
    """How often these were published. A copy that is redelivered was counted when it first came,
    unless it never did: it was on its way when a connection or the broker ended."""
    return sum(not copy.redelivered for copy in copies) + copies[0].redelivered


def _name(attempt: Attempt) -> str:
    return f"POST {attempt.post.number} ({attempt.correlation_id}, {attempt.api})"
