"""S3's multipart upload: an object in parts, which appears when they are joined."""

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
    """One upload of the object `key` from `data`, by requests that `threads` send.

    What goes wrong is raised by `finish`, within `typed`.
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
        # The threads take what they are given in order, so a part never waits for this in vain.
        self._upload_id = threads.submit(self._begin, content_type)

    def _begin(self, content_type: str) -> str:
        headers = {"Content-Type": content_type}
        begun = self._requests.send("POST", self._key, query={"uploads": ""}, headers=headers)
        return _text(begun, "UploadId")

    def proceed(self, size_bytes: int) -> None:
        """So much of `data` can be read: have the parts sent that are whole. Does not wait."""
        while (len(self._putting) + 1) * self._part_bytes <= size_bytes:
            self._send(self._part_bytes)

    def finish(self, size_bytes: int) -> None:
        """Have the rest sent, and join the parts; where that fails nothing is left."""
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
        """Leave nothing; what cannot be cleared away now the store clears away in time."""
        if self._has_ended:
            return
        self._has_ended = True
        # What has not begun is not waited for: it may stand in line behind the parts of others.
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
                f"the object store did not join the parts of {self._key}; look at its own health "
                "and log"
            )


def _cause(error: BaseException, parts: Sequence[Future[str]]) -> BaseException:
    """Why an upload in parts failed: MinIO drops one that finds its disk full, and then other parts
    of it are told only that there is no such upload. Parts behind one that failed are not sent."""
    failed = (part.exception() for part in parts if not part.cancelled())
    told = (
        e
        for e in (error, *failed)
        if e and getattr(e, "code", "") != "NoSuchUpload" and not isinstance(e, CancelledError)
    )
    return next(told, error)


def _text(answer: urllib3.BaseHTTPResponse, name: str) -> str:
    """An element of an answer in XML, with or without a namespace; "" where it has none."""
    # The object store's own answer, and minio-py reads them no other way.
    return ElementTree.fromstring(answer.data).findtext(f"{{*}}{name}") or ""  # noqa: S314


def _joining(etags: Sequence[str]) -> bytes:
    """The body of CompleteMultipartUpload."""
    whole = ElementTree.Element("CompleteMultipartUpload")
    for number, etag in enumerate(etags, start=1):
        part = ElementTree.SubElement(whole, "Part")
        ElementTree.SubElement(part, "PartNumber").text = str(number)
        ElementTree.SubElement(part, "ETag").text = etag
    return ElementTree.tostring(whole)
