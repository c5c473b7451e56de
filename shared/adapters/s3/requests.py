"""Signed S3 requests (AWS Signature Version 4), for what minio-py's own calls cannot do.

`put_object` sends no condition, hashes again what was hashed on arrival, and starts threads of its
own for each object that goes in parts.
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
from typing import Any, BinaryIO, Self
from urllib.parse import quote, urlencode, urlsplit

import urllib3
from minio.error import InvalidResponseError, S3Error
from minio.signer import sign_v4_s3

from shared.adapters.s3.concurrency import ConcurrencyLimit
from shared.adapters.s3.connections import ProgressPool
from shared.adapters.s3.credentials import RenewedCredentials, refuses_keys

_RETRY_SECONDS = 2.0

# What is in memory of a body on its way. One that is no longer does not wait for its turn.
PIECE_BYTES = 1 << 20


class SignedRequests:
    """Requests about the objects of one bucket, whose URL is `bucket_url`, with a `/` behind it."""

    def __init__(
        self,
        pool: urllib3.PoolManager,
        bucket_url: str,
        *,
        credentials: RenewedCredentials,
        region: str,
        most_at_once: int,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._bucket = urlsplit(bucket_url)
        self.server = self._bucket._replace(path="")
        # Straight to the one server that is asked: finding it again costs as much as signing.
        self._connections = pool.connection_from_host(
            self._bucket.hostname, self._bucket.port, self._bucket.scheme
        )
        self._credentials = credentials
        self._region = region
        self.tls = tls
        self._wants_md5 = False
        self._large_bodies = ConcurrencyLimit(most_at_once)

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
        """The answer, which is a success, and read.

        `sha256` is the body's, in hexadecimal, where it is known; the store refuses a body with
        another one. With `again` false the request is sent once, whatever comes of it, but for a
        PUT that is refused for want of a Content-MD5, which every PUT has from then on. Raises
        `S3Error`, `InvalidResponseError` for what is no answer of S3, what urllib3 raises, and what
        a `Window` raises.
        """
        with self._large_bodies.turn() if len(body) > PIECE_BYTES else nullcontext():
            response = self._answer(method, key, body, query or {}, headers or {}, sha256, again)
        if response.status not in (200, 204, 206):
            raise _refusal(response)
        if method in ("GET", "PUT") and "ETag" not in response.headers:
            raise _not_of_s3(response)
        return response

    def _answer(
        self,
        method: str,
        key: str,
        body: "bytes | Window",
        query: Mapping[str, str],
        headers: Mapping[str, str],
        sha256: str | None,
        again: bool,
    ) -> urllib3.BaseHTTPResponse:
        given = dict(headers)
        try:
            sha256 = sha256 or _digest("sha256", body).hex()
            if method == "PUT" and self._wants_md5:
                given["Content-MD5"] = _md5(body)
            response = self._send(method, key, body, query, given, sha256, again)
            if method == "PUT" and "Content-MD5" not in given and _asks_for_md5(response):
                self._wants_md5 = True
                given["Content-MD5"] = _md5(body)
                response = self._send(method, key, body, query, given, sha256, again)
        except SourceFailed as failed:
            raise failed.error from None
        return response

    def _send(
        self,
        method: str,
        key: str,
        body: "bytes | Window",
        query: Mapping[str, str],
        headers: Mapping[str, str],
        sha256: str,
        again: bool,
    ) -> urllib3.BaseHTTPResponse:
        used = self._credentials.retrieve()
        response = self._send_signed(method, key, body, query, headers, sha256, again)
        if response.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN):
            refusal = _refusal(response)
            if (
                isinstance(refusal, S3Error)
                and refuses_keys(refusal)
                and self._credentials.renew(used)
            ):
                return self._send_signed(method, key, body, query, headers, sha256, again)
        return response

    def _send_signed(
        self,
        method: str,
        key: str,
        body: "bytes | Window",
        query: Mapping[str, str],
        headers: Mapping[str, str],
        sha256: str,
        again: bool,
    ) -> urllib3.BaseHTTPResponse:
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
        """Sign a request whose body has `size_bytes` and that digest; its target and headers."""
        url = self._bucket._replace(
            path=self._bucket.path + quote(key, safe="/~"),
            query=urlencode(query, quote_via=quote),
        )
        now = datetime.now(UTC)
        credentials = self._credentials.retrieve()
        token = credentials.session_token
        # Of an empty body of a GET a proxy may drop it, and the signature would not fit any more.
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
    """A bucket with object lock and a default retention takes no object without a digest that the
    store itself checks. What the signature covers is none of these."""
    return response.status == HTTPStatus.BAD_REQUEST and b"content-md5" in response.data.lower()


def _refusal(response: urllib3.BaseHTTPResponse) -> Exception:
    try:
        return S3Error.fromxml(response)
    except UnicodeDecodeError:
        return _not_of_s3(response)


def _not_of_s3(response: urllib3.BaseHTTPResponse) -> InvalidResponseError:
    """Such as the page of a proxy, or of another server."""
    return InvalidResponseError(response.status, response.headers.get("Content-Type"), None)


class SourceFailed(Exception):
    """Reading what is to be sent failed. urllib3 would take the error for one of the connection."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Window:
    """Some bytes of a file, to be sent in pieces, and again where need be.

    Any number of windows on one file may be read at once, by the same `lock`. Raises `ValueError`
    where the file ends before the window does.
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
    """As Content-MD5 has it (RFC 1864)."""
    return b64encode(_digest("md5", body)).decode()


def _digest(algorithm: str, body: bytes | Window) -> bytes:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for piece in [body] if isinstance(body, bytes) else body:
        digest.update(piece)
    return digest.digest()


class BriefRetry(urllib3.Retry):
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
        return super(BriefRetry, retry).increment(*given, **named)


class BriefPool(ProgressPool):
    def urlopen(  # type: ignore[override]  # as PoolManager's own
        self, method: str, url: str, redirect: bool = True, **named: Any
    ) -> urllib3.BaseHTTPResponse:
        named.setdefault("retries", BriefRetry.from_now())
        return super().urlopen(method, url, redirect, **named)
