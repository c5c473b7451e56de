"""Leftovers of opened records are removed, many by one request."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from shared.adapters.folder.store import FolderObjectStore
from shared.errors import StoreRefused, StoreUnavailable
from worker.pending_cleanup import PendingCleanup


class Counting(FolderObjectStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: list[list[str]] = []
        self.away = False
        self.refuses = False

    def delete(self, keys: Iterable[str]) -> None:
        self.requests.append(list(keys))
        if self.away:
            raise StoreUnavailable("no answer")
        if self.refuses:
            raise StoreRefused("access denied")
        super().delete(self.requests[-1])


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    made = Counting(tmp_path / "bucket")
    made.prepare()
    for name in "abc":
        made.create(f"pending/{name}", b"{}", "application/json")
    return made


def names(store: Counting) -> list[str]:
    return [listed.key for listed in store.list("")]


def test_all_added_keys_are_removed_by_one_request(store: Counting) -> None:
    cleanup = PendingCleanup(store)
    cleanup.add(["pending/a", "failed/a"])
    cleanup.add(["pending/b"])
    assert names(store) == ["pending/a", "pending/b", "pending/c"]

    cleanup.run_once(0)

    assert names(store) == ["pending/c"]
    assert store.requests == [["pending/a", "failed/a", "pending/b"]]


def test_without_added_keys_no_request_is_sent(store: Counting) -> None:
    PendingCleanup(store).run_once(0)
    assert store.requests == []


def test_keys_are_kept_and_removed_when_the_store_is_available_again(
    store: Counting,
) -> None:
    cleanup = PendingCleanup(store)
    cleanup.add(["pending/a"])
    store.away = True
    cleanup.run_once(0)

    store.away = False
    cleanup.add(["pending/b"])
    cleanup.run_once(0)
    assert names(store) == ["pending/c"]


def test_a_bounded_number_of_keys_is_kept_while_the_store_is_unavailable(
    store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.pending_cleanup._MAX_KEPT", 2)
    cleanup = PendingCleanup(store)
    cleanup.add(["pending/a", "pending/b", "pending/c"])
    store.away = True
    cleanup.run_once(0)

    store.away = False
    cleanup.run_once(0)
    assert names(store) == ["pending/c"]


def test_a_refused_removal_is_not_tried_again(store: Counting) -> None:
    cleanup = PendingCleanup(store)
    cleanup.add(["pending/a"])
    store.refuses = True
    cleanup.run_once(0)
    cleanup.run_once(0)
    assert len(store.requests) == 1
