"""The contract of every object store, on the folder and on a real S3; then single adapters."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import pytest
from answering import Answering, Forwarding, serving
from certificates import certificates
from disks import small_disk
from engines import (
    OBJECT_STORE_VARIABLE,
    VERSITYGW,
    ObjectStoreEndpoint,
    object_store_client,
)
from minio import MinioAdmin
from minio.commonconfig import GOVERNANCE
from minio.credentials.providers import StaticProvider
from minio.deleteobjects import DeleteObject
from minio.error import MinioAdminException
from minio.objectlockconfig import DAYS, ObjectLockConfig
from records_made import record
from service import wait_for

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.s3.connections import ProgressPool
from shared.adapters.s3.store import MinioObjectStore
from shared.errors import (
    ObjectMissing,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StowgateError,
    VersionConflict,
)
from shared.ports import ObjectStore, StoredObject
from shared.record_store import Records, UploadGivenUp

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024
TEXT = "text/plain"
XML = "application/xml"


def minio_store(endpoint: ObjectStoreEndpoint, bucket: str) -> MinioObjectStore:
    return MinioObjectStore.connect(
        endpoint.url,
        access_key=endpoint.access_key,
        secret_key=endpoint.secret_key,
        region="us-east-1",
        bucket=bucket,
        threads=64,
    )


@pytest.fixture(params=["folder", "minio", "versitygw"])
def unprepared(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A store whose bucket does not exist yet."""
    if request.param == "folder":
        return FolderObjectStore(tmp_path / "bucket")
    if request.param == "versitygw":
        endpoint = request.getfixturevalue("second_object_store_endpoint")
        return minio_store(endpoint, request.getfixturevalue("bucket_of_second_store"))
    endpoint = request.getfixturevalue("object_store_endpoint")
    return minio_store(endpoint, request.getfixturevalue("bucket"))


@pytest.fixture
def store(unprepared: ObjectStore) -> ObjectStore:
    unprepared.prepare()
    return unprepared


@pytest.fixture
def folder(tmp_path: Path) -> FolderObjectStore:
    store = FolderObjectStore(tmp_path / "bucket")
    store.prepare()
    return store


@pytest.fixture
def minio(object_store_endpoint: ObjectStoreEndpoint, bucket: str) -> MinioObjectStore:
    store = minio_store(object_store_endpoint, bucket)
    store.prepare()
    return store


@contextlib.contextmanager
def user_who_may_not_delete(
    endpoint: ObjectStoreEndpoint, bucket: str, key: str
) -> Iterator[ObjectStoreEndpoint]:
    """The same store in another process or client."""
    url = urlsplit(endpoint.url)
    admin = MinioAdmin(
        endpoint=url.netloc,
        credentials=StaticProvider(endpoint.access_key, endpoint.secret_key),
        secure=url.scheme == "https",
    )
    name = f"user-{secrets.token_hex(6)}"
    everything = {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}
    but_that = {
        "Effect": "Deny",
        "Action": ["s3:DeleteObject"],
        "Resource": [f"arn:aws:s3:::{bucket}/{key}"],
    }
    policy = {"Version": "2012-10-17", "Statement": [everything, but_that]}
    try:
        admin.policy_add(policy_name=name, policy=policy)
        admin.user_add(access_key=name, secret_key="of-this-user")
        admin.policy_set(policy_name=name, user=name)
    except MinioAdminException as error:
        pytest.skip(f"no MinIO that makes users: {error}")
    yield ObjectStoreEndpoint(endpoint.url, name, "of-this-user")
    admin.user_remove(access_key=name)
    admin.policy_remove(policy_name=name)


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


def test_an_object_is_read_back_as_it_was_put(store: ObjectStore) -> None:
    put(store, "a/b.dcm", b"pixels")
    assert store.get("a/b.dcm").data == b"pixels"


def test_an_empty_object_can_be_stored(store: ObjectStore) -> None:
    put(store, "empty", b"")
    assert store.get("empty").data == b""
    assert store.read_range("empty", 0, 10) == b""


def test_a_second_put_overwrites(store: ObjectStore) -> None:
    put(store, "key", b"first, and longer")
    put(store, "key", b"second")
    assert store.get("key").data == b"second"


def test_reading_a_missing_object_raises_object_missing(store: ObjectStore) -> None:
    put(store, "there/is", b"something")
    for key in ("nothing", "there", "there/is/not", "there/isn"):
        with pytest.raises(ObjectMissing, match=key):
            store.get(key)
        with pytest.raises(ObjectMissing, match=key):
            store.read_range(key, 0, 1)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 3, b"012"), (4, 2, b"45"), (8, 5, b"89"), (10, 1, b""), (50, 5, b""), (3, 0, b"")],
)
def test_a_range_is_cut_at_the_end_of_the_object(
    store: ObjectStore, start: int, length: int, expected: bytes
) -> None:
    put(store, "digits", b"0123456789")
    assert store.read_range("digits", start, length) == expected


SCATTERED = ["a-b", "a.b", "a/b", "a/c-/x", "a/c/d", "a/c/e", "a/c0", "a0", "b/z", "é/ü", "日/本"]


@pytest.fixture
def scattered(store: ObjectStore) -> ObjectStore:
    for key in reversed(SCATTERED):
        put(store, key, key.encode())
    return store


def test_a_listing_is_in_the_byte_order_of_complete_keys(scattered: ObjectStore) -> None:
    assert keys(scattered) == sorted(SCATTERED, key=str.encode)


