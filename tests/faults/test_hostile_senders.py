"""Senders that break off, dawdle, or send what is meant to hurt; healthy ones beside them."""

import gzip
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import pydicom
import pytest
import requests
from engines import ObjectStoreEndpoint
from instances import BOUNDARY, multipart, new_instance, real_file
from ledger import WITNESS, Ledger
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian
from reconciliation import reconcile
from service import wait_for
from stowgate_site import Node, Site, study

MIB = 1 << 20
HEAD = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
MULTIPART = f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'
CANNOT_UNDERSTAND, OUT_OF_RESOURCES = 0xC000, 0xA700

# Threads, buffers and what the allocator keeps, whatever is sent.
FLAT_BYTES = 64 * MIB

API_THREADS = 10
MAX_PART_BYTES = 8 * MIB


@dataclass(frozen=True)
class Front:
    """A site that these tests share, with two replicas of the API."""

    site: Site
    api: Node
    other_api: Node
    worker: Node

    def send(self, body: object, content_type: str, **headers: str) -> requests.Response:
        answer: requests.Response = self.api.service.post(
            "/dicomweb/studies", body, content_type, **headers
        )
        return answer

    def connect(self, head: str) -> socket.socket:
        """A connection on which this much of a request was sent."""
        url = urlsplit(self.api.service.url)
        connection = socket.create_connection((url.hostname or "", url.port or 0), timeout=30)
        connection.sendall(head.encode())
        return connection

    def post_exactly(self, path: str) -> int:
        """The status of a good POST to that path, which `requests` would have normalized."""
        url = urlsplit(self.api.service.url)
        with closing(HTTPConnection(url.netloc, timeout=30)) as connection:
            connection.request("POST", path, real_file(), {"Content-Type": "application/dicom"})
            return connection.getresponse().status

    def begin_post(self, length: int) -> socket.socket:
        return self.connect(
            "POST /dicomweb/studies HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/dicom\r\nContent-Length: {length}\r\n\r\n"
        )

    def reconcile(self) -> Ledger:
        """Besides, nothing may be left of what was refused."""
        wait_for(lambda: not self._orphans())
        return reconcile(self.site, stop=False)

    def _orphans(self) -> set[str]:
        ids = {key.partition("/")[0] for key in self.site.payloads.listing()}
        return ids - self.site.records().keys() - {WITNESS}


@pytest.fixture(scope="module")
def front(
    object_store_endpoint: ObjectStoreEndpoint,
    broker_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Front]:
    site = Site(
        tmp_path_factory.mktemp("hostile"),
        broker_url,
        object_store_endpoint,
        STOWGATE_API_THREADS=str(API_THREADS),
        STOWGATE_MAX_PART_BYTES=str(MAX_PART_BYTES),
    )
    site.start_workflow_manager()
    with ExitStack() as stack:
        stack.callback(site.remove)
        stack.callback(site.close)
        found = Front(site, site.api(), site.api(), site.worker())
        # Warm, so that what a first request costs counts for no test.
        assert site.post(found.api, study(3)).status_code == 200
        yield found


@pytest.fixture
def flat_memory(front: Front) -> Iterator[None]:
    """Whatever the test sends, the API's memory stays where it was all the while."""
    before, highest, done = front.api.service.memory_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], front.api.service.memory_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    yield
    done.set()
    watching.join()
    assert highest[0] - before < FLAT_BYTES


