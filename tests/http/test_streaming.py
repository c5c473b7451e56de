"""Bodies of any size in flat memory."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from instances import BOUNDARY, new_instance, uid
from service import Service, running, wait_for

GIB = 1 << 30
PIECE = bytes(1 << 20)

# Fixed cost of threads, buffers and allocator, whatever the body.
FLAT_BYTES = 96 << 20


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running("run", tmp_path_factory.mktemp("roomy")) as service:
        yield service


def _large_instance(pixel_bytes: int) -> Iterator[bytes]:
    """A real file whose pixel data is this long."""
    ds = pydicom.dcmread(BytesIO(new_instance()))
    ds.PixelData = b"\0\0\0\0"
    ds["PixelData"].VR = "OW"
    file = BytesIO()
    ds.save_as(file)
    head = file.getvalue()
    start = head.index(b"\xe0\x7f\x10\x00OW\0\0") + 8
    yield head[:start] + pixel_bytes.to_bytes(4, "little")
    for _ in range(pixel_bytes // len(PIECE)):
        yield PIECE


def test_one_instance_of_2_gib_is_stored_in_flat_memory(roomy: Service) -> None:
    before = roomy.memory_bytes()
    highest = before

    def body() -> Iterator[bytes]:
        nonlocal highest
        for number, piece in enumerate(_large_instance(2 * GIB)):
            yield piece
            if number % 64 == 0:
                highest = max(highest, roomy.memory_bytes())

    answer = roomy.post("/dicomweb/studies", body(), "application/dicom")

    assert answer.status_code == 200, answer.text
    payload = roomy.opened(answer.headers["X-Payload-ID"])
    (entry,) = payload["workflow_request"]["payload"]
    stored: Path = roomy.data / "monaideploy" / payload["payload_id"] / entry["path"]
    assert stored.stat().st_size > 2 * GIB
    assert max(highest, roomy.memory_bytes()) - before < FLAT_BYTES
    stored.unlink()


def test_5000_instances_in_one_request_are_stored_in_flat_memory(roomy: Service) -> None:
    template = new_instance(SOPInstanceUID="2.25." + "1" * 30)
    before = roomy.memory_bytes()
    highest = before

    def body() -> Iterator[bytes]:
        nonlocal highest
        for number in range(5000):
            sop_instance_uid = f"2.25.{10**29 + number:030}".encode()
            yield f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
            yield template.replace(b"2.25." + b"1" * 30, sop_instance_uid) + b"\r\n"
            if number % 500 == 0:
                highest = max(highest, roomy.memory_bytes())
        yield f"--{BOUNDARY}--\r\n".encode()

    answer = roomy.post("/dicomweb/studies", body(), f"multipart/related; boundary={BOUNDARY}")

    assert answer.status_code == 200, answer.text
    assert len(answer.json()["00081199"]["Value"]) == 5000
    payload = roomy.opened(answer.headers["X-Payload-ID"], seconds=120)
    assert payload["file_count"] == len(payload["workflow_request"]["payload"]) == 5000
    assert max(highest, roomy.memory_bytes()) - before < FLAT_BYTES


def test_parts_are_stored_while_later_ones_arrive(roomy: Service) -> None:
    first = new_instance()
    name = f"{uid(first, 'SOPInstanceUID')}.dcm"
    head = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()

    def first_is_stored() -> bool:
        return any((roomy.data / "monaideploy").rglob(name))

    def body() -> Iterator[bytes]:
        yield head + first + b"\r\n" + head
        for number, piece in enumerate(_large_instance(8 * len(PIECE))):
            yield piece
            if number == 4:
                wait_for(first_is_stored)
        yield f"\r\n--{BOUNDARY}--".encode()

    answer = roomy.post("/dicomweb/studies", body(), f"multipart/related; boundary={BOUNDARY}")

    assert answer.status_code == 200
    assert len(answer.json()["00081199"]["Value"]) == 2
