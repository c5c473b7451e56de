"""What came in lately, and what needs an operator, read with few requests to the object store."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from api.payloads.states import refusal_in_words
from shared.errors import ObjectMissing
from shared.ids import minted_at
from shared.ports import ListedObject
from shared.record_store import Records, VersionedRecord
from shared.records import IngestRecord, RecordUnreadable, State, payload_id_of
from shared.refusals import Outcome, OutcomeUnreadable, PayloadState, Refusals
from shared.time import Clock, utc_now

MAX_NAMES = 1000
"""Names that a view lists of each place: one request to an S3 store."""

MAX_SIZES = 100
"""Records that a view reads for the numbers of instances and bytes. Later views know them."""

MAX_TROUBLES = 5
"""Payloads in each state that need an operator, with their reasons."""

MAX_REQUESTS = 6 + MAX_SIZES + 4 * MAX_TROUBLES
"""Requests to the store for a view: three listings of records and three of refusals; one read for
each size, each failed and each waiting payload, and two for each refused one."""

LONG_WAIT = timedelta(minutes=5)
"""A payload that waits longer is reported; a worker usually needs a second."""

# On a slow store a view does without sizes that are not known yet.
_MAX_SIZES_SECONDS = 1.0


@dataclass(frozen=True)
class Size:
    """`size_bytes` is None in the record of an earlier release with many instances."""

    instances: int
    size_bytes: int | None


@dataclass(frozen=True)
class Post:
    """One POST that was acknowledged. `size` is None until its record was read."""

    payload_id: str
    received_at: datetime
    state: PayloadState
    opened_after_seconds: float | None
    size: Size | None = None


@dataclass(frozen=True)
class Count:
    """A number of payloads; `is_more` if there may be more."""

    number: int
    is_more: bool = False


@dataclass(frozen=True)
class Trouble:
    """A payload that needs an operator, or that waits for long, with the reason if it has one."""

    payload_id: str
    state: PayloadState
    received_at: datetime
    source: str
    destination: str
    reason: str | None


@dataclass(frozen=True)
class Report:
    """The newest POSTs, newest first, and what needs an operator.

    `complete_since` is None if `posts` has all POSTs; else it has all since then.
    `oldest_waiting` is the oldest of those listed.
    """

    posts: tuple[Post, ...]
    complete_since: datetime | None
    waiting: Count
    failed: Count
    refused: Count
    oldest_waiting: datetime | None
    troubles: tuple[Trouble, ...]


class Activity:
    """Reads reports. Every call may raise what the object store raises.

    The number of instances and the size of a POST never change, so a process keeps those of the
    newest POSTs in memory.
    """

    def __init__(
        self,
        records: Records,
        refusals: Refusals,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._records = records
        self._refusals = refusals
        self._clock = clock
        self._monotonic = monotonic
        self._sizes: dict[str, Size] = {}

    def read(self, since: datetime) -> Report:
        """Return a report, with the sizes of POSTs since then. Takes `MAX_REQUESTS` at most."""
        # A record is written to its new place before it leaves the old one.
        pending = self._records.listed(State.PENDING, MAX_NAMES)
        opened = self._records.listed(State.OPENED, MAX_NAMES)
        failed = self._records.listed(State.FAILED, MAX_NAMES)
        outcomes, last_outcome = self._refusals.outcomes_page(MAX_NAMES)
        # Of an opened record that is still in pending/, and of a replayed one in failed/, the first
        # place counts.
        places = {State.OPENED: opened, State.PENDING: pending, State.FAILED: failed}
        found: dict[str, tuple[State, ListedObject]] = {}
        for state, listed in places.items():
            for item in listed:
                found.setdefault(payload_id_of(item.key), (state, item))
        waiting = [item for state, item in found.values() if state is State.PENDING]
        failures = [item for state, item in found.values() if state is State.FAILED]
        replays = [i for i, o in outcomes.items() if o.state_when_opened is PayloadState.PENDING]
        refused = [i for i, o in outcomes.items() if o.state_when_opened is PayloadState.REFUSED]
        complete_since = _complete_since(places.values(), last_outcome)
        posts = self._with_sizes(
            [
                post
                for post in _posts(found, outcomes)
                if complete_since is None or post.received_at >= complete_since
            ],
            {payload_id: item for payload_id, (_, item) in found.items()},
            since,
        )
        oldest = [minted_at(payload_id_of(item.key)) for item in waiting[-1:]]
        oldest += [minted_at(payload_id) for payload_id in replays[-1:]]
        return Report(
            posts=posts,
            complete_since=complete_since,
            waiting=Count(len(waiting) + len(replays), len(pending) == MAX_NAMES),
            failed=Count(len(failures), len(failed) == MAX_NAMES),
            refused=Count(len(refused), last_outcome is not None),
            oldest_waiting=min(oldest, default=None),
            troubles=(
                *self._troubles(failures[:MAX_TROUBLES], State.FAILED),
                *self._refusals_of(refused[:MAX_TROUBLES], outcomes),
                *(
                    trouble
                    for trouble in self._troubles(waiting[-MAX_TROUBLES:], State.PENDING)
                    if trouble.reason or self._clock() - trouble.received_at > LONG_WAIT
                ),
            ),
        )

    def _with_sizes(
        self, posts: list[Post], items: dict[str, ListedObject], since: datetime
    ) -> tuple[Post, ...]:
        sizes = {
            p.payload_id: self._sizes[p.payload_id] for p in posts if p.payload_id in self._sizes
        }
        unknown = [p for p in posts if p.payload_id not in sizes and p.received_at >= since]
        end = self._monotonic() + _MAX_SIZES_SECONDS
        for post in unknown[:MAX_SIZES]:
            if self._monotonic() > end:
                break
            versioned = self._read(items[post.payload_id])
            if versioned is not None:
                sizes[post.payload_id] = _size(versioned)
        self._sizes = sizes
        return tuple(replace(post, size=sizes.get(post.payload_id)) for post in posts)

    def _read(self, item: ListedObject) -> VersionedRecord | None:
        """Return None for a record that was moved since, or is damaged, which lists report."""
        try:
            return self._records.read(item.key)
        except RecordUnreadable:
            return None

    def _troubles(self, items: Iterable[ListedObject], state: State) -> list[Trouble]:
        found = [versioned.record for item in items if (versioned := self._read(item))]
        return [
            _trouble(record, PayloadState(record.state), record.last_error)
            for record in found
            if record.state is state
        ]

    def _refusals_of(self, refused: list[str], outcomes: dict[str, Outcome]) -> list[Trouble]:
        troubles = []
        for payload_id in refused:
            try:
                record = self._records.opened(payload_id)
            except RecordUnreadable:
                continue
            if record is None:
                continue
            try:
                refusal = self._refusals.refusal(payload_id, outcomes[payload_id].refused or 0)
                reason = refusal_in_words(refusal, record)
            except (ObjectMissing, OutcomeUnreadable):
                reason = "the reason cannot be read"
            troubles.append(_trouble(record, PayloadState.REFUSED, reason))
        return troubles


def _trouble(record: IngestRecord, state: PayloadState, reason: str | None) -> Trouble:
    return Trouble(
        record.payload_id, state, record.received_at, record.source, record.destination, reason
    )


def _complete_since(
    places: Iterable[list[ListedObject]], last_outcome: str | None
) -> datetime | None:
    ends = [minted_at(payload_id_of(p[-1].key)) for p in places if len(p) == MAX_NAMES]
    if last_outcome is not None:
        ends.append(minted_at(last_outcome))
    return max(ends, default=None)


def _posts(
    found: dict[str, tuple[State, ListedObject]], outcomes: dict[str, Outcome]
) -> list[Post]:
    posts = []
    for payload_id, (state, item) in found.items():
        received_at = minted_at(payload_id)
        reported, opened_after = PayloadState(state), None
        if state is State.OPENED:
            # The record is created in opened/ when its request was published, and never changed.
            opened_after = max(0.0, (item.modified_at - received_at).total_seconds())
            if payload_id in outcomes:
                reported = outcomes[payload_id].state_when_opened
        posts.append(Post(payload_id, received_at, reported, opened_after))
    return sorted(posts, key=lambda post: post.received_at, reverse=True)


def _size(versioned: VersionedRecord) -> Size:
    return Size(versioned.record.file_count, versioned.record.total_bytes)