@pytest.mark.parametrize("prefix", ["a/", "a/c/", "é/", "none/"])
def test_a_prefix_selects_the_keys_that_begin_with_it(scattered: ObjectStore, prefix: str) -> None:
    assert keys(scattered, prefix) == [key for key in SCATTERED if key.startswith(prefix)]


@pytest.mark.parametrize("after", [*SCATTERED, "a", "a/", "a/bb", "a/c", "a/c/", "a/c/dd", "c"])
def test_a_listing_continues_after_a_key(scattered: ObjectStore, after: str) -> None:
    expected = [key for key in SCATTERED if key.encode() > after.encode()]
    assert keys(scattered, "", after) == expected
    assert keys(scattered, "a/", after) == [key for key in expected if key.startswith("a/")]


def test_a_listing_has_size_and_time(store: ObjectStore) -> None:
    before = datetime.now(UTC) - timedelta(minutes=5)
    put(store, "a/key", b"12345")
    (found,) = store.list("a/")
    assert found.size_bytes == 5
    assert before < found.modified_at < datetime.now(UTC) + timedelta(minutes=5)


def test_a_long_listing_is_complete_and_lazy_and_all_of_it_can_be_deleted(
    store: ObjectStore,
) -> None:
    names = [f"n/{number:04}" for number in range(1010)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: put(store, name, b"x"), names))
    assert keys(store, "n/") == names

    listing = store.list("n/")
    assert next(listing).key == names[0]
    store.delete([names[-1]])
    assert [found.key for found in listing] == names[1:-1]

    store.delete(found.key for found in store.list("n/"))
    assert keys(store) == []


def test_a_key_can_be_created_once(store: ObjectStore) -> None:
    store.create("key", b"first", TEXT)
    with pytest.raises(VersionConflict, match="key"):
        store.create("key", b"second", TEXT)
    assert store.get("key").data == b"first"


def test_create_accepts_more_than_one_piece(store: ObjectStore) -> None:
    store.create("key", generated(0, MIB), TEXT)
    assert store.get("key").data == generated(0, MIB)


def test_one_of_64_concurrent_creations_wins(store: ObjectStore) -> None:
    def creation(number: int) -> str:
        store.create("vae/one", str(number).encode(), TEXT)
        winners.append(number)
        return "created"

    winners: list[int] = []
    outcomes = at_once([partial(creation, number) for number in range(64)])
    assert outcomes == {"created": 1, "VersionConflict": 63}
    assert store.get("vae/one").data == str(winners[0]).encode()


def test_replace_needs_the_current_version(store: ObjectStore) -> None:
    first = store.create("key", b"1", TEXT)
    assert store.get("key").version == first
    second = store.replace("key", b"2", first, TEXT)
    with pytest.raises(VersionConflict, match="key"):
        store.replace("key", b"3", first, TEXT)
    assert store.get("key").data == b"2"
    assert store.get("key").version == second


def test_an_object_that_was_put_can_be_replaced(store: ObjectStore) -> None:
    put(store, "key", b"1")
    store.replace("key", b"2", store.get("key").version, TEXT)
    assert store.get("key").data == b"2"


def test_one_of_32_concurrent_replacements_wins(store: ObjectStore) -> None:
    version = store.create("lease", b"nobody", TEXT)

    def replacement(number: int) -> str:
        store.replace("lease", str(number).encode(), version, TEXT)
        return "replaced"

    outcomes = at_once([partial(replacement, number) for number in range(32)])
    assert outcomes == {"replaced": 1, "VersionConflict": 31}


def count_up(store: ObjectStore, times: int) -> None:
    for _ in range(times):
        while True:
            found = store.get("counter")
            with contextlib.suppress(VersionConflict):
                store.replace("counter", b"%d" % (int(found.data) + 1), found.version, TEXT)
                break


def test_no_replacement_is_lost_between_threads(store: ObjectStore) -> None:
    store.create("counter", b"0", TEXT)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: count_up(store, 10), range(4)))
    assert store.get("counter").data == b"40"


def test_replacing_a_missing_object_is_a_conflict(store: ObjectStore) -> None:
    version = store.create("a/key", b"1", TEXT)
    store.delete(["a/key"])
    with pytest.raises(VersionConflict, match="a/key"):
        store.replace("a/key", b"2", version, TEXT)
    assert keys(store) == []


def test_delete_is_idempotent(store: ObjectStore) -> None:
    for key in ("a/b/c", "a/b/d", "e"):
        put(store, key, b"x")
    store.delete(["a/b/c", "never", "a", "a/b/c/deeper"])
    store.delete(["a/b/c"])
    store.delete([])
    assert keys(store) == ["a/b/d", "e"]


@pytest.fixture
def with_one_kept(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[ObjectStore]:
    """The store for a user without permission to remove `a/kept`."""
    if isinstance(store, FolderObjectStore):
        unlink = os.unlink

        def refuse(path: str) -> None:
            if path.endswith("/a/kept"):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            unlink(path)

        monkeypatch.setattr("shared.adapters.folder.store.os.unlink", refuse)
        yield store
        return
    if "versitygw" in request.node.callspec.id:
        pytest.skip("one account, which may do everything")
    endpoint, bucket = map(request.getfixturevalue, ("object_store_endpoint", "bucket"))
    with user_who_may_not_delete(endpoint, bucket, "a/kept") as user:
        yield minio_store(user, bucket)


def test_an_object_that_cannot_be_removed_is_reported_and_the_others_are_removed(
    with_one_kept: ObjectStore,
) -> None:
    store, others = with_one_kept, [f"a/{number:04}" for number in range(1005)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: put(store, key, b"x"), [*others, "a/kept", "z"]))

    with pytest.raises(StoreRefused, match="cannot delete a/kept"):
        store.delete(["a/kept", *others, "z"])

    assert keys(store) == ["a/kept"]