def _answer(connection: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_a_sender_that_disconnects_mid_body_gets_400_and_leaves_no_record_and_no_event(
    front: Front,
) -> None:
    records = front.site.records().keys()
    data = new_instance()
    for part_sent in (0, 1000, len(data) - 1):
        with front.begin_post(len(data)) as connection:
            connection.sendall(data[:part_sent])
            connection.shutdown(socket.SHUT_WR)
            assert _answer(connection).startswith(b"HTTP/1.1 400 ")
    with front.begin_post(len(data)) as connection:
        connection.sendall(data[:1000])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    assert front.site.post(front.api, study()).status_code == 200
    ledger = front.reconcile()
    assert len(ledger.payloads) == len(records) + 1


def test_slow_senders_are_cut_off_at_a_deadline_while_others_are_served(
    front: Front,
) -> None:
    done = threading.Event()

    def trickle(connection: socket.socket) -> None:
        with suppress(OSError):
            while not done.wait(0.3):
                connection.sendall(b"x")

    with ExitStack() as stack:
        stalled, trickling = (
            [stack.enter_context(front.begin_post(MIB)) for _ in range(4)] for _ in range(2)
        )
        threads = [threading.Thread(target=trickle, args=[c], daemon=True) for c in trickling]
        for thread in threads:
            thread.start()
        for connection in stalled:
            connection.sendall(b"x" * 1000)

        # Eight slots, all taken, until the deadlines free them; ten threads.
        def served() -> bool:
            return front.site.post(front.api, study(1)).status_code == 200

        assert front.api.service.get("/health/live").status_code == 200
        wait_for(served, seconds=20)
        for connection in (*stalled, *trickling):
            assert _answer(connection).startswith(b"HTTP/1.1 408 ")
        done.set()
        for thread in threads:
            thread.join()
    front.reconcile()


def test_senders_that_never_finish_their_headers_do_not_block_others(
    front: Front,
) -> None:
    with ExitStack() as stack:
        for _ in range(3 * API_THREADS):
            stack.enter_context(front.connect("POST /dicomweb/studies HTTP/1.1\r\nHost: lo"))

        def served() -> bool:
            with suppress(requests.Timeout):
                answer = front.site.post(front.api, study(1), timeout_seconds=5.0)
                return bool(answer.status_code == 200)
            return False

        wait_for(served, seconds=15)
    front.reconcile()


def _failures(answer: requests.Response) -> list[dict[str, Any]]:
    """Of the Failed SOP Sequence and the Other Failures Sequence."""
    dataset = answer.json()
    return [i for tag in ("00081198", "0008119A") for i in dataset.get(tag, {}).get("Value", [])]


@pytest.mark.usefixtures("flat_memory")
def test_an_oversized_part_is_refused_while_streaming_in_flat_memory(front: Front) -> None:
    def body() -> Iterator[bytes]:
        good, _ = multipart(new_instance())
        yield good[: -len(f"--{BOUNDARY}--\r\n")] + HEAD
        for _ in range(60):
            yield bytes(MIB)

    assert front.send(body(), MULTIPART).status_code == 413
    front.reconcile()


@pytest.mark.usefixtures("flat_memory")
def test_100_000_tiny_parts_are_refused_while_streaming_in_flat_memory(front: Front) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(1000):
            yield (HEAD + b"x\r\n") * 100
        yield f"--{BOUNDARY}--\r\n".encode()

    assert front.send(body(), MULTIPART).status_code == 413
    front.reconcile()


@pytest.mark.usefixtures("flat_memory")
def test_a_gzip_body_is_415_and_never_inflated(front: Front) -> None:
    bomb = gzip.compress(bytes(512 * MIB), compresslevel=1)

    answer = front.send(bomb, "application/dicom", **{"Content-Encoding": "gzip"})

    assert answer.status_code == 415
    front.reconcile()


def _head_of_dataset(transfer_syntax: str | None = None) -> tuple[bytes, bytes]:
    """The file meta information, and the data set up to its pixel data, in explicit VR."""
    ds = pydicom.dcmread(BytesIO(new_instance()))
    if transfer_syntax is not None:
        ds.file_meta.TransferSyntaxUID = UID(transfer_syntax)
    meta = pydicom.filebase.DicomBytesIO()
    pydicom.filewriter.write_file_meta_info(meta, ds.file_meta)
    for element in [element for element in ds if element.tag >= 0x7FE00000]:
        del ds[element.tag]
    plain = pydicom.filebase.DicomBytesIO()
    plain.is_little_endian, plain.is_implicit_VR = True, False
    pydicom.filewriter.write_dataset(plain, ds)
    return bytes(128) + b"DICM" + meta.getvalue(), plain.getvalue()


def _deflate_bomb() -> bytes:
    head, dataset = _head_of_dataset(DeflatedExplicitVRLittleEndian)
    deflate = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
    pixels = 512 * MIB
    element = b"\xe0\x7f\x10\x00OW\0\0" + pixels.to_bytes(4, "little")
    packed = [head, deflate.compress(dataset + element)]
    packed += [deflate.compress(bytes(MIB)) for _ in range(pixels // MIB)]
    return b"".join([*packed, deflate.flush()])


def _too_many_elements() -> bytes:
    head, dataset = _head_of_dataset(DeflatedExplicitVRLittleEndian)
    deflate = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
    elements = b"\xe1\x7f\x10\x10LO\0\0" * 2_000_000
    return b"".join([head, deflate.compress(dataset + elements), deflate.flush()])


def _nested(depth: int) -> bytes:
    head, dataset = _head_of_dataset()
    down = b"\xe1\x7f\x10\x10SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    up = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    return head + dataset + down * depth + up * depth


def _empty_elements(count: int) -> bytes:
    head, dataset = _head_of_dataset()
    tags = ((0x7FE1 + 2 * (n >> 15), 0x1000 + (n & 0x7FFF)) for n in range(count))
    return head + dataset + b"".join(struct.pack("<HH2sH", *tag, b"LO", 0) for tag in tags)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_deflate_bomb, OUT_OF_RESOURCES),
        (partial(_nested, 10_000), CANNOT_UNDERSTAND),
        (_too_many_elements, OUT_OF_RESOURCES),
    ],
    ids=["deflate bomb", "10,000 sequences nested", "2,000,000 empty elements"],
)
def test_an_instance_over_the_structural_limits_fails_alone_in_flat_memory(
    front: Front, make: "partial[bytes]", reason: int, request: pytest.FixtureRequest
) -> None:
    bad, good = make(), study(2)
    request.getfixturevalue("flat_memory")

    answer = front.site.post(front.api, good, beside=[bad])

    assert answer.status_code == 202, answer.text
    (failed,) = _failures(answer)
    assert failed["00081197"]["Value"] == [reason]
    front.site.opened(answer.headers["X-Payload-ID"])
    assert front.worker.service.process.poll() is None
    front.reconcile()


