"""Leader election, over a real folder store."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from observed_store import ObservedStore, once
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.queues import Published
from shared.errors import BrokerUnavailable, StoreUnavailable, StowgateError
from shared.record_store import Records
from shared.runtime.metrics import WorkerMetrics
from shared.time import iso_utc
from worker.leader import LEASE_KEY, LeaderLease
from worker.relay import Relay

DURATION = timedelta(seconds=60)


class CountingStore(FolderObjectStore):
    """Counts its requests, and can be unavailable."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked = 0
        self.error: StowgateError | None = None

    def get(self, *given: Any) -> Any:
        return self._count(super().get, *given)

    def create(self, *given: Any) -> Any:
        return self._count(super().create, *given)

    def replace(self, *given: Any) -> Any:
        return self._count(super().replace, *given)

    def list(self, *given: Any) -> Any:
        return self._count(super().list, *given)

    def _count(self, ask: Callable[..., Any], *given: Any) -> Any:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return ask(*given)


@dataclass
class Bench:
    folder: Path
    now: datetime = RECEIVED_AT
    workers: int = 2
    leases: list[LeaderLease] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = CountingStore(self.folder)
        self.store.prepare()

    def worker(self, clock_is_ahead: timedelta = timedelta(0)) -> LeaderLease:
        self.leases.append(
            LeaderLease(
                self.store,
                owner=f"worker {len(self.leases)}",
                duration=DURATION,
                workers=lambda: self.workers,
                clock=lambda: self.now + clock_is_ahead,
            )
        )
        return self.leases[-1]

    def leading(self) -> list[LeaderLease]:
        return [lease for lease in self.leases if lease.leads()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_one_of_many_workers_leads_while_it_runs(bench: Bench) -> None:
    for _ in range(5):
        bench.worker()
    for _ in range(200):
        assert bench.leading() == bench.leases[:1]
        bench.now += timedelta(seconds=5)


def test_a_lease_is_renewed_by_one_write_once_half_of_it_is_used(bench: Bench) -> None:
    leader = bench.worker()
    assert leader.leads()
    asked = bench.store.asked
    bench.now += DURATION * 0.4
    assert leader.leads()
    assert bench.store.asked == asked
    bench.now += DURATION * 0.2
    assert leader.leads()
    assert bench.store.asked == asked + 1
    bench.now += DURATION * 0.9

    assert not bench.worker().leads()


def test_a_lease_has_a_version_its_owner_and_its_end(bench: Bench) -> None:
    bench.worker().leads()

    assert json.loads(bench.store.get(LEASE_KEY).data) == {
        "version": 1,
        "owner": "worker 0",
        "until": iso_utc(bench.now + DURATION),
    }


def test_a_worker_that_another_one_got_before_does_not_lead_until_that_lease_ends(
    bench: Bench,
) -> None:
    winner = bench.worker()
    late = ObservedStore(bench.store, before={"create": once(winner.leads)})
    loser = LeaderLease(
        late, owner="late", duration=DURATION, workers=lambda: 1, clock=lambda: bench.now
    )
    assert not loser.leads()
    assert not loser.leads()
    bench.now += DURATION

    assert loser.leads()


def test_a_leader_that_died_is_followed_when_its_lease_has_ended(bench: Bench) -> None:
    dead, other = bench.worker(), bench.worker()
    assert bench.leading() == [dead]
    bench.leases.remove(dead)
    bench.now += DURATION / 2
    assert bench.leading() == []
    bench.now += DURATION

    assert bench.leading() == [other]
    assert not dead.leads()


def test_a_new_worker_leads_at_once_after_a_release(bench: Bench) -> None:
    first = bench.worker()
    assert first.leads()
    first.release()

    assert bench.worker().leads()


def test_a_leader_that_released_its_lease_leads_again_if_alone(bench: Bench) -> None:
    only = bench.worker()
    for _ in range(3):
        assert only.leads()
        only.release()


@pytest.mark.parametrize("until", ["2036-01-01T00:00:00Z", "2026-11-23T12:03:00Z"])
def test_a_lease_written_by_a_clock_that_was_ahead_is_void(bench: Bench, until: str) -> None:
    lease = f'{{"owner": "another", "until": "{until}"}}'.encode()
    bench.store.put(LEASE_KEY, BytesIO(lease), len(lease), "application/json")

    assert bench.worker().leads()


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"owner": 1, "until": 2}', b"\xff"])
def test_a_damaged_lease_counts_as_expired(bench: Bench, data: bytes) -> None:
    bench.store.put(LEASE_KEY, BytesIO(data), len(data), "application/json")

    assert bench.worker().leads()


