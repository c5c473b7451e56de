"""Errors, slow answers and connections of an S3 store."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path

import pytest
from answering import Answering, serving
from certificates import certificates
from engines import ObjectStoreEndpoint, object_store_client
from object_stores import MIB, TEXT, every_call, generated, minio_store, put
from service import wait_for

from shared.adapters.s3.connections import ProgressPool
from shared.adapters.s3.store import MinioObjectStore
from shared.errors import StoreFull, StoreRefused, StoreUnavailable, StowgateError

XML = "application/xml"


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