def test_an_instance_within_the_limits_passes_where_its_like_fails(front: Front) -> None:
    instances = [_nested(50), _empty_elements(300_000)]

    for instance in instances:
        assert front.site.post(front.api, [instance]).status_code == 200
    front.reconcile()


HOSTILE = ["../../../etc/passwd", "..", "1.2/../3", "1.2\r\nX: y", "1.\0.2", "\x1b[31m1.2"]
TOO_LONG = "1" * 129


@pytest.mark.parametrize("text", [*HOSTILE, TOO_LONG])
def test_traversal_and_control_characters_in_ids_never_become_object_names(
    front: Front, text: str
) -> None:
    raw = "".join(f"%{byte:02x}" for byte in text.encode())
    paths = (f"studies/{raw}", f"{raw}/studies", f"vae/{raw}/studies", f"vae/{raw}/w/studies")
    vae = requests.post(
        f"{front.api.service.url}/config/vae",
        json={"virtualAeTitle": text, "workflows": [text]},
        timeout=30,
    )
    answers = [
        front.send(_with_uid(keyword, text), "application/dicom")
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    ]

    assert {path: front.post_exactly(f"/dicomweb/{path}") for path in paths} == dict.fromkeys(
        paths, 400
    )
    assert vae.status_code == 400
    for answer in answers:
        assert answer.status_code == 409
        (failed,) = _failures(answer)
        assert failed["00081197"]["Value"] == [CANNOT_UNDERSTAND]
    assert "etc/passwd" not in front.api.log()
    assert "\x1b" not in front.api.log()
    front.reconcile()


def _with_uid(keyword: str, text: str) -> bytes:
    """A file with this for a UID; the length stays even (PS3.5 9.1)."""
    with pydicom.config.disable_value_validation():
        return new_instance(**{keyword: text})


def test_one_of_many_concurrent_creations_of_a_vae_gets_201_and_the_others_409(
    front: Front,
) -> None:
    count = 16
    titles = ("FIRST-OF-ALL", "LATER")  # the registry is created, and then changed
    for created, title in enumerate(titles, start=1):
        barrier = threading.Barrier(count)

        def create(number: int, title: str = title, barrier: threading.Barrier = barrier) -> int:
            api = (front.api, front.other_api)[number % 2]
            barrier.wait(30)
            answer = requests.post(
                f"{api.service.url}/config/vae",
                json={"virtualAeTitle": title, "workflows": [f"w-{number}"]},
                timeout=60,
            )
            return answer.status_code

        with ThreadPoolExecutor(count) as callers:
            statuses = sorted(callers.map(create, range(count)))

        assert statuses == [201] + [409] * (count - 1)
        for api in (front.api, front.other_api):
            listed = api.service.get("/config/vae").json()
            assert sorted(vae["virtualAeTitle"] for vae in listed) == sorted(titles[:created])
    front.reconcile()
