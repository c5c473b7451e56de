"""What is sent: loads of instances that differ in their UIDs, and a sender that costs little."""

import http.client
import io
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import UID, generate_uid

_BOUNDARY = "stowgate-bench-7e0c1f6a"
PART_HEAD = f"\r\n--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
END = f"\r\n--{_BOUNDARY}--\r\n".encode()
_CONTENT_TYPE = f'multipart/related; type="application/dicom"; boundary="{_BOUNDARY}"'

_BLOCK_BYTES = 1 << 20
_UID_CHARACTERS = 44
_MAX_WAIT_SECONDS = 120.0

_run = int.from_bytes(os.urandom(8), "big")
_serial = itertools.count(1)


@dataclass(frozen=True)
class Load:
    """`senders` at once, each of which POSTs `posts` times `instances` of `pixel_bytes`."""

    name: str
    senders: int
    posts: int
    instances: int
    pixel_bytes: int

    @property
    def all_posts(self) -> int:
        return self.senders * self.posts

    @property
    def all_instances(self) -> int:
        return self.all_posts * self.instances

    @property
    def size_bytes(self) -> int:
        return self.all_instances * template(self.pixel_bytes).size_bytes


@dataclass(frozen=True)
class Template:
    """A Part 10 file in front of its pixel data, cut where its SOP Instance UID stands."""

    cuts: tuple[bytes, ...]
    pixel_bytes: int

    @property
    def size_bytes(self) -> int:
        uids = (len(self.cuts) - 1) * _UID_CHARACTERS
        return sum(map(len, self.cuts)) + uids + self.pixel_bytes

    def instance(self) -> Iterator[bytes]:
        """A new instance, in pieces."""
        yield new_uid().encode().join(self.cuts)
        for start in range(0, self.pixel_bytes, _BLOCK_BYTES):
            yield _block()[: self.pixel_bytes - start]


def new_uid() -> str:
    return f"2.25.{_run % 10**19:019d}{next(_serial):020d}"


@cache
def _block() -> bytes:
    return os.urandom(_BLOCK_BYTES)


@cache
def template(pixel_bytes: int) -> Template:
    """A CT of the pydicom package with pixel data of that length: frames of 512 x 512 x 16 bit."""
    path = get_testdata_file("CT_small.dcm", download=False)
    assert isinstance(path, str)
    ds = pydicom.dcmread(path)
    side = 512 if pixel_bytes >= 1 << 19 else 96
    frames = pixel_bytes // (2 * side * side)
    assert frames * 2 * side * side == pixel_bytes, "whole frames only"
    ds.Rows = ds.Columns = side
    if frames > 1:
        ds.NumberOfFrames = frames
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    mark = UID("2.25." + "9" * (_UID_CHARACTERS - 5))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = mark
    # Behind the pixels it has trailing padding, which is irrelevant for a benchmark.
    del ds[0xFFFCFFFC]
    del ds.PixelData
    file = io.BytesIO()
    ds.save_as(file)
    header = b"\xe0\x7f\x10\x00OW\x00\x00" + pixel_bytes.to_bytes(4, "little")
    return Template(tuple((file.getvalue() + header).split(mark.encode())), pixel_bytes)


@dataclass(frozen=True)
class Answered:
    """One POST: when its first byte left, by `time.time`, how long it took, and what it became."""

    at: float
    seconds: float
    payload_id: str | None
    turned_away: int


class Sender:
    """One connection, on which one POST follows the other."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._path = parts.path
        self._connection = http.client.HTTPConnection(
            parts.hostname or "", parts.port, timeout=600, blocksize=_BLOCK_BYTES
        )

    def post(self, template: Template, instances: int) -> Answered:
        """Raises RuntimeError unless all is stored. One that is turned away waits and tries again,
        and its time goes on."""
        began_at, began = time.time(), time.perf_counter()
        turned_away = 0
        while True:
            status, retry_after, payload_id = self._try(template, instances)
            if status == 200:
                return Answered(began_at, time.perf_counter() - began, payload_id, turned_away)
            waited = time.perf_counter() - began
            if status not in (429, 503) or waited > _MAX_WAIT_SECONDS:
                raise RuntimeError(f"the answer was {status}")
            turned_away += 1
            time.sleep(float(retry_after or 1))

    def _try(self, template: Template, instances: int) -> tuple[int, str | None, str | None]:
        length = instances * (len(PART_HEAD) + template.size_bytes) + len(END)
        connection = self._connection
        connection.putrequest("POST", self._path, skip_accept_encoding=True)
        connection.putheader("Content-Type", _CONTENT_TYPE)
        connection.putheader("Content-Length", str(length))
        connection.putheader("Accept", "application/dicom+json")
        connection.endheaders()
        try:
            for _ in range(instances):
                pieces = template.instance()
                connection.send(PART_HEAD + next(pieces))
                for piece in pieces:
                    connection.send(piece)
            connection.send(END)
        except (BrokenPipeError, ConnectionResetError):
            pass  # an answer came before the body's end
        answer = connection.getresponse()
        answer.read()
        if answer.will_close:
            connection.close()
        return answer.status, answer.getheader("Retry-After"), answer.getheader("X-Payload-ID")

    def close(self) -> None:
        self._connection.close()


def send(url: str, load: Load) -> tuple[float, list[Answered]]:
    """Send a whole load; returns the seconds from the first byte to the last answer."""
    pattern = template(load.pixel_bytes)
    _block()
    together = threading.Barrier(load.senders + 1)

    def one_sender() -> list[Answered]:
        sender = Sender(url)
        try:
            together.wait()
            return [sender.post(pattern, load.instances) for _ in range(load.posts)]
        finally:
            sender.close()

    with ThreadPoolExecutor(load.senders) as threads:
        running = [threads.submit(one_sender) for _ in range(load.senders)]
        together.wait()
        began = time.perf_counter()
        answers = [answer for sender in running for answer in sender.result()]
    return time.perf_counter() - began, answers
