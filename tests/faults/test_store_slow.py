"""The object store over a line that is slow, or behind a firewall that forgets."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from engines import ObjectStoreEndpoint
from proxy import Proxy

from shared.adapters.s3.store import MinioObjectStore
from shared.errors import StoreUnavailable

MIB = 1 << 20
TEXT = "text/plain"
TWENTY_MBIT = 2_500_000


@pytest.fixture
def line(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[Proxy]:
    with Proxy(object_store_endpoint.url) as proxy:
        yield proxy


@pytest.fixture
def store(line: Proxy, object_store_endpoint: ObjectStoreEndpoint, bucket: str) -> MinioObjectStore:
    store = MinioObjectStore.connect(
        line.url,
        access_key=object_store_endpoint.access_key,
        secret_key=object_store_endpoint.secret_key,
        region="us-east-1",
        bucket=bucket,
        threads=16,
    )
    store.prepare()
    return store


def put(store: MinioObjectStore, key: str, size_bytes: int) -> None:
    store.put(key, BytesIO(bytes(size_bytes)), size_bytes, TEXT)


def test_64_mb_of_concurrent_bodies_pass_over_a_line_of_20_mbit(
    store: MinioObjectStore, line: Proxy
) -> None:
    line.slow_down(TWENTY_MBIT)
    sizes = {f"{number:02}": 4 * MIB for number in range(10)} | {"in parts": 24 * MIB}

    with ThreadPoolExecutor(len(sizes)) as threads:
        list(threads.map(lambda key: put(store, key, sizes[key]), sizes))

    assert {found.key: found.size_bytes for found in store.list("")} == sizes


def test_a_line_that_falls_silent_during_a_body_aborts_the_put(
    store: MinioObjectStore, line: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.adapters.s3.connections._SILENT_SECONDS", 2.0)
    line.slow_down(TWENTY_MBIT)
    held = line.hold(b"PUT /")

    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(put, store, "key", 7 * MIB)
        held.wait_reached()
        line.black_hole()
        held.release()
        with pytest.raises(StoreUnavailable, match="no bytes in either direction for"):
            sent.result()


def test_the_first_put_after_a_firewall_forgot_all_connections_succeeds(
    store: MinioObjectStore, line: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: put(store, f"before/{number}", 9), range(8)))
    line.forget()
    # As if they had idled for long.
    monkeypatch.setattr("shared.adapters.s3.connections._MAX_IDLE_SECONDS", 0.0)

    put(store, "first", 9)
    store.create("created", b"first", TEXT)
    assert store.get("first").data == bytes(9)
