"""Claims of Idempotency-Keys, over a real folder store."""

import json
import tracemalloc
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from observed_store import ObservedStore, once
from records_made import RECEIVED_AT, record

from api.stow.idempotency import (
    ClaimedKey,
    ClaimUnreadable,
    Fingerprint,
    IdempotencyKeys,
    StillRunning,
)
from shared.adapters.folder.store import FolderObjectStore
from shared.ids import PayloadIds
from shared.ports import ObjectStore
from shared.record_store import Records, UploadGivenUp
from shared.records import IDEMPOTENCY_TTL, claim_folder
from shared.time import iso_utc

LEASE = timedelta(seconds=60)

CLAIM = ("10.0.0.1", "/dicomweb/studies", "k")


@dataclass
class Bench:
    folder: Path
    now: datetime = RECEIVED_AT

    def __post_init__(self) -> None:
        self.store = FolderObjectStore(self.folder)
        self.store.prepare()
        self.records = Records(self.store)
        self.keys = self.another_keys(self.store)

    def another_keys(self, store: ObjectStore) -> IdempotencyKeys:
        return IdempotencyKeys(
            store, Records(store), PayloadIds("stowgate").mint, LEASE, clock=lambda: self.now
        )

    def claim(self, key: str = CLAIM[2], caller: str = CLAIM[0]) -> ClaimedKey | str:
        return self.keys.claim(caller, CLAIM[1], key)

    def claims(self) -> list[bytes]:
        """What is stored of them."""
        return [self.store.get(found.key).data for found in self.store.list("idempotency/")]

    def claimed(self) -> ClaimedKey:
        claimed = self.claim()
        assert isinstance(claimed, ClaimedKey)
        return claimed


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_claimed_key_is_still_running_until_its_lease_ends(bench: Bench) -> None:
    first = bench.claimed()
    with pytest.raises(StillRunning):
        bench.claim()

    bench.now += LEASE + timedelta(seconds=1)

    assert bench.claimed().payload_id != first.payload_id


def test_a_renewed_key_stays_claimed(bench: Bench) -> None:
    first = bench.claimed()
    for _ in range(5):
        bench.now += LEASE * 0.6
        first.keep()

    with pytest.raises(StillRunning):
        bench.claim()


def test_a_key_is_renewed_once_half_of_its_lease_is_used(bench: Bench) -> None:
    first = bench.claimed()
    (claim,) = bench.claims()
    bench.now += LEASE * 0.4
    first.keep()
    assert bench.claims() == [claim]
    bench.now += LEASE * 0.2
    first.keep()

    assert bench.claims() != [claim]


def test_a_claim_lies_in_the_folder_of_its_first_byte_where_the_sweep_looks(bench: Bench) -> None:
    for number in range(20):
        bench.claim(key=f"k{number}")

    digests = [sha256("\0".join((*CLAIM[:2], f"k{n}")).encode()).hexdigest() for n in range(20)]
    assert [found.key for found in bench.store.list("idempotency/")] == [
        f"{claim_folder(bytes.fromhex(digest)[0])}{digest}.json" for digest in sorted(digests)
    ]


def test_a_claim_names_its_version_its_payload_and_its_times(bench: Bench) -> None:
    first = bench.claimed()

    (claim,) = bench.claims()
    assert json.loads(claim) == {
        "version": 1,
        "payload_id": first.payload_id,
        "claimed_at": iso_utc(bench.now),
        "until": iso_utc(bench.now + LEASE),
    }


def test_of_two_that_claim_a_key_at_once_one_has_it(bench: Bench) -> None:
    late = ObservedStore(bench.store, before={"create": once(bench.claimed)})

    with pytest.raises(StillRunning, match="still running"):
        bench.another_keys(late).claim(*CLAIM)


def test_a_key_that_is_used_again_keeps_its_claim(bench: Bench) -> None:
    first = bench.claimed()
    bench.records.add(replace(record(), payload_id=first.payload_id))
    before = bench.claims()
    bench.now += timedelta(seconds=1)

    assert bench.claim() == first.payload_id
    assert bench.claims() == before


def test_a_fingerprint_is_the_same_in_every_version() -> None:
    """Records have it."""
    assert str(Fingerprint(["a", "b"])) == sha256(b"a\nb").hexdigest()