def test_a_deleted_key_can_be_created_again(store: ObjectStore) -> None:
    store.create("a/b", b"1", TEXT)
    store.delete(["a/b"])
    store.create("a/b", b"2", TEXT)
    assert store.get("a/b").data == b"2"


def test_a_large_object_needs_little_memory(store: ObjectStore) -> None:
    size = 120 * MIB + 5
    stream = cast("BinaryIO", Generated(size))
    tracemalloc.start()
    try:
        store.put("large", stream, size, "application/dicom")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Four concurrent parts, each with a piece of 1 MiB being sent and one being read.
    assert peak < 12 * MIB
    assert [found.size_bytes for found in store.list("")] == [size]
    for start in (0, 8 * MIB - 4, 60 * MIB, size - 10):
        assert store.read_range("large", start, 10) == generated(start, 10)


def test_concurrent_puts_do_not_mix(store: ObjectStore) -> None:
    def one(number: int) -> bool:
        data = hashlib.sha256(str(number).encode()).digest() * 4096
        put(store, f"series/{number % 3}/{number}", data)
        return store.get(f"series/{number % 3}/{number}").data == data

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(48)))
    assert len(keys(store)) == 48


@pytest.mark.parametrize("fails_at", [0, 3 * MIB, 33 * MIB])
def test_a_stream_that_fails_leaves_nothing(store: ObjectStore, fails_at: int) -> None:
    put(store, "kept", b"as it was")
    size = 40 * MIB if fails_at > 8 * MIB else 8 * MIB
    for key in ("new", "kept"):
        with pytest.raises(ConnectionResetError, match="the sender is gone"):
            store.put(key, cast("BinaryIO", Generated(size, fails_at)), size, TEXT)
    assert keys(store) == ["kept"]
    assert store.get("kept").data == b"as it was"


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 17 * MIB + 3, 24 * MIB])
def test_an_object_written_while_its_data_arrive_is_visible_after_finish(
    store: ObjectStore, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "growing"
    with path.open("wb", buffering=0) as source, path.open("rb") as data:
        writing = store.begin("new", data, TEXT, 1 << 40 if size == 1 else 1 << 30)
        for start in range(0, size, 5 * MIB):
            source.write(generated(start, min(5 * MIB, size - start)))
            writing.proceed(min(start + 5 * MIB, size))
        assert keys(store) == []
        writing.finish(size)
        writing.abandon()
    assert [found.size_bytes for found in store.list("")] == [size]
    for start in (0, max(0, 8 * MIB - 5), max(0, size - 10)):
        assert store.read_range("new", start, 10) == generated(start, 10)[: max(0, size - start)]


def test_an_abandoned_object_leaves_the_earlier_one_unchanged(
    store: ObjectStore, tmp_path: Path
) -> None:
    put(store, "kept", b"as it was")
    path = tmp_path / "growing"
    path.write_bytes(bytes(20 * MIB))
    with path.open("rb") as data:
        for key in ("kept", "new"):
            writing = store.begin(key, data, TEXT, 1 << 30)
            writing.proceed(20 * MIB)
            writing.abandon()
            writing.abandon()
    assert keys(store) == ["kept"]
    assert store.get("kept").data == b"as it was"


def test_data_that_end_too_early_leave_no_object(store: ObjectStore) -> None:
    writing = store.begin("new", BytesIO(bytes(9 * MIB)), TEXT, 1 << 30)
    assert not writing.has_failed
    with pytest.raises(ValueError, match="short of"):
        writing.finish(10 * MIB)
    assert keys(store) == []


def test_a_stream_that_ends_early_leaves_nothing(store: ObjectStore) -> None:
    with pytest.raises(ValueError, match="2 bytes short of 5"):
        store.put("new", BytesIO(b"123"), 5, TEXT)
    assert keys(store) == []


def test_put_reads_no_more_of_a_stream_than_its_size(store: ObjectStore) -> None:
    stream = BytesIO(b"12345")
    store.put("new", stream, 3, TEXT)
    assert store.get("new").data == b"123"
    assert stream.read() == b"45"


def test_a_bucket_can_be_prepared_concurrently_and_repeatedly(unprepared: ObjectStore) -> None:
    def preparation() -> str:
        unprepared.prepare()
        return "prepared"

    assert at_once([preparation] * 8) == {"prepared": 8}
    put(unprepared, "key", b"kept")
    unprepared.prepare()
    assert unprepared.get("key").data == b"kept"
    unprepared.ping()
    unprepared.check_room()


def test_without_a_bucket_every_call_raises_store_refused(unprepared: ObjectStore) -> None:
    """An unmounted disk or another endpoint must not be mistaken for an empty store."""
    calls: list[Callable[[], object]] = [
        unprepared.ping,
        lambda: unprepared.get("key"),
        lambda: unprepared.read_range("key", 0, 1),
        lambda: list(unprepared.list("")),
        lambda: put(unprepared, "key", b"x"),
        lambda: put_growing(unprepared, "key", b"x"),
        lambda: unprepared.create("key", b"x", TEXT),
        lambda: unprepared.replace("key", b"x", "0" * 32, TEXT),
        lambda: unprepared.delete(["key"]),
    ]
    for call in calls:
        with pytest.raises(StoreRefused, match="STOWGATE_"):
            call()


UNSAFE = ["", "/", "/a", "a/", "a//b", "..", "a/../b", "./a", ".tmp/a", "a/.b", "a\0", "a\nb"]
TOO_LONG = ["n" * 256, "/".join(["n" * 100] * 11)]


@pytest.mark.parametrize("key", [*UNSAFE, *TOO_LONG, "a\x7f", "\ud800"])
def test_an_unsafe_key_is_a_programming_error(store: ObjectStore, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: put(store, key, b"x"),
        lambda: put_growing(store, key, b"x"),
        lambda: store.create(key, b"x", TEXT),
        lambda: store.replace(key, b"x", "0" * 32, TEXT),
        lambda: store.get(key),
        lambda: store.read_range(key, 0, 1),
        lambda: store.delete([key]),
        lambda: store.list(f"{key}/"),
    ]
    for call in calls:
        with pytest.raises(ValueError):  # noqa: PT011 - encoding a surrogate has a text of its own
            call()
    assert keys(store) == []


def test_a_prefix_without_its_slash_is_a_programming_error(store: ObjectStore) -> None:
    with pytest.raises(ValueError, match="must end with a slash"):
        store.list("pending")


def child(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


PUT_HALF = """
import io, sys
from pathlib import Path
from shared.adapters.folder.store import FolderObjectStore

class Half(io.RawIOBase):
    left = 4
    def read(self, size=-1):
        if not self.left:
            print("half", flush=True)
            sys.stdin.read()
        self.left -= 1
        return bytes(size)

FolderObjectStore(Path(sys.argv[1])).put("a/key", Half(), 1 << 30, "text/plain")
"""


def test_folder_killed_during_a_put_leaves_no_partial_object(
    folder: FolderObjectStore, tmp_path: Path
) -> None:
    with child(PUT_HALF, str(tmp_path / "bucket")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    (leftover,) = (tmp_path / "bucket" / ".tmp").iterdir()
    assert leftover.stat().st_size >= 4 * MIB
    assert keys(folder) == []
    with pytest.raises(ObjectMissing):
        folder.get("a/key")


def test_folder_removes_old_temporary_files(folder: FolderObjectStore, tmp_path: Path) -> None:
    old, of_next_year, young = (
        tmp_path / "bucket" / ".tmp" / name for name in ("old", "of_next_year", "young")
    )
    for leftover in (old, of_next_year, young):
        leftover.write_bytes(b"half")
    two_hours_ago, next_year = time.time() - 7200, time.time() + 365 * 86400
    os.utime(old, (two_hours_ago, two_hours_ago))
    os.utime(of_next_year, (next_year, next_year))
    folder.prepare()
    assert not old.exists()
    assert not of_next_year.exists()
    assert young.exists()
    assert keys(folder) == []


COUNT_UP = """
import sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/contract"]
from shared.adapters.folder.store import FolderObjectStore
from test_object_store import count_up
count_up(FolderObjectStore(Path(sys.argv[1])), 50)
"""


def test_folder_loses_no_replacement_between_processes(
    folder: FolderObjectStore, tmp_path: Path
) -> None:
    folder.create("counter", b"0", TEXT)
    with (
        child(COUNT_UP, str(tmp_path / "bucket")) as one,
        child(COUNT_UP, str(tmp_path / "bucket")) as two,
    ):
        assert (one.wait(60), two.wait(60)) == (0, 0)
    assert folder.get("counter").data == b"100"


def test_folder_puts_into_a_folder_that_is_being_removed(folder: FolderObjectStore) -> None:
    def putting(name: str) -> str:
        for _ in range(100):
            put(folder, f"a/b/{name}", b"x")
            folder.delete([f"a/b/{name}"])
        return "done"

    assert at_once([partial(putting, name) for name in "1234"]) == {"done": 4}


def test_folder_leaves_no_empty_folder_behind(folder: FolderObjectStore, tmp_path: Path) -> None:
    put(folder, "a/b/c", b"x")
    put(folder, "a/d", b"x")
    folder.delete(["a/b/c"])
    assert os.listdir(tmp_path / "bucket" / "a") == ["d"]
    put(folder, "a/e/f/g", b"x")
    folder.delete(["a/d", "a/e/f/g"])
    assert not (tmp_path / "bucket" / "a").exists()


def test_folder_refuses_a_key_below_an_object(folder: FolderObjectStore) -> None:
    put(folder, "a", b"x")
    with pytest.raises(StoreRefused, match="is a prefix of this one"):
        put(folder, "a/b/c", b"y")
    with pytest.raises(StoreRefused, match="is a prefix of this one"):
        put(folder, "a/b", b"y")


def test_folder_is_past_its_watermark_when_too_little_is_free(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    roomy, tight = (
        FolderObjectStore(tmp_path / "bucket", min_free_bytes=least) for least in (0, free * 2)
    )
    for store in (roomy, tight):
        store.prepare()

    roomy.check_room()
    with pytest.raises(StoreFull, match=f"STOWGATE_MIN_FREE_BYTES, which is {free * 2}"):
        tight.check_room()


def test_folder_on_a_full_disk_is_store_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mebibytes=4) as disk:
        store = FolderObjectStore(disk / "bucket", min_free_bytes=MIB)
        store.prepare()
        put(store, "first", bytes(3 * MIB))
        with pytest.raises(StoreFull, match="free some space"):
            put(store, "second", bytes(2 * MIB))
        with pytest.raises(StoreFull):
            store.create("third", bytes(2 * MIB), TEXT)
        assert keys(store) == ["first"]
        assert os.listdir(disk / "bucket" / ".tmp") == []
        store.check_room()
        put(store, "fourth", bytes(MIB // 2))
        with pytest.raises(StoreFull):
            store.check_room()


def test_folder_passes_on_the_failure_of_a_stream(
    folder: FolderObjectStore,
) -> None:
    class NoSpace(RawIOBase):
        def read(self, _size: int = -1) -> bytes:
            raise OSError(errno.ENOSPC, "the spool is full")

    with pytest.raises(OSError, match="the spool is full"):
        folder.put("key", cast("BinaryIO", NoSpace()), 5, TEXT)


def test_minio_keeps_the_content_type(
    minio: MinioObjectStore, object_store_endpoint: ObjectStoreEndpoint, bucket: str
) -> None:
    minio.put("put", BytesIO(b"x"), 1, "application/dicom")
    minio.create("created", b"x", "application/json")
    client = object_store_client(object_store_endpoint)
    types = [
        client.stat_object(bucket_name=bucket, object_name=key).content_type
        for key in ("put", "created")
    ]
    assert types == ["application/dicom", "application/json"]


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


def test_minio_that_is_not_running_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:  # bound, not listening: reserves the port
        taken.bind(("127.0.0.1", 0))
        endpoint = ObjectStoreEndpoint(
            f"http://127.0.0.1:{taken.getsockname()[1]}", "access", "secret"
        )
        for call in every_call(minio_store(endpoint, "bucket")):
            with pytest.raises(StoreUnavailable, match="STOWGATE_OBJECT_STORE") as caught:
                call()
            assert "X-Amz" not in "".join(map(str, chain_of(caught.value)))
    assert "X-Amz" not in caplog.text


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """The text of a traceback."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_minio_that_is_not_running_fails_a_writing_before_it_is_finished() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        store = minio_store(
            ObjectStoreEndpoint(f"http://127.0.0.1:{taken.getsockname()[1]}", "access", "secret"),
            "bucket",
        )
        writing = store.begin("key", BytesIO(bytes(80 * MIB)), TEXT, 1 << 30)
        writing.proceed(80 * MIB)
        wait_for(lambda: writing.has_failed)
        with pytest.raises(StoreUnavailable, match="is it running"):
            writing.finish(80 * MIB)


def test_minio_keeps_no_parts_of_an_abandoned_object(
    minio: MinioObjectStore, object_store_endpoint: ObjectStoreEndpoint, bucket: str
) -> None:
    writing = minio.begin("key", BytesIO(bytes(20 * MIB)), TEXT, 1 << 30)
    writing.proceed(20 * MIB)
    writing.abandon()

    client = object_store_client(object_store_endpoint)
    found = client._list_multipart_uploads(bucket_name=bucket, prefix="key")
    assert found.uploads == []


def test_minio_refuses_a_wrong_secret(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str
) -> None:
    wrong = ObjectStoreEndpoint(
        object_store_endpoint.url, object_store_endpoint.access_key, "not-the-secret"
    )
    for call in every_call(minio_store(wrong, bucket)):
        with pytest.raises(StoreRefused, match="STOWGATE_OBJECT_STORE_SECRET_KEY") as caught:
            call()
        assert "not-the-secret" not in str(caught.value)


@contextlib.contextmanager
def store_of(handler: type[Answering]) -> Iterator[MinioObjectStore]:
    """A store with this server."""
    with serving(handler) as url:
        yield minio_store(ObjectStoreEndpoint(url, "access", "secret"), "bucket")


def s3_error(code: str, message: str = "no") -> str:
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (507, s3_error("XMinioStorageFull"), StoreFull),
        (507, s3_error("Other"), StoreFull),
        (400, s3_error("XMinioAdminBucketQuotaExceeded"), StoreFull),
        (403, s3_error("QuotaExceeded"), StoreFull),
        (500, s3_error("InternalError", "cause(no space left on device)"), StoreFull),
        (500, s3_error("InternalError"), StoreUnavailable),
        (503, s3_error("SlowDown"), StoreUnavailable),
        (400, s3_error("RequestTimeout"), StoreUnavailable),
        (499, s3_error("ClientDisconnected"), StoreUnavailable),
        (403, s3_error("AccessDenied"), StoreRefused),
        (404, s3_error("NoSuchBucket"), StoreRefused),
        (403, s3_error("RequestTimeTooSkewed"), StoreRefused),
        (502, "<html>Bad gateway<br>", StoreUnavailable),
        (502, "<html>Zugriff ungültig", StoreUnavailable),
        (200, "<html>Please log in", StoreUnavailable),
        (200, "", None),
    ],
)
def test_minio_translates_the_errors_of_the_store(
    status: int, body: str, expected: type[StowgateError] | None
) -> None:
    class Answer(Answering):
        def do_PUT(self) -> None:
            self.received()
            said = (
                {"Content_Type": "text/html"}
                if "html" in body
                else {"Content_Type": XML, "ETag": '"etag"'}
            )
            self.answer(status, body.encode("latin-1"), Retry_After="3600", **said)

    with store_of(Answer) as store:
        for call in (lambda: put(store, "key", b"x"), lambda: store.create("key", b"x", TEXT)):
            if expected is None:
                call()
            else:
                with pytest.raises(expected):
                    call()
        with pytest.raises(StoreFull) if expected is StoreFull else contextlib.nullcontext():
            store.check_room()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("SlowDown", StoreUnavailable),
        ("ClientDisconnected", StoreUnavailable),
        ("InternalError", StoreUnavailable),
        ("AccessDenied", StoreRefused),
        ("MethodNotAllowed", StoreRefused),
        ("NoSuchKey", None),
    ],
)
def test_minio_translates_the_error_of_one_of_many_deletions(
    code: str, expected: type[StowgateError] | None
) -> None:
    class OneStays(Answering):
        def do_POST(self) -> None:
            self.received()
            one = f"<Error><Key>b</Key><Code>{code}</Code><Message>no</Message></Error>"
            body = f"<DeleteResult>{one}</DeleteResult>".encode()
            self.answer(200, body, Content_Type=XML)

    with store_of(OneStays) as store:
        if expected is None:
            store.delete(["a", "b"])
        else:
            with pytest.raises(expected, match=f"cannot delete b: {code}"):
                store.delete(["a", "b"])


def test_minio_reports_a_listing_that_is_not_s3_as_an_unavailable_store() -> None:
    class Page(Answering):
        def do_GET(self) -> None:
            self.answer(200, b"<html><body>Please log in</body></html>", Content_Type=XML)

    with store_of(Page) as store:
        for listing in (store.list("pending/"), store.folders("")):
            with pytest.raises(StoreUnavailable, match="not from an S3 store"):
                next(listing)


@pytest.mark.parametrize(
    ("status", "body"), [(200, "<html>Please log in"), (502, "<html>Zugriff ungültig")]
)
def test_minio_abandons_without_error_an_upload_that_never_began(status: int, body: str) -> None:
    deleted: list[str] = []

    class Page(Answering):
        def do_POST(self) -> None:
            self.answer(status, body.encode("latin-1"), Content_Type="text/html")

        def do_DELETE(self) -> None:
            deleted.append(self.path)
            self.answer(204)

    with store_of(Page) as store:
        writing = store.begin("key", BytesIO(bytes(20 * MIB)), TEXT, 1 << 30)
        writing.proceed(20 * MIB)
        writing.abandon()

    assert deleted == []


def test_minio_that_is_full_is_reported_although_it_has_dropped_the_upload() -> None:
    class FullInTheMiddle(Answering):
        def do_POST(self) -> None:
            ids = "<Bucket>bucket</Bucket><Key>key</Key><UploadId>one</UploadId>"
            begun = f"<InitiateMultipartUploadResult>{ids}</InitiateMultipartUploadResult>"
            self.answer(200, begun.encode(), Content_Type=XML)

        def do_PUT(self) -> None:
            self.received()
            if "partNumber=2&" in self.path:
                self.answer(507, s3_error("XMinioStorageFull").encode(), Content_Type=XML)
                dropped.set()
            else:
                dropped.wait(10)
                self.do_DELETE()

        def do_DELETE(self) -> None:
            self.answer(404, s3_error("NoSuchUpload").encode(), Content_Type=XML)

    dropped = threading.Event()
    with store_of(FullInTheMiddle) as store, pytest.raises(StoreFull):
        put(store, "key", bytes(20 << 20))


@pytest.mark.parametrize("part", ["status line", "headers", "body"])
def test_minio_aborts_an_answer_that_arrives_too_slowly(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr("shared.adapters.s3.connections._TRICKLE_SECONDS", 0.5)
    gone = threading.Event()

    class Trickling(Answering):
        def do_GET(self) -> None:
            told = {
                "status line": b"",
                "headers": b"HTTP/1.1 200 OK\r\nETag: ",
                "body": b'HTTP/1.1 200 OK\r\nETag: "etag"\r\nContent-Length: 9999999\r\n\r\n',
            }
            self.wfile.write(told[part])
            with contextlib.suppress(OSError):
                while not gone.wait(0.05):
                    self.wfile.write(b"H")

    with store_of(Trickling) as store:
        with pytest.raises(StoreUnavailable, match=r"too slow: .* check its health"):
            store.get("key")
        gone.set()


def test_minio_aborts_a_body_that_is_accepted_too_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shared.adapters.s3.connections._TRICKLE_SECONDS", 0.5)
    monkeypatch.setattr("shared.adapters.s3.connections._MIN_BYTES_PER_SECOND", 1 << 30)
    gone = threading.Event()

    class Sipping(Answering):
        def do_PUT(self) -> None:
            while not gone.wait(0.01) and self.connection.recv(4096):
                pass

    with store_of(Sipping) as store:
        with pytest.raises(StoreUnavailable, match="too slow"):
            put(store, "key", bytes(8 * MIB))
        gone.set()


def test_minio_waits_for_a_slow_answer_that_makes_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer arrives in pieces, with pauses."""
    monkeypatch.setattr("shared.adapters.s3.connections._SILENT_SECONDS", 0.5)
    answer = b'HTTP/1.1 200 OK\r\nETag: "etag"\r\nContent-Length: 5\r\n\r\nbytes'

    class Slow(Answering):
        def do_GET(self) -> None:
            for piece in (answer[start : start + 8] for start in range(0, len(answer), 8)):
                self.wfile.write(piece)
                time.sleep(0.1)

    with store_of(Slow) as store:
        assert store.get("key").data == b"bytes"


def test_connections_to_minio_send_keepalives(
    object_store_endpoint: ObjectStoreEndpoint,
) -> None:
    pool = ProgressPool()
    answer = pool.request("GET", object_store_endpoint.url, preload_content=False)
    connection = answer.connection
    assert isinstance(connection, HTTPConnection)
    for level, option, least in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    ):
        assert connection.sock.getsockopt(level, option) == least
    answer.close()
    pool.clear()


def test_minio_counts_progress_through_tls_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shared.adapters.s3.connections._TRICKLE_SECONDS", 0.5)
    monkeypatch.setattr("shared.adapters.s3.connections._TICK_SECONDS", 0.1)
    gone, received = threading.Event(), bytearray()

    class Late(Answering):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            time.sleep(0.3)
            received.extend(self.received())
            time.sleep(0.3)
            self.answer(200, ETag='"etag"')

        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            with contextlib.suppress(OSError):
                while not gone.wait(0.05):
                    self.wfile.write(b"H")

    made = certificates(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made.certificate, made.key)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.authority))
    with serving(Late, tls) as url:
        store = minio_store(ObjectStoreEndpoint(url, "access", "secret"), "bucket")
        put(store, "key", generated(0, 8 * MIB))
        assert received == generated(0, 8 * MIB)
        with pytest.raises(StoreUnavailable, match="too slow"):
            store.get("key")
        gone.set()


@pytest.fixture
def deaf_endpoint(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[ObjectStoreEndpoint]:
    """Forwards each request to the real store, and drops the answer."""
    real = urlsplit(object_store_endpoint.url)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:  # closed
                return
            with near, socket.create_connection((real.hostname or "", real.port or 80)) as far:
                threading.Thread(target=pump, args=(near, far), daemon=True).start()
                far.recv(1)
                near.shutdown(socket.SHUT_RDWR)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,), daemon=True)
        server.start()
        yield ObjectStoreEndpoint(
            f"http://127.0.0.1:{listener.getsockname()[1]}",
            object_store_endpoint.access_key,
            object_store_endpoint.secret_key,
        )
        listener.shutdown(socket.SHUT_RDWR)
    server.join()


def test_minio_reports_a_conditional_write_with_unknown_result_as_unavailable(
    minio: MinioObjectStore, deaf_endpoint: ObjectStoreEndpoint, bucket: str
) -> None:
    with pytest.raises(StoreUnavailable):
        minio_store(deaf_endpoint, bucket).create("key", b"written", TEXT)
    assert minio.get("key").data == b"written"


Meddle = Callable[[Forwarding, bytes], None]


@contextlib.contextmanager
def through(endpoint: ObjectStoreEndpoint, bucket: str, meddle: Meddle) -> Iterator[ObjectStore]:
    """The store behind a proxy that passes each PUT to `meddle`."""

    class Proxy(Forwarding):
        upstream = urlsplit(endpoint.url).netloc

        def meddle(self, body: bytes) -> None:
            if self.command == "PUT":
                meddle(self, body)
            else:
                super().meddle(body)

    with serving(Proxy) as url:
        yield minio_store(
            ObjectStoreEndpoint(url, endpoint.access_key, endpoint.secret_key), bucket
        )


def once(meddle: Meddle) -> Meddle:
    """Treats the first request in this way, and forwards all others."""
    todo = [meddle]

    def dealt_with(request: Forwarding, body: bytes) -> None:
        if todo:
            todo.pop()(request, body)
        else:
            request.relay(*request.ask(body))

    return dealt_with


def refuse(status: int, code: str) -> Meddle:
    return lambda request, _: request.refuse(status, code)


def write_and_refuse(request: Forwarding, body: bytes) -> None:
    request.ask(body)
    request.refuse(500, "InternalError")


def write_and_hang_up(request: Forwarding, body: bytes) -> None:
    request.ask(body)
    request.hang_up()


def hang_up(request: Forwarding, _: bytes) -> None:
    request.hang_up()


MISHAPS = {
    "slow down": refuse(503, "SlowDown"),
    "conflict": refuse(409, "ConditionalRequestConflict"),
    "lost on the way": hang_up,
    "answer lost": write_and_hang_up,
    "written and refused": write_and_refuse,
}


@pytest.mark.parametrize("mishap", MISHAPS.values(), ids=MISHAPS)
def test_minio_writes_once_after_a_failed_first_attempt(
    object_store_endpoint: ObjectStoreEndpoint,
    bucket: str,
    minio: MinioObjectStore,
    mishap: Meddle,
) -> None:
    with through(object_store_endpoint, bucket, once(mishap)) as store:
        first = store.create("key", b"1", TEXT)
    assert minio.get("key") == StoredObject(b"1", first)
    with through(object_store_endpoint, bucket, once(mishap)) as store:
        second = store.replace("key", b"2", first, TEXT)
    assert minio.get("key") == StoredObject(b"2", second)


@pytest.mark.parametrize("mishap", MISHAPS.values(), ids=MISHAPS)
def test_minio_distinguishes_its_write_from_an_identical_one(
    object_store_endpoint: ObjectStoreEndpoint,
    bucket: str,
    minio: MinioObjectStore,
    mishap: Meddle,
) -> None:
    """Of two identical writes, one counts, whatever the result of the other request."""

    def beaten(request: Forwarding, body: bytes) -> None:
        write(minio)
        mishap(request, body)

    for version in (None, minio.create("replaced", b"0", TEXT)):

        def write(store: ObjectStore, version: str | None = version) -> str:
            if version is None:
                return store.create("created", b"same", TEXT)
            return store.replace("replaced", b"same", version, TEXT)

        with (
            through(object_store_endpoint, bucket, once(beaten)) as store,
            pytest.raises(VersionConflict),
        ):
            write(store)


@pytest.mark.parametrize("first_is_written", [True, False])
def test_minio_does_not_count_a_write_in_transit_as_written(
    object_store_endpoint: ObjectStoreEndpoint,
    bucket: str,
    minio: MinioObjectStore,
    first_is_written: bool,
) -> None:
    """S3 answers 409 to the second of two concurrent conditional writes."""
    first_arrived, first_may_go_on, conflicts = threading.Event(), threading.Event(), Counter[str]()

    def in_flight(request: Forwarding, body: bytes) -> None:
        if not first_arrived.is_set():
            first_arrived.set()
            first_may_go_on.wait(30)
            if first_is_written:
                request.relay(*request.ask(body))
            else:
                request.refuse(403, "AccessDenied")
        elif not first_may_go_on.is_set():
            conflicts["409"] += 1
            if conflicts["409"] == 3:
                first_may_go_on.set()
            request.refuse(409, "ConditionalRequestConflict")
        else:
            request.relay(*request.ask(body))

    def second(store: ObjectStore) -> str:
        first_arrived.wait(30)
        store.create("key", b"second", TEXT)
        return "second"

    def first(store: ObjectStore) -> str:
        store.create("key", b"first", TEXT)
        return "first"

    with through(object_store_endpoint, bucket, in_flight) as store:
        outcomes = at_once([partial(first, store), partial(second, store)])

    assert conflicts["409"] == 3
    if first_is_written:
        assert outcomes == {"first": 1, "VersionConflict": 1}
        assert minio.get("key").data == b"first"
    else:
        assert outcomes == {"StoreRefused": 1, "second": 1}
        assert minio.get("key").data == b"second"


@pytest.mark.parametrize(
    ("status", "code"), [(409, "ConditionalRequestConflict"), (503, "SlowDown")]
)
def test_minio_ends_a_conditional_write_that_is_refused_repeatedly(
    object_store_endpoint: ObjectStoreEndpoint,
    bucket: str,
    minio: MinioObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
) -> None:
    monkeypatch.setattr("shared.adapters.s3.store._TRY_AGAIN_SECONDS", 0.5)
    with (
        through(object_store_endpoint, bucket, refuse(status, code)) as store,
        pytest.raises(StoreUnavailable, match=code),
    ):
        store.create("key", b"x", TEXT)
    assert keys(minio) == []


def test_minio_reports_a_conflict_if_its_write_was_overwritten(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str, minio: MinioObjectStore
) -> None:
    def overtaken(request: Forwarding, body: bytes) -> None:
        request.ask(body)
        minio.replace("key", b"3", minio.get("key").version, TEXT)
        request.hang_up()

    first = minio.create("key", b"1", TEXT)
    with (
        through(object_store_endpoint, bucket, once(overtaken)) as store,
        pytest.raises(VersionConflict),
    ):
        store.replace("key", b"2", first, TEXT)
    assert minio.get("key").data == b"3"


@pytest.fixture
def locked_bucket(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    """A bucket with object lock, which keeps every version for a day."""
    if os.environ.get(OBJECT_STORE_VARIABLE) == VERSITYGW:
        pytest.skip("its buckets with versions are refused, see test_store_conformance.py")
    client, name = object_store_client(object_store_endpoint), f"locked-{secrets.token_hex(8)}"
    client.make_bucket(bucket_name=name, object_lock=True)
    client.set_object_lock_config(bucket_name=name, config=ObjectLockConfig(GOVERNANCE, 1, DAYS))
    yield name
    versions = client.list_objects(bucket_name=name, recursive=True, include_version=True)
    doomed = [DeleteObject(str(found.object_name), found.version_id) for found in versions]
    assert not list(
        client.remove_objects(
            bucket_name=name, delete_object_list=doomed, bypass_governance_mode=True
        )
    )
    client.remove_bucket(bucket_name=name)


def test_minio_writes_to_a_bucket_with_object_lock(
    object_store_endpoint: ObjectStoreEndpoint, locked_bucket: str
) -> None:
    """Requires digests like AWS; the real store behind it verifies them."""
    refused = Counter[str]()

    def want_md5(request: Forwarding, body: bytes) -> None:
        if "Content-MD5" in request.headers:
            request.relay(*request.ask(body))
        else:
            refused[request.path] += 1
            request.refuse(
                400,
                "InvalidRequest",
                "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests "
                "with Object Lock parameters",
            )

    large = generated(0, 17 * MIB)
    with through(object_store_endpoint, locked_bucket, want_md5) as store:
        writes: list[Callable[[], object]] = [
            lambda: put(store, "put", b"1"),
            lambda: put_growing(store, "large", large),
            lambda: store.create("created", b"2", TEXT),
        ]
        with ThreadPoolExecutor(len(writes)) as threads:
            for written in [threads.submit(write) for write in writes]:
                written.result()
        count = sum(refused.values())
        store.replace("created", b"3", store.get("created").version, TEXT)
        put_growing(store, "large", large)
        assert store.get("put").data == b"1"
        assert store.get("created").data == b"3"
        assert store.read_range("large", 0, 20 * MIB) == large
        assert sum(refused.values()) == count
        store.delete(["put", "created"])
        store.create("created", b"4", TEXT)
        assert keys(store) == ["created", "large"]


def test_an_upload_is_not_given_up_while_its_record_is_in_transit(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str, minio: MinioObjectStore
) -> None:
    late = record()

    def in_flight(request: Forwarding, _: bytes) -> None:
        Records(minio).add(late)
        request.refuse(409, "ConditionalRequestConflict")

    with through(object_store_endpoint, bucket, once(in_flight)) as store:
        assert not Records(store).give_up(late.payload_id)

    with through(
        object_store_endpoint, bucket, once(refuse(409, "ConditionalRequestConflict"))
    ) as store:
        other = record()
        assert Records(store).give_up(other.payload_id)
    with pytest.raises(UploadGivenUp):
        Records(minio).add(other)


def test_folders_are_the_distinct_first_names_of_keys_in_order(store: ObjectStore) -> None:
    for key in ("0b/1", "0a/x/1", "0a/x/2", "0a/y", "0c/1", "top"):
        put(store, key, b"x")

    assert list(store.folders("")) == ["0a", "0b", "0c"]
    assert list(store.folders("0a")) == ["0b", "0c"]
    assert list(store.folders("0az")) == ["0b", "0c"]
    assert list(store.folders("0c")) == []


def test_an_empty_bucket_has_no_folders(store: ObjectStore) -> None:
    assert list(store.folders("")) == []
