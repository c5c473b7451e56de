"""The cost of a page of records, which does not depend on their total number."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
from answering import Forwarding, serving
from engines import ObjectStoreEndpoint
from object_stores import minio_store, put
from records_made import RECEIVED_AT, newest, record

from shared.adapters.folder.store import FolderObjectStore
from shared.ids import PayloadIds
from shared.ports import ListedObject, ObjectStore, StoredObject
from shared.record_store import Records
from shared.records import State, encode, newest_first

# More than one listing returns, per state.
MANY = 1010


def add_opened(store: ObjectStore, count: int) -> None:
    ids, opened = PayloadIds("stowgate"), replace(record(), state=State.OPENED)

    def add(number: int) -> None:
        payload_id = ids.mint(RECEIVED_AT + timedelta(seconds=number))
        data = encode(replace(opened, payload_id=payload_id))
        put(store, f"opened/{newest_first(payload_id)}", data)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(count)))


class Counting(FolderObjectStore):
    """Counts its requests."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked = Counter[str]()

    def get(self, key: str) -> StoredObject:
        self.asked["read"] += 1
        return super().get(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        self.asked["listing"] += 1
        for found in super().list(prefix, after):
            self.asked["listed"] += 1
            yield found


def test_a_page_reads_only_the_records_that_it_shows(tmp_path: Path) -> None:
    store = Counting(tmp_path)
    store.prepare()
    add_opened(store, 50)
    records = Records(store)

    page, cursor = newest(records, None, 5)

    assert len(page) == 5
    assert store.asked == {"listing": 3, "read": 5, "listed": 6}
    assert len(newest(records, None, 5, cursor or "")[0]) == 5
    assert store.asked == {"listing": 6, "read": 10, "listed": 12}


def test_a_page_takes_one_listing_of_each_state_and_one_read_of_each_opened_record(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str
) -> None:
    asked = Counter[str]()

    class Counted(Forwarding):
        upstream: ClassVar[str] = urlsplit(object_store_endpoint.url).netloc

        def meddle(self, body: bytes) -> None:
            asked["listing" if "list-type=2" in self.path else "read"] += 1
            super().meddle(body)

    direct = minio_store(object_store_endpoint, bucket)
    direct.prepare()
    add_opened(direct, MANY)
    endpoint = object_store_endpoint
    with serving(Counted) as url:
        records = Records(
            minio_store(ObjectStoreEndpoint(url, endpoint.access_key, endpoint.secret_key), bucket)
        )
        first, cursor = newest(records, None, 20)
        assert asked == {"listing": 3, "read": 20}
        second, _ = newest(records, State.OPENED, 20, cursor or "")

    assert asked == {"listing": 4, "read": 40}
    received = [shown.payload_id for shown in (*first, *second)]
    assert received == sorted(received, reverse=True)
    assert len(received) == 40


@pytest.mark.parametrize(
    ("state", "reads"), [(State.OPENED, 1), (State.PENDING, 2), (State.FAILED, 3)]
)
def test_a_record_on_a_page_takes_up_to_three_reads(
    tmp_path: Path, state: State, reads: int
) -> None:
    store = Counting(tmp_path)
    store.prepare()
    records = Records(store)
    added = record()
    records.add(added)
    if state is not State.PENDING:
        held = records.find(added.payload_id)
        assert held is not None
        records.settle(held, state)
    store.asked.clear()

    assert [found.state for found in newest(records, None, 5)[0]] == [state]

    assert store.asked["read"] == reads
