"""The object store on MinIO, or on any other that speaks plain S3."""

import base64
import hashlib
import io
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, BinaryIO, Self, cast
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, S3Error, ServerError
from urllib3.exceptions import HTTPError, MaxRetryError

from shared.errors import (
    ObjectMissing,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StowgateError,
    VersionConflict,
)
from shared.ports import ListedObject, StoredObject, check_key, check_prefix

_CONNECT_SECONDS = 4.0
_READ_SECONDS = 9.0
_RETRY_SECONDS = 2.0

# How long a store that said that it is full is believed to be.
_FULL_SECONDS = 5.0

_PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 10_000
_PIECE_BYTES = 256 * 1024

# As long as S3 takes a request signed in its headers, so that clocks may differ no less.
_PRESIGNED_FOR = timedelta(minutes=15)

_KEYS_HINT = (
    "look at STOWGATE_OBJECT_STORE_ACCESS_KEY and STOWGATE_OBJECT_STORE_SECRET_KEY, "
    "and at what they may do there"
)
_BUCKET_HINT = "create the bucket, or look at STOWGATE_BUCKET and STOWGATE_STATE_BUCKET"
_HINTS = {
    "AccessDenied": _KEYS_HINT,
    "InvalidAccessKeyId": _KEYS_HINT,
    "SignatureDoesNotMatch": _KEYS_HINT,
    "NoSuchBucket": _BUCKET_HINT,
    "InvalidBucketName": _BUCKET_HINT,
    "AuthorizationHeaderMalformed": "look at STOWGATE_OBJECT_STORE_REGION",
    "PermanentRedirect": "look at STOWGATE_OBJECT_STORE_REGION",
    "RequestTimeTooSkewed": "set the clocks of both machines",
}
_FULL_CODES = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded"}
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_PASSING_STATUSES = {408, 429}
_PRECONDITION_FAILED = 412
_INSUFFICIENT_STORAGE = 507