def test_the_lease_of_a_newer_stowgate_is_respected(bench: Bench) -> None:
    lease = b'{"version": 2, "holder": "a newer one"}'
    bench.store.put(LEASE_KEY, BytesIO(lease), len(lease), "application/json")

    older = bench.worker()
    assert not older.leads()
    asked = bench.store.asked
    bench.now += DURATION * 0.9
    assert not older.leads()
    assert bench.store.asked == asked
    bench.now += DURATION * 0.2
    assert not older.leads()
    assert bench.store.get(LEASE_KEY).data == lease


def test_a_clock_that_is_set_back_delays_no_leader(bench: Bench) -> None:
    bench.now += timedelta(days=1)
    leader, other = bench.worker(), bench.worker()
    assert bench.leading() == [leader]
    bench.now -= timedelta(days=1)
    assert bench.leading() == [leader]
    bench.leases.remove(leader)
    bench.now += 3 * DURATION

    assert bench.leading() == [other]


def test_a_renewal_whose_answer_was_lost_does_not_end_the_leadership(bench: Bench) -> None:
    leader = bench.worker()
    assert leader.leads()
    replace = FolderObjectStore(bench.folder).replace
    version = bench.store.get(LEASE_KEY).version
    lease = b'{"owner": "worker 0", "until": "2026-11-23T12:00:50Z"}'
    replace(LEASE_KEY, lease, version, "application/json")
    bench.now += DURATION / 2

    assert leader.leads()


def test_an_unavailable_store_ends_the_leadership_with_the_lease(bench: Bench) -> None:
    leader = bench.worker()
    assert leader.leads()
    bench.store.error = StoreUnavailable("away")
    bench.now += DURATION * 0.9
    assert leader.leads()
    bench.now += DURATION * 0.2
    assert not leader.leads()
    bench.store.error = None
    assert leader.leads()


def test_the_only_other_worker_follows_when_the_lease_ends(bench: Bench) -> None:
    """The one that died counts no more, and there is nobody to be spread from."""
    bench.workers = 1
    dead, other = bench.worker(), bench.worker()
    assert bench.leading() == [dead]
    bench.leases.remove(dead)
    bench.now += DURATION

    assert bench.leading() == [other]


def test_workers_that_cannot_be_counted_look_as_if_there_were_one(bench: Bench) -> None:
    def away() -> int:
        raise BrokerUnavailable("away")

    assert bench.worker().leads()
    other = LeaderLease(
        bench.store, owner="other", duration=DURATION, workers=away, clock=lambda: bench.now
    )
    assert not other.leads()
    bench.now += DURATION

    assert other.leads()


def _asked_in_an_hour(folder: Path, workers: int) -> int:
    bench = Bench(folder, workers=workers)
    records = Records(bench.store)
    relays = [
        (
            bench.worker(),
            Relay(
                records=records,
                announce=lambda _: Published(),
                backlog=lambda: 0,
                metrics=WorkerMetrics(CollectorRegistry()),
                clock=lambda: bench.now,
            ),
        )
        for _ in range(workers)
    ]
    for _ in range(720):
        random.shuffle(relays)
        for lease, relay in relays:
            if lease.leads():
                relay.run_once()
        bench.now += timedelta(seconds=5)
    return bench.store.asked


def test_fifty_idle_workers_ask_the_store_for_little_more_than_one_does(tmp_path: Path) -> None:
    one = _asked_in_an_hour(tmp_path / "one", 1)
    fifty = _asked_in_an_hour(tmp_path / "fifty", 50)

    assert one > 1000
    assert fifty < 1.5 * one
