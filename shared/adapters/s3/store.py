"""The object store on MinIO, or any other S3 store."""

import math
import random
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from http import HTTPStatus
from threading import Lock
from typing import Any, BinaryIO, Self
from urllib.parse import urlsplit
from uuid import uuid4
from xml.etree import ElementTree

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED
from minio.datatypes import Object
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from shared.adapters.s3.connections import NoProgress
from shared.adapters.s3.credentials import (
    RenewedCredentials,
    RenewingMinio,
    static_credentials,
)
from shared.adapters.s3.parts import PartsUpload
from shared.adapters.s3.race import Reply, put_at_once
from shared.adapters.s3.requests import PIECE_BYTES, BriefPool, SignedRequests, Window
from shared.errors import (
    ObjectMissing,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StowgateError,
    VersionConflict,
)
from shared.ports import ListedObject, StoredObject, Writing, check_key, check_prefix
from shared.runtime.threads import started_pool

# How long the store counts as full after a write failed for lack of space.
_FULL_SECONDS = 5.0

_PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 10_000

# Threads for the parts of all objects together, enough to keep the store busy.
_PARTS_AT_ONCE = 4

_KEYS_HINT = (
    "check STOWGATE_OBJECT_STORE_ACCESS_KEY, STOWGATE_OBJECT_STORE_SECRET_KEY and their permissions"
)
_BUCKET_HINT = "create the bucket, or check STOWGATE_BUCKET and STOWGATE_STATE_BUCKET"
_HINTS = {
    "AccessDenied": _KEYS_HINT,
    "ExpiredToken": _KEYS_HINT,
    "InvalidToken": _KEYS_HINT,
    "InvalidAccessKeyId": _KEYS_HINT,
    "SignatureDoesNotMatch": _KEYS_HINT,
    "NoSuchBucket": _BUCKET_HINT,
    "InvalidBucketName": _BUCKET_HINT,
    "AuthorizationHeaderMalformed": "check STOWGATE_OBJECT_STORE_REGION",
    "PermanentRedirect": "check STOWGATE_OBJECT_STORE_REGION",
    "RequestTimeTooSkewed": "set the clocks of both machines",
}
_FULL_CODES = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded"}
_PASSING_CODES = {
    "BadDigest",
    # MinIO, if it was stopped or paused in the middle of a request.
    "ClientDisconnected",
    # Another operation on the key is in progress, with an unknown result.
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "XAmzContentSHA256Mismatch",
}
_PASSING_STATUSES = {408, 429}
_PRECONDITION_FAILED = 412
_INSUFFICIENT_STORAGE = 507

# Identifies the write that created an object.
_WRITE = "x-amz-meta-stowgate-write"

# A conditional write is retried for this time after its first attempt.
_TRY_AGAIN_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.05
_MAX_PAUSE_SECONDS = 1.0


