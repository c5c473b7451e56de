"""The reported state of a payload: its ingest record, with the refusals and replays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, takewhile

import structlog

from api.http.problems import Conflict
from shared.errors import ObjectMissing, VersionConflict
from shared.events import InstancesStored
from shared.instances import StoredInstance
from shared.ports import ObjectStore
from shared.record_store import Records
from shared.records import IngestRecord, RecordUnreadable, State
from shared.refusals import (
    NOTHING_KNOWN,
    OBJECTS_GONE,
    Outcome,
    OutcomeUnreadable,
    PayloadState,
    Refusal,
    RefusalReason,
    Refusals,
    Replay,
    has_objects,
    ordered_name,
)
from shared.time import Clock, utc_now

_log = structlog.get_logger()

# Of each kind of object, for a page of refused payloads: one request to an S3 store.
_MAX_NAMES = 1000


@dataclass(frozen=True)
class Payload:
    """A payload. `refusal` is the latest one, and `replay` one that must be published; each is set
    only if the state follows from it."""

    record: IngestRecord
    outcome: Outcome = NOTHING_KNOWN
    refusal: Refusal | None = None
    replay: Replay | None = None

    @property
    def state(self) -> PayloadState:
        return self.outcome.state(self.record)

    @property
    def last_error(self) -> str | None:
        """The text of the latest error or refusal."""
        if self.refusal is not None:
            return refusal_in_words(self.refusal, self.record)
        if self.replay is not None:
            return self.replay.last_error
        return self.record.last_error


@dataclass(frozen=True)
class ReplayedPage:
    """The number of replayed payloads, the reasons why others were not, and the next cursor."""

    replayed: int
    reasons: list[str]
    following: str | None


class Payloads:
    """Every call may raise what the object store raises, and `RecordUnreadable`."""

    def __init__(
        self,
        records: Records,
        refusals: Refusals,
        instances: ObjectStore,
        announce: Callable[[InstancesStored], None],
        clock: Clock = utc_now,
    ) -> None:
        """`announce` publishes the event of a replayed payload, or leaves it to the relay."""
        self._records = records
        self._refusals = refusals
        self._instances = instances
        self._announce = announce
        self._clock = clock

    def find(self, payload_id: str) -> Payload | None:
        versioned = self._records.find(payload_id)
        if versioned is None:
            return None
        is_opened = versioned.record.state is State.OPENED
        return self._payload(
            versioned.record, self._refusals.outcome(payload_id) if is_opened else NOTHING_KNOWN
        )

    def instances(self, payload: Payload) -> Iterator[StoredInstance]:
        """Yield the payload's instances; many of them are read during the iteration."""
        return self._records.instances(payload.record)

    def replay(self, payload: Payload) -> Payload:
        """Have the workflow request published again. Raises `Conflict`."""
        replayed = self._replay(payload)
        record = replayed.record
        self._announce(
            InstancesStored(record.payload_id, record.correlation_id, record.traceparent)
        )
        return replayed

    def replay_page(self, state: PayloadState, limit: int, cursor: str = "") -> ReplayedPage:
        """Replay the payloads of one page of a list, oldest first.

        Publishes no events: the relay finds the replays, which are due, and its pace is that of the
        workers.
        """
        page, following = self.newest(state, limit, cursor)
        payloads = list(page)
        refused = []
        for payload in reversed(payloads):
            try:
                self._replay(payload)
            except Conflict as error:
                refused.append(error.detail)
        return ReplayedPage(len(payloads) - len(refused), refused, following)

    def _replay(self, payload: Payload) -> Payload:
        record, outcome = payload.record, payload.outcome
        try:
            if payload.state is PayloadState.FAILED:
                return self._replay_failed(record.payload_id)
            if payload.state is not PayloadState.REFUSED:
                raise Conflict(
                    f"the payload is {payload.state}; only failed or refused payloads can be "
                    "replayed"
                )
            if not has_objects(self._instances, record.payload_id):
                raise Conflict(OBJECTS_GONE)
            number = outcome.next_replay
            self._refusals.request_replay(record.payload_id, number, self._clock())
        except VersionConflict as error:
            raise Conflict("the payload is already being moved or replayed") from error
        if self._refusals.outcome(record.payload_id).replayed >= number:
            # Another call was faster, and its replay has already been published.
            raise Conflict("the payload has already been replayed")
        return self._payload(record, self._refusals.outcome(record.payload_id))

    def _replay_failed(self, payload_id: str) -> Payload:
        versioned = self._records.find(payload_id)
        if versioned is None:
            raise VersionConflict(f"payload {payload_id} no longer has a record")
        return Payload(self._records.replay(versioned, due_at=self._clock()).record)

    def newest(
        self, state: PayloadState | None, limit: int, cursor: str = ""
    ) -> tuple[Iterator[Payload], str | None]:
        """Return up to `limit` payloads after `cursor`, newest first, and the next cursor.

        A page may be shorter if payloads have another state than their records.
        """
        if state is PayloadState.REFUSED:
            return self._refused(limit, cursor)
        place = None if state is None else State(state)
        found, following = self._records.newest(place, limit, cursor)
        if state is PayloadState.PENDING:
            return self._with_replays(found, following, limit, cursor)
        outcomes: dict[str, Outcome] = {}
        # A failed payload has none, and there may be many.
        if state is not PayloadState.FAILED:
            listed = self._refusals.outcomes(cursor)
            outcomes = dict(takewhile(lambda item: _is_before(item[0], following), listed))
        page = (self._payload(r, outcomes.get(r.payload_id, NOTHING_KNOWN)) for r in found)
        return (p for p in page if state in (None, p.state)), following

    def _refused(self, limit: int, cursor: str) -> tuple[Iterator[Payload], str | None]:
        outcomes, following = self._refusals.outcomes_page(_MAX_NAMES, cursor)
        refused = [
            payload_id
            for payload_id, outcome in outcomes.items()
            if outcome.state_when_opened is PayloadState.REFUSED
        ]
        if len(refused) > limit:
            refused, following = refused[:limit], refused[limit - 1]
        page = (self._readable(payload_id, outcomes[payload_id]) for payload_id in refused)
        return (p for p in page if p is not None and p.state is PayloadState.REFUSED), following

    def _with_replays(
        self, records: Iterator[IngestRecord], following: str | None, limit: int, cursor: str
    ) -> tuple[Iterator[Payload], str | None]:
        """Add the payloads with an unpublished replay, whose records are in opened/."""
        listed = takewhile(lambda of: _is_before(of, following), self._refusals.replays(cursor))
        replayed = list(islice(listed, limit + 1))
        if not replayed:
            return map(Payload, records), following
        pending = {record.payload_id: Payload(record) for record in records}
        ids = sorted({*pending, *replayed}, key=ordered_name)
        if len(ids) > limit:
            ids, following = ids[:limit], ids[limit - 1]
        found = (pending.get(payload_id) or self._readable(payload_id) for payload_id in ids)
        return (p for p in found if p is not None and p.state is PayloadState.PENDING), following

    def _readable(self, payload_id: str, outcome: Outcome | None = None) -> Payload | None:
        """Return None for an unreadable record, which the list of all payloads reports."""
        try:
            if outcome is None:
                return self.find(payload_id)
            versioned = self._records.find(payload_id)
        except RecordUnreadable:
            return None
        return None if versioned is None else self._payload(versioned.record, outcome)

    def _payload(self, record: IngestRecord, outcome: Outcome) -> Payload:
        payload = Payload(record, outcome)
        if record.state is not State.OPENED or outcome.refused is None:
            return payload
        try:
            if payload.state is PayloadState.REFUSED:
                refusal = self._refusals.refusal(record.payload_id, outcome.refused)
                return replace(payload, refusal=refusal)
            if payload.state is PayloadState.PENDING:
                versioned = self._refusals.replay(record.payload_id, outcome.next_replay)
                return replace(payload, replay=versioned.replay if versioned else None)
        except (ObjectMissing, OutcomeUnreadable) as error:
            # The state is known from its key; only time and reason are missing.
            _log.error("could not read the reason of a refusal", error=str(error))
        return payload


