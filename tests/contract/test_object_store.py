"""The contract of every object store, on the folder and on two real S3 stores."""

import contextlib
import errno
import hashlib
import os
import secrets
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import pytest
from engines import ObjectStoreEndpoint
from minio import MinioAdmin
from minio.credentials.providers import StaticProvider
from minio.error import MinioAdminException
from object_stores import (
    MIB,
    TEXT,
    Generated,
    at_once,
    count_up,
    generated,
    keys,
    minio_store,
    put,
    put_growing,
)

from shared.adapters.folder.store import FolderObjectStore
from shared.errors import ObjectMissing, StoreRefused, VersionConflict
from shared.ports import ObjectStore


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


def test_folders_are_the_distinct_first_names_of_keys_in_order(store: ObjectStore) -> None:
    for key in ("0b/1", "0a/x/1", "0a/x/2", "0a/y", "0c/1", "top"):
        put(store, key, b"x")

    assert list(store.folders("")) == ["0a", "0b", "0c"]
    assert list(store.folders("0a")) == ["0b", "0c"]
    assert list(store.folders("0az")) == ["0b", "0c"]
    assert list(store.folders("0c")) == []


def test_an_empty_bucket_has_no_folders(store: ObjectStore) -> None:
    assert list(store.folders("")) == []