class MinioObjectStore:
    """One bucket of an S3 object store. Safe between threads, but not across a fork.

    Every request to a dead or silent store ends within 15 s: 4 s to connect, 9 s without progress,
    and no retry starts later than 2 s after the first attempt. A refused connection fails at once.
    A slow request may take a minute, plus the time of its bytes at 64 KiB/s. While bodies over
    1 MiB are slow, fewer are sent concurrently and the others wait; they fail with the first that
    makes no progress. `put` of more than 8 MiB, `delete` of more than 1000 keys and a long `list`
    take several requests, and a `put` that fails halfway takes one more for the cleanup.
    A conditional write with an unknown result checks its object and is retried for 5 s; with a
    silent store it ends within 30 s. A version is the object's ETag.
    """

    def __init__(
        self,
        client: Minio,
        requests: SignedRequests,
        bucket: str,
        place: str,
        keys_end: Callable[[], datetime | None],
    ) -> None:
        """`place` is the name of the store in error messages. `keys_end` returns when its temporary
        keys expire, None if they do not."""
        self.keys_end = keys_end
        self._client = client
        self._requests = requests
        self._parts = started_pool(_PARTS_AT_ONCE, "part")
        self._bucket = bucket
        self._place = f"object store {place}, bucket {bucket}"
        self._full_until = -math.inf

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        region: str,
        bucket: str,
        threads: int,
        access_key: str = "",
        secret_key: str = "",
        credentials: RenewedCredentials | None = None,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> Self:
        """Return a store for up to `threads` concurrent threads, without sending a request.

        `url` is `http(s)://host[:port]`. `credentials` are for keys that may change, in place of
        the two. `tls` gives the context of each new connection.
        """
        pool = brief_pool(tls, threads + _PARTS_AT_ONCE)
        if credentials is None:
            credentials = static_credentials(lambda: access_key, lambda: secret_key, str)
        parts = urlsplit(url)
        client = RenewingMinio(
            endpoint=parts.netloc,
            credentials=credentials,
            secure=parts.scheme == "https",
            region=region,
            http_client=pool,
        )
        # minio-py knows whether a bucket is part of the path or of the host, which does not depend
        # on the keys.
        unsigned = Minio(
            endpoint=parts.netloc,
            access_key="any",
            secret_key="any",  # noqa: S106
            secure=parts.scheme == "https",
            region=region,
            http_client=pool,
        )
        an_object = urlsplit(
            unsigned.get_presigned_url(method="GET", bucket_name=bucket, object_name="key")
        )
        requests = SignedRequests(
            pool,
            an_object._replace(path=an_object.path.removesuffix("key"), query="").geturl(),
            credentials=credentials,
            region=region,
            max_concurrent=threads + _PARTS_AT_ONCE,
            tls=tls,
        )
        return cls(client, requests, bucket, url, credentials.end)

    def prepare(self) -> None:
        """Create the bucket if it is missing."""
        with self._typed("create the bucket"):
            if self._client.bucket_exists(bucket_name=self._bucket):
                return
            try:
                self._client.make_bucket(bucket_name=self._bucket)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise
        self.ping()

    def put(
        self,
        key: str,
        data: BinaryIO,
        size_bytes: int,
        content_type: str,
        sha256: str | None = None,
    ) -> None:
        """Write `size_bytes` from `data`, all or nothing, over any existing object.

        Uploads parts of 8 MiB (larger ones beyond 80 GB, as S3 accepts 10,000), and keeps 1 MiB of
        each in memory. `data` must be seekable. Raises `ValueError` if it ends early; its errors
        pass through.
        """
        check_key(key)
        if size_bytes > _PART_BYTES:
            self.begin(key, data, content_type, size_bytes).finish(size_bytes)
            return
        with self._typed(f"put {key}"):
            window = Window(data, Lock(), 0, size_bytes)
            headers = {"Content-Type": content_type}
            self._requests.send("PUT", key, window, headers=headers, sha256=sha256)

    def begin(self, key: str, data: BinaryIO, content_type: str, max_bytes: int) -> Writing:
        """Write `data` to `key` while it grows, up to `max_bytes`, in parts like `put`."""
        check_key(key)
        return PartsUpload(
            self._requests,
            self._parts,
            key,
            data,
            content_type,
            max(_PART_BYTES, -(-max_bytes // _MAX_PARTS)),
            partial(self._typed, f"put {key}"),
        )

    def create(self, key: str, data: bytes, content_type: str) -> str:
        """Write a new object, and return its version. Raises `VersionConflict`.

        After `StoreUnavailable` it is unknown whether the object was written.
        """
        return self._put_if(None, key, data, content_type)

    def replace(self, key: str, data: bytes, version: str, content_type: str) -> str:
        """Replace that version, and return the new one. Raises `VersionConflict`.

        After `StoreUnavailable` it is unknown whether the object was written.
        """
        return self._put_if(version, key, data, content_type)

    def get(self, key: str) -> StoredObject:
        """Read a small object. Raises `ObjectMissing`."""
        answer = self._read(key, {})
        return StoredObject(answer.data, _version(answer))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read `length` bytes from offset `start`, fewer at the end. Raises `ObjectMissing`."""
        if start < 0 or length < 0:
            raise ValueError(f"invalid range: {length} bytes from {start}")
        try:
            # HTTP has no empty range.
            answer = self._read(key, {"Range": f"bytes={start}-{start + max(length, 1) - 1}"})
        except _PastTheEnd:
            return b""
        return answer.data[:length]

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        """Yield every object under `prefix` after `after`, by key, in pages of 1000."""
        check_prefix(prefix)
        return self._list(prefix, after)

    def folders(self, after: str) -> Iterator[str]:
        """Yield the common prefixes at the top after `after`, in order, in pages of 1000."""
        for found in self._pages("list", recursive=False, start_after=after or None):
            name = (found.object_name or "").removesuffix("/")
            if found.is_dir and name > after:
                yield name

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects, 1000 per request; ignore missing ones."""
        with self._typed("delete"):
            answers = self._client.remove_objects(
                bucket_name=self._bucket, delete_object_list=_delete_objects(keys)
            )
            # Reading the answers sends the requests.
            failures = [answer for answer in answers if answer.code != "NoSuchKey"]
        if failures:
            first = failures[0]
            raise self._error(f"delete {first.name}", first.code, first.message)

    def check_room(self) -> None:
        """Raise `StoreFull` for 5 s after a write found the store full; S3 has no call for that."""
        if time.monotonic() < self._full_until:
            raise StoreFull(
                f"{self._place}: it reported a few seconds ago that it is full; free some space"
            )

    def ping(self) -> None:
        """Return if the bucket is reachable with these keys."""
        with self._typed("reach the bucket"):
            if not self._client.bucket_exists(bucket_name=self._bucket):
                raise self._error("reach the bucket", "NoSuchBucket", "it does not exist")

    def keeps_removed(self) -> bool:
        """Whether the bucket is versioned, and no lifecycle rule removes old versions."""
        try:
            versioning = self._client.get_bucket_versioning(bucket_name=self._bucket)
            if versioning.status is None:
                return False
            lifecycle = self._client.get_bucket_lifecycle(bucket_name=self._bucket)
        except (MinioException, HTTPError, ElementTree.ParseError, ValueError):
            # Many stores lack these calls, or require further permissions.
            return False
        rules = lifecycle.rules if lifecycle else []
        return not any(
            rule.status == ENABLED and rule.noncurrent_version_expiration is not None
            for rule in rules
        )

    def identify(self) -> str:
        """Return the address of the bucket, and the engine as its `Server` header names it."""
        with self._typed("ask for its name"):
            try:
                headers = self._requests.send("GET", "stowgate-check/name").headers
            except S3Error as error:
                headers = error.response.headers
        return f"{self._place} ({headers.get('Server') or 'an engine without a Server header'})"

    def put_at_once(
        self, key: str, bodies: Sequence[bytes], version: str | None
    ) -> Sequence[Reply]:
        """Create the object, or replace that version of it, with each body at the same moment.

        Returns the answers of the store, whatever they are. Raises `StoreUnavailable` if one takes
        longer than 9 s.
        """
        return put_at_once(self._requests, key, bodies, _condition(version))

    def _put_if(self, version: str | None, key: str, data: bytes, content_type: str) -> str:
        """Replace that version, or create the object if `version` is None.

        Each write has a unique id, which is stored with the object. So a writer recognises its own
        object after a retry, its own or a proxy's, and of two that write the same bytes one wins.
        """
        check_key(key)
        write = uuid4().hex
        headers = {"Content-Type": content_type, **_condition(version), _WRITE: write}
        until, pause_seconds = time.monotonic() + _TRY_AGAIN_SECONDS, _FIRST_PAUSE_SECONDS
        while True:
            unknown_after: StoreUnavailable | None = None
            try:
                with self._typed(f"put {key}"):
                    return self._send_if(key, data, headers)
            except _ConditionFailed:
                pass  # unless an earlier attempt of this write succeeded
            except StoreUnavailable as error:
                unknown_after = error
            try:
                found_version, found_write = self._stat(key)
            except StoreUnavailable as error:
                unknown_after = error
            else:
                if found_write == write and found_version is not None:
                    return found_version
                if unknown_after is None or found_version != version:
                    raise VersionConflict(
                        f"{self._place}: {key} has another version than this write expects"
                    )
            if time.monotonic() + pause_seconds > until:
                raise unknown_after
            time.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)

    def _send_if(self, key: str, data: bytes, headers: dict[str, str]) -> str:
        try:
            # No blind retry: the caller checks the result first.
            answer = self._requests.send("PUT", key, data, headers=headers, again=False)
        except S3Error as error:
            if error.response.status == _PRECONDITION_FAILED or error.code == "NoSuchKey":
                raise _ConditionFailed from error
            raise
        return _version(answer)

    def _stat(self, key: str) -> tuple[str | None, str | None]:
        """Return the version of the object and the id of its write, each None if it is missing."""
        with self._typed(f"check {key}"):
            try:
                found = self._client.stat_object(bucket_name=self._bucket, object_name=key)
            except S3Error as error:
                if error.code == "NoSuchKey":
                    return None, None
                raise
        return found.etag, (found.metadata or {}).get(_WRITE)

    def _read(self, key: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        check_key(key)
        with self._typed(f"read {key}"):
            try:
                return self._requests.send("GET", key, headers=headers)
            except S3Error as error:
                if error.code == "NoSuchKey":
                    raise ObjectMissing(f"{self._place}: {key} does not exist") from error
                if error.code == "InvalidRange":
                    raise _PastTheEnd(key) from error
                raise

    def _list(self, prefix: str, after: str) -> Iterator[ListedObject]:
        doing = f"list {prefix!r}"
        for found in self._pages(doing, prefix=prefix, recursive=True, start_after=after or None):
            if found.object_name is None or found.last_modified is None:
                continue  # a folder, which a recursive listing does not contain
            yield ListedObject(found.object_name, found.size or 0, found.last_modified)

    def _pages(self, doing: str, **which: Any) -> Iterator[Object]:
        with self._typed(doing):
            try:
                yield from self._client.list_objects(bucket_name=self._bucket, **which)
            except ValueError as error:
                # From minio-py, for XML that is not a listing.
                raise InvalidResponseError(HTTPStatus.OK, None, None) from error

    @contextmanager
    def _typed(self, doing: str) -> Iterator[None]:
        try:
            yield
        except S3Error as error:
            status = error.response.status
            raise self._error(doing, error.code or "", error.message, status) from error
        except ServerError as error:
            raise self._error(doing, "", None, error.status_code) from error
        except (InvalidResponseError, ElementTree.ParseError) as error:
            raise StoreUnavailable(
                f"{self._place}: cannot {doing}: the answer is not from an S3 store; check that "
                "STOWGATE_OBJECT_STORE is its server and port, and look for a proxy in between"
            ) from error
        except NoProgress as error:
            raise StoreUnavailable(
                f"{self._place}: cannot {doing}: {error}; check its health and the network"
            ) from error
        except HTTPError as error:
            cause = error.reason if isinstance(error, MaxRetryError) else error
            advice = "is it running, and is STOWGATE_OBJECT_STORE right?"
            if isinstance(cause, SSLError):
                advice = "check its certificate and STOWGATE_OBJECT_STORE_CA"
            raise StoreUnavailable(
                f"{self._place}: cannot {doing}: no answer ({type(cause).__name__}: {cause}); "
                f"{advice}"
            ) from cause

    def _error(self, doing: str, code: str, message: str | None, status: int = 0) -> StowgateError:
        cause = ", ".join(word for word in (code, message, f"HTTP {status}" * bool(status)) if word)
        what = f"{self._place}: cannot {doing}: {cause}"
        # MinIO on a completely full disk answers InternalError with this message.
        out_of_space = "no space left on device" in (message or "")
        if code in _FULL_CODES or status == _INSUFFICIENT_STORAGE or out_of_space:
            self._full_until = time.monotonic() + _FULL_SECONDS
            return StoreFull(f"{what}; free some space or give the store more")
        is_passing = code in _PASSING_CODES or status in _PASSING_STATUSES or status >= 500
        # NotImplemented has status 501, which is temporary if a proxy sends it.
        if is_passing and code != "NotImplemented":
            return StoreUnavailable(f"{what}; check the health and the log of the object store")
        return StoreRefused(f"{what}; {_HINTS.get(code, 'check the object store and its log')}")


def brief_pool(tls: Callable[[], ssl.SSLContext], connections: int) -> BriefPool:
    """Return a pool of connections with the deadlines of this store."""
    return BriefPool(
        tls,
        maxsize=connections,
        blocksize=PIECE_BYTES,
    )


class _ConditionFailed(Exception):
    """The condition of a write was not met."""


class _PastTheEnd(Exception):
    """A range begins after the object's last byte."""


def _condition(version: str | None) -> dict[str, str]:
    """Return the header that accepts only that version, or None only no object (RFC 9110 13.1)."""
    return {"If-None-Match": "*"} if version is None else {"If-Match": f'"{version}"'}


def _version(answer: urllib3.BaseHTTPResponse) -> str:
    return answer.headers["ETag"].strip('"')


def _delete_objects(keys: Iterable[str]) -> Iterator[DeleteObject]:
    for key in keys:
        check_key(key)
        yield DeleteObject(name=key)