def _is_before(payload_id: str, following: str | None) -> bool:
    """Whether a list has it on the page with that cursor to the next one."""
    return following is None or ordered_name(payload_id) <= ordered_name(following)


def refusal_in_words(refusal: Refusal, record: IngestRecord) -> str:
    """Return what happened, the possible causes, and what to do.

    The Workflow Manager reports no cause. `docs/workflows.md` explains its rules.
    """
    replay = f"then replay the payload (stowgate payloads replay {refusal.payload_id})"
    if refusal.reason is RefusalReason.NOT_SENT:
        return f"the replay was not published: {refusal.detail}"
    if refusal.reason is RefusalReason.REJECTED:
        return (
            "the Workflow Manager rejected the workflow request, because it violates one of its "
            f"rules: source ({record.source!r}) and destination ({record.destination!r}) have 1 to "
            "15 characters, the bucket name has 3 to 63, the correlation id is a GUID, and no "
            "workflow id is empty. Find the rule in the log of the Workflow Manager, correct the "
            f"setting, {replay}"
        )
    if refusal.reason is RefusalReason.DELIVERY_LIMIT:
        return (
            "the Workflow Manager gave up the workflow request after several deliveries. Either "
            f"{_no_workflow(record)}; or the condition (predicate) of a matching workflow is "
            "false, which prevents all of them from starting; or it could not read the bucket. Its "
            f"log shows the cause. Create or correct the workflow, {replay}"
        )
    return (
        "the broker removed the workflow request from the Workflow Manager's queue, by a policy "
        "such as a time-to-live or a maximum length. Correct the policy, check that the Workflow "
        f"Manager is running, {replay}"
    )


def _no_workflow(record: IngestRecord) -> str:
    if record.workflows:
        return f"it has no workflow with the id {' or '.join(map(repr, record.workflows))}"
    return (
        f"it has no workflow for AE title {record.destination!r} and source {record.source!r} "
        "(informatics_gateway.ae_title must be equal, and data_origins empty or with this source)"
    )
