"""A sender over a limit gets its error while it is sending, and nothing of the request is kept."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pydicom
import pytest
from disks import small_disk
from instances import BOUNDARY, multipart, new_instance, uid
from pydicom.uid import DeflatedExplicitVRLittleEndian
from service import Service, running, wait_for

DICOM = "Content-Type: application/dicom"
MULTIPART = f"Content-Type: multipart/related; boundary={BOUNDARY}"
CHUNKED = "Transfer-Encoding: chunked"
PART = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()

# Far beyond the duration of these tests, so that no sender counts as stalled.
IDLE_SECONDS = 60


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Runs a service with small limits, each of which can be reached before the others."""
    with running(
        "run",
        tmp_path_factory.mktemp("narrow"),
        STOWGATE_IDLE_SECONDS=str(IDLE_SECONDS),
        STOWGATE_MAX_REQUEST_LINE_BYTES="300",
        STOWGATE_MAX_HEAD_BYTES="2000",
        STOWGATE_MAX_BODY_BYTES="3000000",
        STOWGATE_MAX_PART_BYTES="2000000",
        STOWGATE_MAX_PARTS="3",
        STOWGATE_MAX_PART_HEADER_BYTES="400",
        STOWGATE_MAX_NESTED_SEQUENCES="1",
        STOWGATE_MAX_ELEMENTS="1000",
        STOWGATE_MAX_METADATA_BYTES="65536",
    ) as service:
        yield service


@contextmanager
def _sending(service: Service, sent: bytes) -> Iterator[socket.socket]:
    """Open a connection and send the beginning of a request."""
    place = urlsplit(service.url)
    with socket.create_connection((place.hostname, place.port), IDLE_SECONDS / 2) as sock:
        sock.sendall(sent)
        yield sock


def _head(*fields: str, path: str = "/dicomweb/studies") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *fields, "", ""]).encode()


def _chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def _refusal(sock: socket.socket) -> tuple[int, dict[str, str], str]:
    """Read the status, the headers and the detail of the response."""
    received = b""
    while piece := sock.recv(65536):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    headers = dict(re.findall(r"([^\r\n:]+): ([^\r\n]*)", head.decode().partition("\r\n")[2]))
    assert headers["Content-Type"] == "application/problem+json"
    problem = orjson.loads(body)
    status = int(head.split()[1])
    assert problem["status"] == status
    return status, headers, problem["detail"]


def _kept(service: Service) -> list[Path]:
    return [p for p in (service.data / "monaideploy").rglob("*.dcm") if p.is_file()]


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        pytest.param(
            f"POST /dicomweb/{'w' * 400}".encode(), 414, "request line", id="request line"
        ),
        pytest.param(_head(f"X-A: {'a' * 2000}")[:-4], 431, "header fields", id="one header field"),
        pytest.param(
            _head(*[f"X-{n}: {'a' * 50}" for n in range(50)])[:-2], 431, "header", id="all fields"
        ),
        pytest.param(
            _head(*[f"X-{n}: {'a' * 50}" for n in range(50)]), 431, "header", id="whole head"
        ),
        pytest.param(
            _head(DICOM, "Content-Length: 3000001"), 413, "3000000 bytes", id="body by length"
        ),
        pytest.param(
            _head(MULTIPART, CHUNKED)
            + _chunks(PART, bytes(1_500_000), b"\r\n" + PART)
            + _chunks(bytes(1_500_000)),
            413,
            "3000000 bytes",
            id="body in chunks",
        ),
        pytest.param(
            _head(DICOM, CHUNKED) + _chunks(bytes(2_000_001), bytes(200_000)),
            413,
            "part 1 is over the limit of 2000000",
            id="only part",
        ),
        pytest.param(
            _head(MULTIPART, CHUNKED) + _chunks(PART, bytes(2_100_000)),
            413,
            "part 1 is over the limit of 2000000",
            id="part",
        ),
        pytest.param(
            _head(MULTIPART, CHUNKED) + _chunks(*[PART + b"x\r\n"] * 4, bytes(1 << 20)),
            413,
            "more parts than the limit of 3",
            id="parts",
        ),
        pytest.param(
            _head(MULTIPART, CHUNKED) + _chunks(PART[:-2] + b"X-A: " + bytes(1 << 20)),
            400,
            "longer than 400 bytes",
            id="part headers",
        ),
        pytest.param(
            _head(MULTIPART, CHUNKED) + _chunks(bytes(1 << 20), bytes(1 << 20)),
            400,
            "no delimiter in the first",
            id="text before the first boundary",
        ),
        pytest.param(
            _head(f"{MULTIPART}{'b' * 200}", CHUNKED), 400, "1 to 200 characters", id="boundary"
        ),
    ],
)
def test_a_request_over_a_limit_is_rejected_while_it_arrives(
    narrow: Service, sent: bytes, status: int, words: str
) -> None:
    before = _kept(narrow)

    with _sending(narrow, sent) as sock:
        answered, _, detail = _refusal(sock)

    assert answered == status
    assert words in detail
    assert _kept(narrow) == before


