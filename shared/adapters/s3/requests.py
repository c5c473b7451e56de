"""Signed S3 requests (AWS Signature Version 4), which minio-py's own calls cannot replace.

`put_object` sends no conditions, hashes data again that was hashed on arrival, and starts threads
for each multipart upload.
"""

import hashlib
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from http import HTTPStatus
from io import BytesIO
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, Self
from urllib.parse import quote, urlencode, urlsplit

import urllib3
from minio.error import InvalidResponseError, S3Error
from minio.signer import sign_v4_s3

from shared.adapters.s3.concurrency import ConcurrencyLimit
from shared.adapters.s3.connections import ProgressPool
from shared.adapters.s3.credentials import RenewedCredentials, refuses_keys

_RETRY_SECONDS = 2.0

# Read and sent at a time. A body up to this size is not subject to the concurrency limit.
PIECE_BYTES = 1 << 20


class _Request(NamedTuple):
    """`sha256` is the digest of the body in hexadecimal, and empty while it is not known."""

    method: str
    key: str
    body: "bytes | Window"
    query: Mapping[str, str]
    headers: Mapping[str, str]
    sha256: str

    def with_md5(self) -> "_Request":
        return self._replace(headers={**self.headers, "Content-MD5": _md5(self.body)})


class SignedRequests:
    """Sends requests for the objects of one bucket; `bucket_url` ends with a `/`."""

    def __init__(
        self,
        pool: urllib3.PoolManager,
        bucket_url: str,
        *,
        credentials: RenewedCredentials,
        region: str,
        max_concurrent: int,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._bucket = urlsplit(bucket_url)
        self.server = self._bucket._replace(path="")
        # The pool of this server, because finding it for each request costs as much as signing.
        self._connections = pool.connection_from_host(
            self._bucket.hostname, self._bucket.port, self._bucket.scheme
        )
        self._credentials = credentials
        self._region = region
        self.tls = tls
        self._wants_md5 = False
        self._large_bodies = ConcurrencyLimit(max_concurrent)

    def send(
        self,
        method: str,
        key: str,
        body: "bytes | Window" = b"",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        sha256: str | None = None,
        again: bool = True,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request, and return its successful answer, with the body read.

        Args:
            sha256: Digest of the body in hexadecimal, if known; the store verifies it.
            again: Whether to retry after a transient failure. A PUT that is refused for lack of a
                Content-MD5 is repeated in any case, and each later PUT has one.

        Raises:
            S3Error: The store refused the request.
            InvalidResponseError: The answer is not S3's.
            HTTPError, OSError, ValueError: As urllib3 and `Window` raise them.
        """
        with self._large_bodies.turn() if len(body) > PIECE_BYTES else nullcontext():
            response = self._answer(
                _Request(method, key, body, query or {}, headers or {}, sha256 or ""), again
            )
        if response.status not in (200, 204, 206):
            raise _refusal(response)
        if method in ("GET", "PUT") and "ETag" not in response.headers:
            raise _not_of_s3(response)
        return response

    def _answer(self, request: "_Request", again: bool) -> urllib3.BaseHTTPResponse:
        is_put = request.method == "PUT"
        try:
            if not request.sha256:
                request = request._replace(sha256=_digest("sha256", request.body).hex())
            if is_put and self._wants_md5:
                request = request.with_md5()
            response = self._send(request, again)
            if is_put and "Content-MD5" not in request.headers and _asks_for_md5(response):
                self._wants_md5 = True
                response = self._send(request.with_md5(), again)
        except SourceFailed as failed:
            raise failed.error from None
        return response

    def _send(self, request: "_Request", again: bool) -> urllib3.BaseHTTPResponse:
        used = self._credentials.retrieve()
        response = self._send_signed(request, again)
        if response.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN):
            refusal = _refusal(response)
            if (
                isinstance(refusal, S3Error)
                and refuses_keys(refusal)
                and self._credentials.renew(used)
            ):
                return self._send_signed(request, again)
        return response

    def _send_signed(self, request: "_Request", again: bool) -> urllib3.BaseHTTPResponse:
        method, key, body, query, headers, sha256 = request
        target, signed = self.signed(method, key, len(body), query, headers, sha256)
        if isinstance(body, bytes) and len(body) > PIECE_BYTES:
            body = Window(BytesIO(body), Lock(), 0, len(body))
        return self._connections.urlopen(
            method,
            target,
            body=body or None,
            headers=signed,
            retries=BriefRetry.from_now() if again else False,
            redirect=False,
        )

    def signed(
        self,
        method: str,
        key: str,
        size_bytes: int,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        sha256: str,
    ) -> tuple[str, dict[str, str]]:
        """Sign a request whose body has that size and digest; return its target and headers."""
        url = self._bucket._replace(
            path=self._bucket.path + quote(key, safe="/~"),
            query=urlencode(query, quote_via=quote),
        )
        now = datetime.now(UTC)
        credentials = self._credentials.retrieve()
        token = credentials.session_token
        # A proxy may drop this header of a GET, and the signature would not match any more.
        length = {} if method == "GET" else {"Content-Length": str(size_bytes)}
        signed: Any = sign_v4_s3(
            method=method,
            url=url,
            region=self._region,
            headers={
                **headers,
                **length,
                **({"X-Amz-Security-Token": token} if token else {}),
                "Host": url.netloc,
                "x-amz-content-sha256": sha256,
                "x-amz-date": now.strftime("%Y%m%dT%H%M%SZ"),
            },
            credentials=credentials,
            content_sha256=sha256,
            date=now,
        )
        return f"{url.path}?{url.query}" if url.query else url.path, signed


def _asks_for_md5(response: urllib3.BaseHTTPResponse) -> bool:
    """Whether the store requires a Content-MD5, as a bucket with object lock and a default
    retention does; the digest in the signature does not count there."""
    return response.status == HTTPStatus.BAD_REQUEST and b"content-md5" in response.data.lower()


def _refusal(response: urllib3.BaseHTTPResponse) -> Exception:
    try:
        return S3Error.fromxml(response)
    except UnicodeDecodeError:
        return _not_of_s3(response)


def _not_of_s3(response: urllib3.BaseHTTPResponse) -> InvalidResponseError:
    """Return the error for an answer of something else, such as a proxy."""
    return InvalidResponseError(response.status, response.headers.get("Content-Type"), None)


class SourceFailed(Exception):
    """Reading the body failed. urllib3 would mistake an OSError for one of the connection."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Window:
    """A range of a file as a request body, which can be sent repeatedly, in pieces.

    Several windows on one file can be read concurrently if they share the `lock`. Iterating raises
    `ValueError` if the file ends before the window.
    """

    def __init__(self, file: BinaryIO, lock: Lock, start: int, size_bytes: int) -> None:
        self._file = file
        self._lock = lock
        self._start = start
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes

    def __iter__(self) -> Iterator[bytes]:
        position, end = self._start, self._start + self._size_bytes
        while position < end:
            try:
                with self._lock:
                    self._file.seek(position)
                    piece = self._file.read(min(PIECE_BYTES, end - position))
            except OSError as error:
                raise SourceFailed(error) from error
            if not piece:
                raise ValueError(
                    f"the data ended {end - position} bytes short of {self._size_bytes}"
                )
            position += len(piece)
            yield piece


def _md5(body: bytes | Window) -> str:
    """Return the value of Content-MD5 (RFC 1864)."""
    return b64encode(_digest("md5", body)).decode()


def _digest(algorithm: str, body: bytes | Window) -> bytes:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for piece in [body] if isinstance(body, bytes) else body:
        digest.update(piece)
    return digest.digest()


class BriefRetry(urllib3.Retry):
    """Retries transient failures, but only within a short time after the first attempt.

    urllib3 itself limits the number of attempts only, each of which might take its full timeout.
    Retry-After, a minute with MinIO, is ignored.
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
        return super(BriefRetry, retry).increment(*given, **named)


class BriefPool(ProgressPool):
    def urlopen(  # type: ignore[override]  # as PoolManager's own
        self, method: str, url: str, redirect: bool = True, **named: Any
    ) -> urllib3.BaseHTTPResponse:
        named.setdefault("retries", BriefRetry.from_now())
        return super().urlopen(method, url, redirect, **named)
