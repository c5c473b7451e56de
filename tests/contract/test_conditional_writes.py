"""Conditional writes to an S3 store whose answers are lost, late or errors."""

import contextlib
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import pytest
from answering import Forwarding, serving
from engines import ObjectStoreEndpoint, object_store_client
from minio.commonconfig import GOVERNANCE
from minio.objectlockconfig import DAYS, ObjectLockConfig
from object_stores import MIB, TEXT, at_once, generated, keys, minio_store, put, put_growing
from records_made import record
from versioning import remove_versioned, require_versions

from shared.adapters.s3.store import MinioObjectStore
from shared.errors import StoreUnavailable, VersionConflict
from shared.ports import ObjectStore, StoredObject
from shared.record_store import Records, UploadGivenUp


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
    require_versions()
    client, name = object_store_client(object_store_endpoint), f"locked-{secrets.token_hex(8)}"
    client.make_bucket(bucket_name=name, object_lock=True)
    client.set_object_lock_config(bucket_name=name, config=ObjectLockConfig(GOVERNANCE, 1, DAYS))
    yield name
    remove_versioned(object_store_endpoint, name)


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