def test_one_header_field_may_fill_the_head(narrow: Service) -> None:
    head = _head(DICOM, "Content-Length: 0", "X-A: ")

    with _sending(narrow, head.replace(b"X-A: ", b"X-A: " + b"a" * (2000 - len(head)))) as sock:
        assert sock.recv(65536).startswith(b"HTTP/1.1 204 ")


def test_trailers_have_the_size_limit_of_the_head(narrow: Service) -> None:
    chunked = _head(DICOM, CHUNKED) + _chunks(new_instance())
    for size_bytes, status in ((1900, b"200"), (3000, b"400")):
        with _sending(narrow, chunked + b"0\r\nX-A: " + b"a" * size_bytes) as sock:
            if status == b"200":
                sock.sendall(b"\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 " + status)


def _nested(depth: int) -> bytes:
    ds = pydicom.Dataset()
    for _ in range(depth):
        outer = pydicom.Dataset()
        outer.ReferencedSeriesSequence = [ds]
        ds = outer
    return new_instance(ReferencedSeriesSequence=ds.ReferencedSeriesSequence)


def test_an_instance_nested_too_deeply_fails_alone_with_c000(narrow: Service) -> None:
    answer = narrow.post("/dicomweb/studies", *multipart(_nested(3), new_instance()))

    assert answer.status_code == 202, answer.text
    (failed,) = answer.json()["00081198"]["Value"]
    assert failed["00081197"]["Value"] == [0xC000]
    assert "within 1 others" in failed["00091001"]["Value"][0]


@pytest.mark.parametrize(
    ("large", "tag", "vr"),
    [
        (
            {"ReferencedSeriesSequence": [pydicom.Dataset() for _ in range(1000)]},
            "00081115",
            "SQ",
        ),
        ({"TextValue": "t" * 70_000}, "0040A160", "UT"),
    ],
    ids=["elements", "bytes"],
)
def test_an_instance_over_the_metadata_limits_is_stored_and_described_in_part(
    narrow: Service, large: dict[str, Any], tag: str, vr: str
) -> None:
    instance = new_instance(**large)

    answer = narrow.post("/dicomweb/studies", *multipart(instance))

    assert answer.status_code == 200, answer.text
    payload_id = answer.headers["X-Payload-ID"]
    narrow.opened(payload_id)
    (stored,) = (narrow.data / "monaideploy" / payload_id).rglob("*.dcm")
    assert stored.read_bytes() == instance
    sidecar = json.loads(stored.with_name(f"{stored.name}.json").read_bytes())
    assert sidecar[tag] == {"vr": vr}
    assert sidecar["00100020"]["Value"] == [uid(instance, "PatientID")]


