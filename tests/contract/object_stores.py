"""What the tests of object stores share."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, RawIOBase

from engines import ObjectStoreEndpoint

from shared.adapters.s3.store import MinioObjectStore
from shared.errors import StowgateError, VersionConflict
from shared.ports import ObjectStore

MIB = 1024 * 1024
TEXT = "text/plain"


def minio_store(endpoint: ObjectStoreEndpoint, bucket: str) -> MinioObjectStore:
    return MinioObjectStore.connect(
        endpoint.url,
        access_key=endpoint.access_key,
        secret_key=endpoint.secret_key,
        region="us-east-1",
        bucket=bucket,
        threads=64,
    )


class Generated(RawIOBase):
    """A stream of `size_bytes`, generated as they are read; can fail at a given position."""

    def __init__(self, size_bytes: int, fails_at: int | None = None) -> None:
        super().__init__()
        self._size_bytes = size_bytes
        self._fails_at = fails_at
        self._read = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        self._read = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if self._fails_at is not None and self._read >= self._fails_at:
            raise ConnectionResetError("the sender is gone")
        size = min(self._size_bytes - self._read, MIB if size < 0 else size)
        if self._fails_at is not None:
            size = min(size, self._fails_at - self._read)
        start = self._read
        self._read += size
        return generated(start, size)


def generated(start: int, size: int) -> bytes:
    """The bytes of `Generated` from `start`: every 4 KiB repeat their own number."""
    first, last = start // 4096, (start + size + 4095) // 4096
    blocks = b"".join(number.to_bytes(8, "big") * 512 for number in range(first, last))
    return blocks[start - first * 4096 :][:size]


def put(store: ObjectStore, key: str, data: bytes) -> None:
    store.put(key, BytesIO(data), len(data), TEXT)


def put_growing(store: ObjectStore, key: str, data: bytes) -> None:
    store.begin(key, BytesIO(data), TEXT, 1 << 30).finish(len(data))


def keys(store: ObjectStore, prefix: str = "", after: str = "") -> list[str]:
    return [found.key for found in store.list(prefix, after)]


def at_once(calls: list[Callable[[], str]]) -> Counter[str]:
    """Run each in its own thread, and count what they return or raise."""
    together = threading.Barrier(len(calls))

    def outcome(call: Callable[[], str]) -> str:
        together.wait()
        try:
            return call()
        except StowgateError as error:
            return type(error).__name__

    with ThreadPoolExecutor(len(calls)) as threads:
        return Counter(threads.map(outcome, calls))


def count_up(store: ObjectStore, times: int) -> None:
    for _ in range(times):
        while True:
            found = store.get("counter")
            with contextlib.suppress(VersionConflict):
                store.replace("counter", b"%d" % (int(found.data) + 1), found.version, TEXT)
                break


def every_call(store: ObjectStore) -> list[Callable[[], object]]:
    return [
        store.ping,
        store.prepare,
        lambda: store.get("key"),
        lambda: store.read_range("key", 0, 1),
        lambda: list(store.list("")),
        lambda: put(store, "key", b"x"),
        lambda: put_growing(store, "key", b"x"),
        lambda: store.create("key", b"x", TEXT),
        lambda: store.replace("key", b"x", "0" * 32, TEXT),
        lambda: store.delete(["key"]),
    ]