class MinioObjectStore:
    """One bucket of an S3 object store. Safe between threads; not to be taken through a fork.

    Every request ends within 15 s, whether the store is dead, black-holed or silent: 4 s to
    connect, 9 s for each answer, and no retry begun later than 2 s after the first attempt. A
    refused connection fails at once. `put` of more than 8 MiB, `delete` of more than 1000 keys and
    a long `list` take several requests, and a `put` that fails in the middle one more to clear up.
    A version is the object's ETag.
    """

    def __init__(self, client: Minio, pool: urllib3.PoolManager, bucket: str, place: str) -> None:
        """`pool` is the client's own; `place` is how error texts call the store."""
        self._client = client
        self._pool = pool
        self._bucket = bucket
        self._place = f"object store {place}, bucket {bucket}"
        self._full_until = -math.inf

    @classmethod
    def connect(
        cls, url: str, *, access_key: str, secret_key: str, region: str, bucket: str, threads: int
    ) -> Self:
        """A store for up to `threads` threads at once; sends nothing yet.

        `url` is `http(s)://host[:port]`.
        """
        pool = _BriefPool(
            maxsize=threads,
            blocksize=_PIECE_BYTES,
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
        )
        parts = urlsplit(url)
        client = Minio(
            endpoint=parts.netloc,
            access_key=access_key,
            secret_key=secret_key,
            secure=parts.scheme == "https",
            region=region,
            http_client=pool,
        )
        return cls(client, pool, bucket, url)

    def prepare(self) -> None:
        """Create the bucket where it is missing."""
        with self._typed("create the bucket"):
            if self._client.bucket_exists(bucket_name=self._bucket):
                return
            try:
                self._client.make_bucket(bucket_name=self._bucket)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise
        self.ping()

    def put(self, key: str, data: BinaryIO, size_bytes: int, content_type: str) -> None:
        """Write `size_bytes` from `data`, all or nothing, over what may be there.

        Goes in parts of 8 MiB (larger ones beyond 80 GB, as S3 takes 10,000), two of which are in
        memory at a time. Raises `ValueError` where `data` ends early; what `data` raises passes
        through.
        """
        check_key(key)
        with self._typed(f"put {key}"), _first_error():
            result = self._client.put_object(
                bucket_name=self._bucket,
                object_name=key,
                data=cast("BinaryIO", _Exactly(data, size_bytes)),
                length=size_bytes,
                content_type=content_type,
                part_size=max(_PART_BYTES, -(-size_bytes // _MAX_PARTS)),
                num_parallel_uploads=1,
            )
        if not result.etag:
            # S3 may answer CompleteMultipartUpload with 200 and an error in the body.
            raise StoreUnavailable(f"{self._place}: cannot put {key}: its parts were not joined")

    def create(self, key: str, data: bytes, content_type: str) -> str:
        """Write only where nothing is, and return the version. Raises `VersionConflict`.

        `StoreUnavailable` leaves open whether it was written.
        """
        return self._put_if({"If-None-Match": "*"}, key, data, content_type)

    def replace(self, key: str, data: bytes, version: str, content_type: str) -> str:
        """Write only over that version, and return the new one. Raises `VersionConflict`.

        `StoreUnavailable` leaves open whether it was written.
        """
        return self._put_if({"If-Match": f'"{version}"'}, key, data, content_type)

    def get(self, key: str) -> StoredObject:
        """Read a whole small object. Raises `ObjectMissing`."""
        data, etag = self._read(key, offset=0, length=0)
        return StoredObject(data, etag)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read `length` bytes from offset `start`, fewer at the end. Raises `ObjectMissing`."""
        if start < 0 or length < 0:
            raise ValueError(f"no such range: {length} bytes from {start}")
        try:
            # HTTP knows no empty range.
            data, _ = self._read(key, offset=start, length=max(length, 1))
        except _PastTheEnd:
            return b""
        return data[:length]

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        """Every object under `prefix` behind `after`, by key; asks for 1000 at a time."""
        check_prefix(prefix)
        return self._list(prefix, after)

    def folders(self, after: str) -> Iterator[str]:
        """The common prefixes at the top behind `after`, in order; asks for 1000 at a time."""
        with self._typed("list"):
            for found in self._client.list_objects(
                bucket_name=self._bucket, recursive=False, start_after=after or None
            ):
                name = (found.object_name or "").removesuffix("/")
                if found.is_dir and name > after:
                    yield name

    def delete(self, keys: Iterable[str]) -> None:
        """Remove these, 1000 a request; a key with nothing under it is no error."""
        with self._typed("delete"):
            failures = self._client.remove_objects(
                bucket_name=self._bucket, delete_object_list=_doomed(keys)
            )
            for failure in failures:
                if failure.code != "NoSuchKey":
                    raise self._error(f"delete {failure.name}", failure.code, failure.message)

    def has_room(self) -> bool:
        """False for 5 s after a write found the store full. S3 has no call that tells."""
        return time.monotonic() >= self._full_until

    def ping(self) -> None:
        """Return when the bucket can be reached with these keys."""
        with self._typed("reach the bucket"):
            if not self._client.bucket_exists(bucket_name=self._bucket):
                raise self._error("reach the bucket", "NoSuchBucket", "it does not exist")

    def _put_if(self, condition: dict[str, str], key: str, data: bytes, content_type: str) -> str:
        """PutObject with a condition, which minio-py's own `put_object` cannot send."""
        check_key(key)
        doing = f"put {key}"
        with self._typed(doing):
            url = self._client.get_presigned_url(
                method="PUT", bucket_name=self._bucket, object_name=key, expires=_PRESIGNED_FOR
            )
            digest = hashlib.md5(data, usedforsecurity=False).digest()
            headers = {
                "Content-Type": content_type,
                "Content-Length": str(len(data)),
                "Content-MD5": base64.b64encode(digest).decode(),
                **condition,
            }
            # Never twice: of two attempts the second would find the first one's object. Besides,
            # urllib3 logs the URL of what it tries again, and this one is as good as a password.
            response = self._pool.request("PUT", url, body=data, headers=headers, retries=False)
            if response.status in (200, 204):
                return response.headers["ETag"].strip('"')
            told = None if response.status == _PRECONDITION_FAILED else S3Error.fromxml(response)
        if told is None or told.code in ("NoSuchKey", "ConditionalRequestConflict"):
            raise VersionConflict(f"{self._place}: {key} is not what this write was to replace")
        raise self._error(doing, told.code or "", told.message, response.status)

    def _read(self, key: str, *, offset: int, length: int) -> tuple[bytes, str]:
        check_key(key)
        with self._typed(f"read {key}"):
            try:
                response = self._client.get_object(
                    bucket_name=self._bucket, object_name=key, offset=offset, length=length
                )
            except S3Error as error:
                if error.code == "NoSuchKey":
                    raise ObjectMissing(f"{self._place}: there is no {key}") from error
                if error.code == "InvalidRange":
                    raise _PastTheEnd(key) from error
                raise
            try:
                return response.read(), response.headers["ETag"].strip('"')
            finally:
                response.close()
                response.release_conn()

    def _list(self, prefix: str, after: str) -> Iterator[ListedObject]:
        with self._typed(f"list {prefix!r}"):
            for found in self._client.list_objects(
                bucket_name=self._bucket, prefix=prefix, recursive=True, start_after=after or None
            ):
                if found.object_name is None or found.last_modified is None:
                    continue  # a folder, which a recursive listing does not have
                yield ListedObject(found.object_name, found.size or 0, found.last_modified)

    @contextmanager
    def _typed(self, doing: str) -> Iterator[None]:
        try:
            yield
        except S3Error as error:
            status = error.response.status
            raise self._error(doing, error.code or "", error.message, status) from error
        except ServerError as error:
            raise self._error(doing, "", None, error.status_code) from error
        except (InvalidResponseError, ParseError) as error:
            raise StoreUnavailable(
                f"{self._place}: cannot {doing}: the answer is not S3's; is a proxy in between, or "
                "is STOWGATE_OBJECT_STORE another server or port?"
            ) from error
        except HTTPError as error:
            # The text of MaxRetryError has the URL in it, and that may be a presigned one.
            cause = error.reason if isinstance(error, MaxRetryError) else error
            raise StoreUnavailable(
                f"{self._place}: cannot {doing}: no answer ({type(cause).__name__}: {cause}); "
                "is it running, and is STOWGATE_OBJECT_STORE right?"
            ) from cause

    def _error(self, doing: str, code: str, message: str | None, status: int = 0) -> StowgateError:
        told = ", ".join(word for word in (code, message, f"HTTP {status}" * bool(status)) if word)
        what = f"{self._place}: cannot {doing}: {told}"
        # MinIO on a disk that is full to the last byte says InternalError and this.
        out_of_space = "no space left on device" in (message or "")
        if code in _FULL_CODES or status == _INSUFFICIENT_STORAGE or out_of_space:
            self._full_until = time.monotonic() + _FULL_SECONDS
            return StoreFull(f"{what}; free some space or give the store more")
        if code in _PASSING_CODES or status in _PASSING_STATUSES or status >= 500:
            return StoreUnavailable(f"{what}; look at the object store's own health and log")
        return StoreRefused(f"{what}; {_HINTS.get(code, 'look at the object store and its log')}")


@contextmanager
def _first_error() -> Iterator[None]:
    """minio-py aborts a multipart upload that failed, and raises what comes of that instead where
    the store has dropped the upload already, as MinIO does on a full disk."""
    try:
        yield
    except S3Error as error:
        if error.code == "NoSuchUpload" and error.__context__ is not None:
            raise error.__context__ from None
        raise


class _PastTheEnd(Exception):
    """A range begins behind the object's last byte."""


class _BriefRetry(urllib3.Retry):
    """Another attempt after what may pass, unless too much time has passed since the first.

    urllib3 alone counts attempts only: each might take its whole time-out. What the server names in
    Retry-After, a minute with MinIO, is not waited for either.
    """

    def __init__(self, *, until: float, **named: Any) -> None:
        super().__init__(**named)
        self._until = until

    @classmethod
    def from_now(cls) -> Self:
        return cls(
            until=time.monotonic() + _RETRY_SECONDS,
            total=2,
            backoff_factor=0.1,
            backoff_jitter=0.1,
            status_forcelist=[500, 502, 503, 504],
            raise_on_status=False,
            respect_retry_after_header=False,
        )

    def new(self, **named: Any) -> Self:
        return super().new(until=self._until, **named)

    def increment(self, *given: Any, **named: Any) -> Self:
        retry = self if time.monotonic() < self._until else self.new(total=0)
        return super(_BriefRetry, retry).increment(*given, **named)


class _BriefPool(urllib3.PoolManager):
    def urlopen(  # type: ignore[override]  # as PoolManager's own
        self, method: str, url: str, redirect: bool = True, **named: Any
    ) -> urllib3.BaseHTTPResponse:
        named.setdefault("retries", _BriefRetry.from_now())
        body = named.get("body")
        if isinstance(body, bytes) and len(body) > _PIECE_BYTES:
            # A time-out is for one piece as it is sent; of plain bytes, all would be one piece.
            named["body"] = io.BytesIO(body)
        return super().urlopen(method, url, redirect, **named)


class _Exactly:
    """The first `size_bytes` of a stream: each read returns all that is asked for, or raises."""

    def __init__(self, data: BinaryIO, size_bytes: int) -> None:
        self._data = data
        self._size_bytes = size_bytes
        self._missing = size_bytes

    def read(self, size: int) -> bytes:
        pieces = []
        wanted = min(size, self._missing)
        while wanted:
            piece = self._data.read(wanted)
            if not piece:
                raise ValueError(
                    f"the data ended {self._missing} bytes short of {self._size_bytes}"
                )
            pieces.append(piece)
            wanted -= len(piece)
            self._missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _doomed(keys: Iterable[str]) -> Iterator[DeleteObject]:
    for key in keys:
        check_key(key)
        yield DeleteObject(name=key)