def test_a_sender_over_its_rate_limit_gets_429_before_its_body(tmp_path: Path) -> None:
    with running("run", tmp_path, STOWGATE_RATE_PER_SENDER="2") as service:
        for _ in range(2):
            answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")
            assert answer.status_code == 200

        with _sending(service, _head(DICOM, CHUNKED)) as sock:
            status, headers, words = _refusal(sock)

        assert status == 429
        assert 1 <= int(headers["Retry-After"]) <= 30
        assert "rate limit exceeded: 2 requests per minute from this address" in words
        assert service.get("/health/live").status_code == 200


def test_an_upload_over_the_concurrency_limit_gets_429_before_its_body(tmp_path: Path) -> None:
    with (
        running(
            "run", tmp_path, STOWGATE_MAX_UPLOADS="1", STOWGATE_UPLOAD_WAIT_SECONDS="0"
        ) as service,
        _sending(service, _head(DICOM, CHUNKED) + _chunks(new_instance())) as first,
    ):
        wait_for(lambda: "stowgate_uploads_in_progress 1.0" in service.get("/metrics").text)

        with _sending(service, _head(DICOM, CHUNKED)) as second:
            status, headers, words = _refusal(second)
        first.sendall(b"0\r\n\r\n")

        assert status == 429
        assert int(headers["Retry-After"]) > 0
        assert "too many concurrent uploads (limit: 1)" in words
        assert first.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.fixture
def small_spool(tmp_path: Path) -> Iterator[Service]:
    """Runs a service with a spool on a disk of 3 MiB."""
    with small_disk(tmp_path / "small", mebibytes=3) as disk:
        data = tmp_path / "data"
        data.mkdir()
        (data / "spool").symlink_to(disk)
        settings = {"STOWGATE_SPOOL_MEMORY_BYTES": "100000", "STOWGATE_MIN_FREE_BYTES": "500000"}
        with running("run", data, **settings) as service:
            yield service


def _deflated(inflated_bytes: int) -> bytes:
    ds = pydicom.dcmread(BytesIO(new_instance(PixelData=bytes(inflated_bytes))))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    file = BytesIO()
    ds.save_as(file)
    return file.getvalue()


@pytest.mark.parametrize(
    "large",
    [
        pytest.param(new_instance(PixelData=bytes(4 << 20)), id="on arrival"),
        pytest.param(_deflated(4 << 20), id="when inflated"),
    ],
)
def test_a_full_spool_is_507_and_leaves_nothing_of_the_upload(
    small_spool: Service, large: bytes
) -> None:
    answer = small_spool.post("/dicomweb/studies", *multipart(new_instance(), large))

    assert answer.status_code == 507, answer.text
    assert "the spool's disk" in answer.json()["detail"]
    assert "nothing was acknowledged" in answer.json()["detail"]
    wait_for(lambda: _kept(small_spool) == [])
    assert list((small_spool.data / "spool").iterdir()) == []

    small = small_spool.post("/dicomweb/studies", *multipart(new_instance()))
    assert small.status_code == 200, small.text


def test_a_spool_past_its_watermark_is_507_before_the_body(small_spool: Service) -> None:
    (small_spool.data / "spool" / "other").write_bytes(bytes(2_900_000))

    with _sending(small_spool, _head(DICOM, CHUNKED)) as sock:
        status, _, words = _refusal(sock)

    assert status == 507
    assert "STOWGATE_MIN_FREE_BYTES" in words
    assert _kept(small_spool) == []


def test_a_store_past_its_watermark_is_507_before_the_body(tmp_path: Path) -> None:
    with (
        running("run", tmp_path, STOWGATE_MIN_FREE_BYTES=str(10**17)) as service,
        _sending(service, _head(DICOM, CHUNKED)) as sock,
    ):
        status, _, words = _refusal(sock)

        assert status == 507
        assert "monaideploy: its disk has less free space than STOWGATE_MIN_FREE_BYTES" in words
        assert _kept(service) == []
        ready = service.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert ready.json()["dependencies"]["free_space"]["status"] == "down"