def test_a_post_that_lost_its_key_cannot_release_it(bench: Bench) -> None:
    loser = bench.claimed()
    bench.now += LEASE * 2
    bench.claimed()

    with pytest.raises(StillRunning):
        loser.keep()
    with pytest.raises(StillRunning):
        loser.release()

    with pytest.raises(StillRunning):
        bench.claim()


def test_a_post_that_lost_its_key_cannot_write_its_record(bench: Bench) -> None:
    loser = bench.claimed()
    bench.now += LEASE * 2
    bench.claimed()

    with pytest.raises(UploadGivenUp):
        bench.records.add(replace(record(), payload_id=loser.payload_id))


def test_a_record_that_is_written_at_the_last_moment_keeps_its_key(bench: Bench) -> None:
    first = bench.claimed()
    bench.now += LEASE * 2

    def write_the_record() -> None:
        bench.records.add(replace(record(), payload_id=first.payload_id))

    late = ObservedStore(bench.store, before={"create": once(write_the_record)})

    assert bench.another_keys(late).claim(*CLAIM) == first.payload_id


def test_a_released_key_leaves_only_its_claim(bench: Bench) -> None:
    bench.claimed().release()
    bench.claimed()

    assert list(bench.store.list("pending/")) == []


def test_a_released_key_can_be_claimed_at_once(bench: Bench) -> None:
    bench.claimed().release()

    assert isinstance(bench.claim(), ClaimedKey)


def test_a_key_whose_record_is_written_leads_to_it_for_a_day(bench: Bench) -> None:
    claimed = bench.claimed()
    bench.records.add(replace(record(), payload_id=claimed.payload_id))

    assert bench.claim() == claimed.payload_id
    bench.now += IDEMPOTENCY_TTL - timedelta(seconds=1)
    assert bench.claim() == claimed.payload_id
    bench.now += timedelta(seconds=2)
    assert isinstance(bench.claim(), ClaimedKey)


def test_a_claim_written_by_a_clock_that_was_ahead_is_expired(bench: Bench) -> None:
    bench.now += timedelta(days=365)
    lost = bench.claimed()
    bench.now -= timedelta(days=365)

    assert bench.claimed().payload_id != lost.payload_id
    with pytest.raises(UploadGivenUp):
        bench.records.add(replace(record(), payload_id=lost.payload_id))


def test_a_key_written_by_a_clock_that_was_ahead_leads_to_its_record_for_a_day(
    bench: Bench,
) -> None:
    bench.now += timedelta(days=365)
    claimed = bench.claimed()
    bench.records.add(replace(record(), payload_id=claimed.payload_id))
    bench.now -= timedelta(days=365)

    assert bench.claim() == claimed.payload_id
    bench.now += IDEMPOTENCY_TTL - timedelta(seconds=1)
    assert bench.claim() == claimed.payload_id
    bench.now += timedelta(seconds=2)
    assert isinstance(bench.claim(), ClaimedKey)


def test_a_post_whose_clock_is_set_back_claims_its_key_again(bench: Bench) -> None:
    first = bench.claimed()
    bench.now -= timedelta(days=1)

    first.keep()

    with pytest.raises(StillRunning):
        bench.claim()


@pytest.mark.parametrize("damaged", [b"", b"{}", b'{"until":1,"of_a_newer_version":2}'])
def test_an_unreadable_claim_is_reported(bench: Bench, damaged: bytes) -> None:
    bench.claimed()
    (claim,) = bench.store.list("idempotency/")
    bench.store.put(claim.key, BytesIO(damaged), len(damaged), "application/json")

    with pytest.raises(ClaimUnreadable, match=claim.key):
        bench.claim()


def test_each_caller_has_its_own_keys(bench: Bench) -> None:
    bench.claim(caller="10.0.0.1")

    assert isinstance(bench.claim(caller="10.0.0.2"), ClaimedKey)


def test_a_fingerprint_depends_on_order_and_number_of_parts() -> None:
    prints = {str(Fingerprint(parts)) for parts in (["a"], ["a", "b"], ["b", "a"], ["ab"], [])}

    assert len(prints) == 5


def test_a_fingerprint_of_many_parts_needs_little_memory() -> None:
    digests = (f"{number:064x}" for number in range(20_000))

    tracemalloc.start()
    try:
        Fingerprint(digests)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 100_000
