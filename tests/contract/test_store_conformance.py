"""A store that does not keep what leases and records stand on is refused before it is used."""

import re
import secrets
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
from answering import Answering, Forwarding, serving
from engines import ObjectStoreEndpoint
from service import STOWGATE, environment
from versioning import make_versioned, versioned

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.s3.conformance import PROBES, check_payload_bucket, check_state_bucket
from shared.adapters.s3.store import MinioObjectStore
from shared.adapters.s3.verified_store import PASSED, Verification, VerifiedObjectStore
from shared.errors import StoreRefused, StoreUnavailable, StoreUnfit, StowgateError
from shared.ports import ObjectStore


def connect(url: str, bucket: str, endpoint: ObjectStoreEndpoint | None = None) -> MinioObjectStore:
    return MinioObjectStore.connect(
        url,
        access_key=endpoint.access_key if endpoint else "access",
        secret_key=endpoint.secret_key if endpoint else "secret",
        region="us-east-1",
        bucket=bucket,
        threads=8,
    )


class OwnS3(Answering):
    """One bucket in memory that keeps conditional writes, unless a subclass does not."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]]
    lock: ClassVar[Any]

    def do_HEAD(self) -> None:
        self.answer(200)

    def do_GET(self) -> None:
        data = self.objects.get(urlsplit(self.path).path)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if data is None:
            self.refuse(404, "NoSuchKey")
        elif found and int(found[1]) >= len(data):
            self.refuse(416, "InvalidRange")
        else:
            part = data[int(found[1]) : int(found[2]) + 1] if found else data
            self.answer(206 if found else 200, part, ETag=self.etag(data))

    def do_PUT(self) -> None:
        body = self.received()
        with self.lock:
            if self.allows(self.objects.get(self.path)):
                self.objects[self.path] = body
                self.answer(200, ETag=self.etag(body))
            else:
                self.refuse(412, "PreconditionFailed")

    def do_POST(self) -> None:
        self.received()
        self.refuse(501, "NotImplemented")

    def allows(self, found: bytes | None) -> bool:
        if "If-None-Match" in self.headers:
            return found is None
        wanted = self.headers.get("If-Match")
        return wanted is None or (found is not None and wanted == self.etag(found))

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.answer(status, body, Content_Type="application/xml")

    @staticmethod
    def etag(data: bytes) -> str:
        return f'"{hash(data):x}"'


class IgnoresIfNoneMatch(OwnS3):
    def allows(self, found: bytes | None) -> bool:
        return "If-None-Match" in self.headers or super().allows(found)


class IgnoresIfMatch(OwnS3):
    def allows(self, found: bytes | None) -> bool:
        return "If-Match" in self.headers or super().allows(found)


class ChecksAndWritesInTwoSteps(OwnS3):
    def do_PUT(self) -> None:
        body = self.received()
        allowed = self.allows(self.objects.get(self.path))
        time.sleep(0.005)  # what this store needs to write
        if allowed:
            self.objects[self.path] = body
            self.answer(200, ETag=self.etag(body))
        else:
            self.refuse(412, "PreconditionFailed")


class KnowsNoConditions(OwnS3):
    def do_PUT(self) -> None:
        if "If-None-Match" in self.headers:
            self.received()
            self.refuse(501, "NotImplemented")
        else:
            super().do_PUT()


class RacesEndInAnError(OwnS3):
    """It keeps conditions, and refuses in another way than S3 those who come together."""

    def do_PUT(self) -> None:
        if "/race/" in self.path and "If-None-Match" in self.headers:
            self.received()
            self.refuse(400, "InvalidRequest")
        else:
            super().do_PUT()


class WritesWhatLost(OwnS3):
    """Its answers are right, and what it keeps is not."""

    def do_PUT(self) -> None:
        body = self.received()
        with self.lock:
            allowed = self.allows(self.objects.get(self.path))
            if allowed or "/race/" in self.path:
                self.objects[self.path] = body
            if allowed:
                self.answer(200, ETag=self.etag(body))
            else:
                self.refuse(412, "PreconditionFailed")


@contextmanager
def own_s3(kind: type[OwnS3]) -> Iterator[str]:
    members: dict[str, Any] = {"objects": {}, "lock": threading.Lock()}
    with serving(type(kind.__name__, (kind,), members)) as url:
        yield url


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (IgnoresIfNoneMatch, r"If-None-Match: \* succeeded although"),
        (IgnoresIfMatch, "If-Match succeeded although"),
        (ChecksAndWritesInTwoSteps, r"of 16 concurrent writers .* succeeded instead of one"),
        (KnowsNoConditions, "NotImplemented, no, HTTP 501"),
        (RacesEndInAnError, r"neither success .* 16 HTTP 400 InvalidRequest"),
        (WritesWhatLost, r"the object, of 16 concurrent writers"),
    ],
)
def test_a_store_that_breaks_conditional_writes_is_refused_with_the_reason(
    kind: type[OwnS3], words: str
) -> None:
    with own_s3(kind) as url, pytest.raises(StoreUnfit, match=words) as caught:
        check_state_bucket(connect(url, "bucket"))
    assert "docs/object-stores.md" in str(caught.value)


def conforms(store: ObjectStore) -> None:
    store.prepare()
    check_state_bucket(store)
    check_payload_bucket(store)
    assert list(store.list("")) == []


def test_a_folder_conforms(tmp_path: Path) -> None:
    conforms(FolderObjectStore(tmp_path))


def test_the_object_store_conforms(object_store_endpoint: ObjectStoreEndpoint, bucket: str) -> None:
    conforms(connect(object_store_endpoint.url, bucket, object_store_endpoint))


def test_the_second_object_store_conforms(
    second_object_store_endpoint: ObjectStoreEndpoint, bucket_of_second_store: str
) -> None:
    endpoint = second_object_store_endpoint
    conforms(connect(endpoint.url, bucket_of_second_store, endpoint))


def test_a_bucket_of_minio_that_keeps_versions_conforms(
    object_store_endpoint: ObjectStoreEndpoint,
) -> None:
    with versioned(object_store_endpoint) as bucket:
        conforms(connect(object_store_endpoint.url, bucket, object_store_endpoint))


def test_a_bucket_of_versitygw_that_keeps_versions_is_refused(
    second_object_store_endpoint: ObjectStoreEndpoint,
) -> None:
    """It takes the marker that a deletion leaves for an object."""
    # minio-py cannot read its list of versions, so the bucket goes when its store goes.
    endpoint = second_object_store_endpoint
    bucket = make_versioned(endpoint)
    with pytest.raises(StoreUnfit, match="use one that keeps none"):
        conforms(connect(endpoint.url, bucket, endpoint))


Meddle = Callable[[Forwarding, bytes], bool]


@contextmanager
def altered(
    endpoint: ObjectStoreEndpoint, bucket: str, meddle: Meddle, server: str = ""
) -> Iterator[MinioObjectStore]:
    """The real store behind a proxy; `meddle` answers some requests, and says which."""

    class Proxy(Forwarding):
        upstream = urlsplit(endpoint.url).netloc

        def meddle(self, body: bytes) -> None:
            if not meddle(self, body):
                status, headers, answer = self.ask(body)
                self.relay(status, headers | ({"Server": server} if server else {}), answer)

    with serving(Proxy) as url:
        store = connect(url, bucket, endpoint)
        store.prepare()
        yield store


def other_etag_each_time(request: Forwarding, body: bytes) -> bool:
    if request.command != "GET":
        return False
    status, headers, answer = request.ask(body)
    request.relay(status, headers | {"ETag": f'"{secrets.token_hex(16)}"'}, answer)
    return True


def no_ranges(request: Forwarding, _: bytes) -> bool:
    if "Range" in request.headers and request.path.endswith("/read"):
        request.relay(200, {"ETag": '"x"'}, b"0123456789")
        return True
    return False


def backward_listing(request: Forwarding, body: bytes) -> bool:
    if "list-type=2" not in request.path:
        return False
    status, headers, answer = request.ask(body)
    found = re.findall(rb"<Contents>.*?</Contents>", answer, re.DOTALL)
    if found:
        begin = answer.index(found[0])
        end = answer.index(found[-1]) + len(found[-1])
        answer = answer[:begin] + b"".join(reversed(found)) + answer[end:]
    request.relay(status, headers, answer)
    return True


def deletes_nothing(request: Forwarding, _: bytes) -> bool:
    if request.command == "POST" and request.path.endswith("?delete="):
        request.relay(200, {"Content-Type": "application/xml"}, b"<DeleteResult></DeleteResult>")
        return True
    return False


def shows_what_is_not_finished(request: Forwarding, _: bytes) -> bool:
    if request.command == "GET" and request.path.endswith("/multipart"):
        request.relay(206, {"ETag": '"x"'}, b"\0")
        return True
    return False


@pytest.mark.parametrize(
    ("meddle", "words"),
    [
        (other_etag_each_time, "the ETag of an object"),
        (no_ranges, "a range of 3 bytes from 2"),
        (backward_listing, "a listing in the byte order of the keys"),
        (deletes_nothing, "a deleted object still exists"),
        (shows_what_is_not_finished, "visible before its multipart upload ended"),
    ],
)
def test_a_store_that_reads_lists_or_deletes_incorrectly_is_refused(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str, meddle: Meddle, words: str
) -> None:
    with (
        altered(object_store_endpoint, bucket, meddle) as store,
        pytest.raises(StoreUnfit, match=words),
    ):
        check_payload_bucket(store)


def test_a_busy_store_may_ask_writers_to_retry(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str
) -> None:
    """As S3 does with conditional writes at the same time (409) and under load (503)."""
    counts = Counter[str]()

    def busy(request: Forwarding, _: bytes) -> bool:
        if request.command != "PUT" or "/race/" not in request.path:
            return False
        counts[request.path] += 1
        again = [(409, "ConditionalRequestConflict"), (503, "SlowDown")]
        if counts[request.path] > len(again):
            return False
        request.refuse(*again[counts[request.path] - 1])
        return True

    with altered(object_store_endpoint, bucket, busy) as store:
        check_state_bucket(store)


def test_missing_permissions_are_not_reported_as_an_unfit_store(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str
) -> None:
    def read_only(request: Forwarding, _: bytes) -> bool:
        if request.command == "PUT" and f"/{PROBES}/" in request.path:
            request.refuse(403, "AccessDenied")
            return True
        return False

    with (
        altered(object_store_endpoint, bucket, read_only) as store,
        pytest.raises(StoreRefused, match="AccessDenied"),
    ):
        check_state_bucket(store)


def test_a_store_that_passed_is_checked_again_only_if_its_engine_changes(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str, second_bucket: str
) -> None:
    puts = Counter[str]()

    def count(request: Forwarding, _: bytes) -> bool:
        puts["all"] += request.command == "PUT" and f"/{PROBES}/" in request.path
        return False

    instances = connect(object_store_endpoint.url, second_bucket, object_store_endpoint)
    instances.prepare()
    with altered(object_store_endpoint, bucket, count, server="One/1.0") as state:
        Verification(instances=instances, state=state).run()
        checked = puts["all"]
        assert checked
        Verification(instances=instances, state=state).run()
        assert puts["all"] == checked
    with altered(object_store_endpoint, bucket, count, server="One/2.0") as state:
        Verification(instances=instances, state=state).run()
        assert puts["all"] == 2 * checked
        Verification(instances=instances, state=state).run()
        assert puts["all"] == 2 * checked
        state.put(PASSED, BytesIO(b"{"), 1, "application/json")
        Verification(instances=instances, state=state).run()
        assert puts["all"] == 3 * checked + 1


def test_nothing_is_stored_before_the_store_is_verified(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str
) -> None:
    raw = connect(object_store_endpoint.url, bucket, object_store_endpoint)
    raw.prepare()
    verification = Verification(instances=raw, state=raw)
    store = VerifiedObjectStore(raw, verification)
    store.prepare()
    for call in (store.ping, store.check_room, lambda: store.create("key", b"x", "text/plain")):
        with pytest.raises(StoreUnavailable, match="not verified yet"):
            call()
    verification.run()
    store.create("key", b"x", "text/plain")


def test_an_unfit_store_stays_unused_and_reports_the_reason() -> None:
    with own_s3(ChecksAndWritesInTwoSteps) as url:
        raw = connect(url, "bucket")
        verification = Verification(instances=raw, state=raw)
        with pytest.raises(StoreUnfit, match=re.escape(url)):
            verification.run()
    with pytest.raises(StowgateError, match="instead of one"):
        VerifiedObjectStore(raw, verification).ping()


@pytest.mark.parametrize("command", ["run", "api", "worker", "check"])
def test_no_service_starts_on_a_store_on_which_several_writers_succeed(
    command: str, tmp_path: Path
) -> None:
    with own_s3(ChecksAndWritesInTwoSteps) as url:
        ended = subprocess.run(
            [STOWGATE, command],
            env=environment(
                tmp_path,
                {
                    "STOWGATE_OBJECT_STORE": url,
                    "STOWGATE_OBJECT_STORE_ACCESS_KEY": "access",
                    "STOWGATE_OBJECT_STORE_SECRET_KEY": "secret",
                },
            ),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode != 0
    (line,) = [
        line for line in (ended.stdout + ended.stderr).splitlines() if "instead of one" in line
    ]
    assert line.startswith("FAIL      bucket stowgate" if command == "check" else "stowgate: ")
    assert "Traceback" not in ended.stderr
