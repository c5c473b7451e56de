"""Bodies of any size in flat memory."""

from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from instances import BOUNDARY, new_instance, one_series, uid
from service import Service, running, wait_for

GIB = 1 << 30
PIECE = bytes(1 << 20)

# Fixed memory of threads, buffers and allocator.
FLAT_BYTES = 96 << 20

# 100 bytes for each of 10,000 parts, plus the allocator's overhead.
MANY_PARTS_BYTES = 16 << 20


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running("run", tmp_path_factory.mktemp("roomy")) as service:
        yield service


def _large_instance(pixel_bytes: int) -> Iterator[bytes]:
    """A real file with pixel data of this size."""
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


def _many(count: int, look: Callable[[], None]) -> Iterator[bytes]:
    """A body of that many instances; `look` is called from time to time."""
    for number, instance in enumerate(one_series(count)):
        yield f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        yield instance + b"\r\n"
        if number % 500 == 0:
            look()
    yield f"--{BOUNDARY}--\r\n".encode()


def test_5000_instances_in_one_request_are_stored_and_opened_in_flat_memory(
    roomy: Service,
) -> None:
    before = roomy.memory_bytes()
    seen = [before]

    answer = roomy.post(
        "/dicomweb/studies",
        _many(5000, lambda: seen.append(roomy.memory_bytes())),
        f"multipart/related; boundary={BOUNDARY}",
    )

    assert answer.status_code == 200, answer.text
    assert len(answer.json()["00081199"]["Value"]) == 5000
    payload = roomy.opened(answer.headers["X-Payload-ID"], seconds=120)
    assert payload["file_count"] == len(payload["workflow_request"]["payload"]) == 5000
    assert max(*seen, roomy.memory_bytes()) - before < FLAT_BYTES


def _note_memory(api: Service, seen: list[int]) -> None:
    seen.append(api.memory_bytes())


def test_10000_instances_take_hardly_more_memory_than_1000(tmp_path: Path) -> None:
    peaks = []
    with running("api", tmp_path) as api:
        for count in (1000, 10_000):
            seen: list[int] = []
            answer = api.post(
                "/dicomweb/studies",
                _many(count, partial(_note_memory, api, seen)),
                f"multipart/related; boundary={BOUNDARY}",
            )
            assert len(answer.json()["00081199"]["Value"]) == count
            peaks.append(max(*seen, api.memory_bytes()))
            listed = api.get("/payloads").json()["payloads"]
            assert listed[0]["file_count"] == count
            peaks[-1] = max(peaks[-1], api.memory_bytes())

    assert peaks[1] - peaks[0] < MANY_PARTS_BYTES


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
