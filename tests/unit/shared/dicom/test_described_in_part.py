"""Valid instances that are too large for a complete sidecar."""

import json
from typing import Any

import pytest
from encoded import (
    DEFLATED,
    IMPLICIT,
    SEQUENCE_END,
    UNDEFINED,
    deflated,
    element,
    file_with,
    implicit_element,
    item,
    without,
)

from shared.dicom.limits import DEFAULT, MAX_LEFT_OUT, MAX_WITHOUT_VALUE, StructureLimits
from shared.dicom.metadata import metadata_json
from shared.dicom.structure import check_structure

PER_FRAME = 0x52009230
NAME = element(0x00100010, "PN", b"Doe^Jane")
NAME_JSON = {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane"}]}
PIXELS = element(0x7FE00010, "OB", b"x" * 5000)
PRIVATE_UT = element(0x00091001, "UT", b"x" * 1_000_000)


def sidecar(data: bytes, limits: StructureLimits) -> dict[str, Any]:
    """Build the sidecar as the worker does, without the bytes that the API leaves out."""
    left_out = check_structure(data, limits=limits).left_out
    kept = data if left_out.is_inflated else without(data, left_out.ranges)
    result = json.loads(metadata_json(kept, left_out))
    assert isinstance(result, dict)
    return result


def segmentation(frames: int) -> bytes:
    """Return a segmentation with functional groups of 26 data elements and Items per frame."""
    group = b"".join(
        element(tag, "SQ", item(element(0x00200011, "IS", b"1 ") * 4))
        for tag in (0x00209111, 0x00209113, 0x0062000A, 0x00081140)
    ) + element(0x00189074, "DT")
    per_frame = item(group) * frames
    return NAME + element(PER_FRAME, "SQ", per_frame) + PIXELS


def test_a_segmentation_of_12_000_frames_is_stored_and_its_frames_have_no_value() -> None:
    data = file_with(segmentation(12_000))
    result = sidecar(data, DEFAULT)
    assert result == {"00100010": NAME_JSON, "52009230": {"vr": "SQ"}}
    unlimited = sidecar(data, StructureLimits(max_elements=400_000))
    assert len(unlimited["52009230"]["Value"]) == 12_000


def test_per_frame_data_of_80_mb_is_stored_and_has_no_value() -> None:
    frames = item(element(0x00209111, "UT", b"x" * 80_000)) * 1000
    last = element(0x52009231, "LO", b"text")
    for begin in (
        element(PER_FRAME, "SQ", frames),
        element(PER_FRAME, "SQ", frames + SEQUENCE_END, UNDEFINED),
    ):
        result = sidecar(file_with(NAME + begin + last + PIXELS), DEFAULT)
        assert result.keys() == {"00100010", "52009230", "52009231"}
        assert result["52009230"] == {"vr": "SQ"}
        assert result["00100010"] == NAME_JSON


def test_every_top_level_element_that_fits_is_described() -> None:
    large = element(0x00081140, "SQ", item(NAME) * 30)
    small = element(0x00081150, "SQ", item(NAME))
    last = element(0x00200011, "IS", b"1 ")
    data = file_with(large + small + last)
    result = sidecar(data, StructureLimits(max_elements=20))
    assert result == {
        "00081140": {"vr": "SQ"},
        "00081150": {"vr": "SQ", "Value": [{"00100010": NAME_JSON}]},
        "00200011": {"vr": "IS", "Value": [1]},
    }


def test_a_text_that_is_too_large_has_no_value() -> None:
    data = file_with(NAME + element(0x00104000, "UT", b"x" * 70_000) + PIXELS)
    assert sidecar(data, StructureLimits(max_metadata_bytes=1 << 16)) == {
        "00100010": NAME_JSON,
        "00104000": {"vr": "UT"},
    }


def test_bulk_values_do_not_count_towards_the_limits() -> None:
    data = file_with(NAME + PIXELS * 100)
    assert sidecar(data, StructureLimits(max_metadata_bytes=1 << 16)) == {"00100010": NAME_JSON}
    assert check_structure(data).left_out.without_value == ()


def test_an_ambiguous_vr_is_resolved_also_for_an_element_without_a_value() -> None:
    signed = implicit_element(0x00280103, b"\1\0")
    table = implicit_element(0x00283006, b"\1\0" * 40_000)  # US or OW: OW
    smallest = implicit_element(0x00280106, b"\1\0" * 40_000)  # US or SS
    data = file_with(signed + smallest + table, IMPLICIT)
    result = sidecar(data, StructureLimits(max_metadata_bytes=1 << 16))
    assert result["00280106"] == {"vr": "SS"}


@pytest.mark.parametrize("kind", ["elements", "sequences", "large elements"])
def test_elements_that_the_record_has_no_room_for_are_not_described(kind: str) -> None:
    content = {
        "elements": element(0x00091001, "LO"),
        "sequences": element(0x00091001, "SQ", item()),
        "large elements": element(0x00091001, "UT", b"x" * 5000),
    }[kind]
    data = file_with(NAME + content * 3000)
    left_out = check_structure(data, limits=StructureLimits(max_elements=100)).left_out
    assert len(left_out.ranges) <= MAX_LEFT_OUT + 1
    assert len(left_out.without_value) <= MAX_WITHOUT_VALUE
    assert sidecar(data, StructureLimits(max_elements=100))["00100010"] == NAME_JSON


def test_nothing_is_described_after_the_maximum_number_of_ranges() -> None:
    first = element(0x00080060, "CS", b"CT")
    data = file_with(first + (PIXELS + element(0x00091001, "LO", b"ab")) * 1500 + NAME)
    structure = check_structure(data)
    assert len(structure.left_out.ranges) <= MAX_LEFT_OUT + 1
    result = sidecar(data, DEFAULT)
    assert "00100010" not in result
    assert result["00080060"]["Value"] == ["CT"]


def test_a_deflated_data_set_is_described_in_part_within_the_same_limits() -> None:
    data = file_with(deflated(segmentation(12_000)), DEFLATED)
    result = sidecar(data, DEFAULT)
    assert result == {"00100010": NAME_JSON, "52009230": {"vr": "SQ"}}
    unlimited = sidecar(data, StructureLimits(max_elements=400_000))
    assert len(unlimited["52009230"]["Value"]) == 12_000


def test_small_public_elements_are_described_after_a_large_sequence() -> None:
    sequence = element(0x00081140, "SQ", item() * 199_999)
    identity = NAME + element(0x0020000D, "UI", b"1.2.5\0")
    for many in (sequence, element(0x00091001, "LO") * 300_000, PRIVATE_UT * 100):
        result = sidecar(file_with(many + identity), DEFAULT)
        assert result["00100010"] == NAME_JSON
        assert result["0020000D"]["Value"] == ["1.2.5"]


def test_the_character_set_is_described_before_a_name_that_depends_on_it() -> None:
    large = element(0x00080006, "SQ", item(element(0x00104000, "UT", b"x" * 60_000)))
    character_set = element(0x00080005, "CS", b"ISO_IR 192")
    name = element(0x00100010, "PN", "é".encode())
    for size_bytes in range(1 << 16, 70_000, 499):
        limits = StructureLimits(max_metadata_bytes=size_bytes)
        result = sidecar(file_with(character_set + large + name + PIXELS), limits)
        assert result["00100010"]["Value"] == [{"Alphabetic": "é"}]


def test_a_group_length_is_omitted_and_not_listed_without_a_value() -> None:
    length = element(0x00100000, "UL", b"\0\0\0\0") * 20_000
    result = sidecar(file_with(length + NAME), StructureLimits(max_elements=1000))
    assert "00100000" not in result


def test_padding_after_the_data_set_does_not_count_towards_the_limits() -> None:
    data = file_with(NAME) + bytes(70_000)
    assert sidecar(data, StructureLimits(max_metadata_bytes=1 << 16)) == {"00100010": NAME_JSON}


def test_large_private_sequences_are_left_out_like_others() -> None:
    creator = element(0x20010010, "LO", b"Philips Imaging DD 001")
    items = item(implicit_element(0x00080100, b"A ")) * 1000
    data = file_with(NAME + creator + element(0x2001105F, "UN", items))
    result = sidecar(data, StructureLimits(max_elements=100))
    assert result["2001105F"] == {"vr": "SQ"}
