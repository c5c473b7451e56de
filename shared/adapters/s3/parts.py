"""S3's multipart upload: an object in parts, which becomes visible when they are joined."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from threading import Lock
from typing import BinaryIO
from xml.etree import ElementTree

import urllib3
from minio.error import MinioException
from urllib3.exceptions import HTTPError

from shared.adapters.s3.requests import SignedRequests, Window
from shared.errors import StoreUnavailable


class PartsUpload:
    """Uploads the object `key` from `data` with requests in `threads`.

    `finish` raises all errors, as `typed` translates them.
    """

    def __init__(
        self,
        requests: SignedRequests,
        threads: ThreadPoolExecutor,
        key: str,
        data: BinaryIO,
        content_type: str,
        part_bytes: int,
        typed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._requests = requests
        self._threads = threads
        self._key = key
        self._data = data
        self._part_bytes = part_bytes
        self._typed = typed
        self._lock = Lock()
        self._putting: list[Future[str]] = []
        self._has_ended = False
        self.has_failed = False
        # The threads run tasks in order, so this one always starts before the parts that need it.
        self._upload_id = threads.submit(self._begin, content_type)

    def _begin(self, content_type: str) -> str:
        headers = {"Content-Type": content_type}
        begun = self._requests.send("POST", self._key, query={"uploads": ""}, headers=headers)
        return _text(begun, "UploadId")

    def proceed(self, size_bytes: int) -> None:
        """Send the complete parts among the first `size_bytes` of `data`. Does not wait."""
        while (len(self._putting) + 1) * self._part_bytes <= size_bytes:
            self._send(self._part_bytes)

    def finish(self, size_bytes: int) -> None:
        """Send the rest and join the parts; after a failure nothing is left."""
        self.proceed(size_bytes)
        rest_bytes = size_bytes - len(self._putting) * self._part_bytes
        if rest_bytes or not self._putting:
            self._send(rest_bytes)
        with self._typed():
            try:
                self._join([part.result() for part in self._putting])
            except BaseException as error:
                self.abandon()
                raise _cause(error, self._putting) from error
        self._has_ended = True

    def abandon(self) -> None:
        """Remove the parts; the store itself removes any that remain some time later."""
        if self._has_ended:
            return
        self._has_ended = True
        # Do not wait for queued parts, which may be behind those of other uploads.
        wait([part for part in self._putting if not part.cancel()])
        with suppress(MinioException, HTTPError, ElementTree.ParseError, StoreUnavailable):
            self._requests.send("DELETE", self._key, query={"uploadId": self._upload_id.result()})

    def _send(self, size_bytes: int) -> None:
        number = len(self._putting)
        part = Window(self._data, self._lock, number * self._part_bytes, size_bytes)
        self._putting.append(self._threads.submit(self._put, number + 1, part))

    def _put(self, number: int, part: Window) -> str:
        if self.has_failed:
            raise CancelledError
        try:
            query = {"partNumber": str(number), "uploadId": self._upload_id.result()}
            return self._requests.send("PUT", self._key, part, query=query).headers["ETag"]
        except BaseException:
            self.has_failed = True
            raise

    def _join(self, etags: Sequence[str]) -> None:
        joined = self._requests.send(
            "POST",
            self._key,
            _joining(etags),
            query={"uploadId": self._upload_id.result()},
            again=False,
        )
        # S3 may answer with 200 and an error in the body.
        if not _text(joined, "ETag"):
            raise StoreUnavailable(
                f"the object store did not join the parts of {self._key}; check its health and log"
            )


def _cause(error: BaseException, parts: Sequence[Future[str]]) -> BaseException:
    """Return the original error of an upload. When MinIO finds its disk full it drops the upload,
    and the other parts fail with NoSuchUpload only."""
    failed = (part.exception() for part in parts if not part.cancelled())
    told = (
        e
        for e in (error, *failed)
        if e and getattr(e, "code", "") != "NoSuchUpload" and not isinstance(e, CancelledError)
    )
    return next(told, error)


def _text(answer: urllib3.BaseHTTPResponse, name: str) -> str:
    """Return an element of an XML answer, with or without a namespace; "" if it is missing."""
    # The answer comes from the configured object store; minio-py parses it in the same way.
    return ElementTree.fromstring(answer.data).findtext(f"{{*}}{name}") or ""  # noqa: S314


def _joining(etags: Sequence[str]) -> bytes:
    """Return the body of CompleteMultipartUpload."""
    whole = ElementTree.Element("CompleteMultipartUpload")
    for number, etag in enumerate(etags, start=1):
        part = ElementTree.SubElement(whole, "Part")
        ElementTree.SubElement(part, "PartNumber").text = str(number)
        ElementTree.SubElement(part, "ETag").text = etag
    return ElementTree.tostring(whole)
