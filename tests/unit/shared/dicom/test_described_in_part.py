"""Instances that are understood, and too large to be described in full."""

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

from shared.dicom import limits
from shared.dicom.limits import MAX_LEFT_OUT, MAX_WITHOUT_VALUE, StructureLimits
from shared.dicom.metadata import metadata_json
from shared.dicom.structure import check_structure

PER_FRAME = 0x52009230
NAME = element(0x00100010, "PN", b"Doe^Jane")
DESCRIBED_NAME = {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane"}]}
PIXELS = element(0x7FE00010, "OB", b"x" * 5000)
PRIVATE_UT = element(0x00091001, "UT", b"x" * 1_000_000)


def sidecar(data: bytes, given: StructureLimits) -> dict[str, Any]:
    """As the worker makes it: of what the API has it read."""
    left_out = check_structure(data, limits=given).left_out
    kept = data if left_out.is_inflated else without(data, left_out.ranges)
    result = json.loads(metadata_json(kept, left_out))
    assert isinstance(result, dict)
    return result


def segmentation(frames: int) -> bytes:
    """26 elements and items for each frame, in functional groups and the sequences in them."""
    group = b"".join(
        element(tag, "SQ", item(element(0x00200011, "IS", b"1 ") * 4))
        for tag in (0x00209111, 0x00209113, 0x0062000A, 0x00081140)
    ) + element(0x00189074, "DT")
    per_frame = item(group) * frames
    return NAME + element(PER_FRAME, "SQ", per_frame) + PIXELS


def test_a_segmentation_of_12_000_frames_is_stored_and_its_frames_are_given_by_their_vr() -> None:
    data = file_with(segmentation(12_000))
    result = sidecar(data, limits.DEFAULT)
    assert result == {"00100010": DESCRIBED_NAME, "52009230": {"vr": "SQ"}}
    with_more_room = sidecar(data, StructureLimits(elements=400_000))
    assert len(with_more_room["52009230"]["Value"]) == 12_000


def test_per_frame_data_of_80_mb_is_stored_and_given_by_its_vr() -> None:
    frames = item(element(0x00209111, "UT", b"x" * 80_000)) * 1000
    last = element(0x52009231, "LO", b"text")
    for begin in (
        element(PER_FRAME, "SQ", frames),
        element(PER_FRAME, "SQ", frames + SEQUENCE_END, UNDEFINED),
    ):
        result = sidecar(file_with(NAME + begin + last + PIXELS), limits.DEFAULT)
        assert result.keys() == {"00100010", "52009230", "52009231"}
        assert result["52009230"] == {"vr": "SQ"}
        assert result["00100010"] == DESCRIBED_NAME


def test_everything_at_the_top_that_fits_is_described() -> None:
    large = element(0x00081140, "SQ", item(NAME) * 30)
    small = element(0x00081150, "SQ", item(NAME))
    last = element(0x00200011, "IS", b"1 ")
    data = file_with(large + small + last)
    result = sidecar(data, StructureLimits(elements=20))
    assert result == {
        "00081140": {"vr": "SQ"},
        "00081150": {"vr": "SQ", "Value": [{"00100010": DESCRIBED_NAME}]},
        "00200011": {"vr": "IS", "Value": [1]},
    }


def test_a_text_that_is_too_large_is_given_by_its_vr() -> None:
    data = file_with(NAME + element(0x00104000, "UT", b"x" * 70_000) + PIXELS)
    assert sidecar(data, StructureLimits(metadata_bytes=1 << 16)) == {
        "00100010": DESCRIBED_NAME,
        "00104000": {"vr": "UT"},
    }


def test_bulk_does_not_count() -> None:
    data = file_with(NAME + PIXELS * 100)
    assert sidecar(data, StructureLimits(metadata_bytes=1 << 16)) == {"00100010": DESCRIBED_NAME}
    assert check_structure(data).left_out.without_value == ()


def test_a_choice_of_vrs_is_settled_as_in_an_element_that_is_described() -> None:
    signed = implicit_element(0x00280103, b"\1\0")
    table = implicit_element(0x00283006, b"\1\0" * 40_000)  # US or OW: OW
    smallest = implicit_element(0x00280106, b"\1\0" * 40_000)  # US or SS
    data = file_with(signed + smallest + table, IMPLICIT)
    result = sidecar(data, StructureLimits(metadata_bytes=1 << 16))
    assert result["00280106"] == {"vr": "SS"}


@pytest.mark.parametrize("kind", ["elements", "sequences", "large elements"])
def test_what_the_record_has_no_room_for_is_not_described(kind: str) -> None:
    content = {
        "elements": element(0x00091001, "LO"),
        "sequences": element(0x00091001, "SQ", item()),
        "large elements": element(0x00091001, "UT", b"x" * 5000),
    }[kind]
    data = file_with(NAME + content * 3000)
    left_out = check_structure(data, limits=StructureLimits(elements=100)).left_out
    assert len(left_out.ranges) <= MAX_LEFT_OUT + 1
    assert len(left_out.without_value) <= MAX_WITHOUT_VALUE
    assert sidecar(data, StructureLimits(elements=100))["00100010"] == DESCRIBED_NAME


def test_behind_as_many_ranges_as_the_record_has_room_for_nothing_is_described() -> None:
    first = element(0x00080060, "CS", b"CT")
    data = file_with(first + (PIXELS + element(0x00091001, "LO", b"ab")) * 1500 + NAME)
    structure = check_structure(data)
    assert len(structure.left_out.ranges) <= MAX_LEFT_OUT + 1
    result = sidecar(data, limits.DEFAULT)
    assert "00100010" not in result
    assert result["00080060"]["Value"] == ["CT"]


def test_a_deflated_data_set_is_described_in_part_within_the_same_limits() -> None:
    data = file_with(deflated(segmentation(12_000)), DEFLATED)
    result = sidecar(data, limits.DEFAULT)
    assert result == {"00100010": DESCRIBED_NAME, "52009230": {"vr": "SQ"}}
    with_more_room = sidecar(data, StructureLimits(elements=400_000))
    assert len(with_more_room["52009230"]["Value"]) == 12_000


def test_one_sequence_leaves_room_for_the_elements_that_name_patient_and_study() -> None:
    sequence = element(0x00081140, "SQ", item() * 199_999)
    identity = NAME + element(0x0020000D, "UI", b"1.2.5\0")
    for many in (sequence, element(0x00091001, "LO") * 300_000, PRIVATE_UT * 100):
        result = sidecar(file_with(many + identity), limits.DEFAULT)
        assert result["00100010"] == DESCRIBED_NAME
        assert result["0020000D"]["Value"] == ["1.2.5"]


def test_what_says_how_the_rest_is_read_is_not_left_out_before_it() -> None:
    large = element(0x00080006, "SQ", item(element(0x00104000, "UT", b"x" * 60_000)))
    character_set = element(0x00080005, "CS", b"ISO_IR 192")
    name = element(0x00100010, "PN", "é".encode())
    for size_bytes in range(1 << 16, 70_000, 499):
        given = StructureLimits(metadata_bytes=size_bytes)
        result = sidecar(file_with(character_set + large + name + PIXELS), given)
        assert result["00100010"]["Value"] == [{"Alphabetic": "é"}]


def test_a_group_length_is_not_given_by_its_vr() -> None:
    length = element(0x00100000, "UL", b"\0\0\0\0") * 20_000
    result = sidecar(file_with(length + NAME), StructureLimits(elements=1000))
    assert "00100000" not in result


def test_padding_behind_the_data_set_does_not_count() -> None:
    data = file_with(NAME) + bytes(70_000)
    assert sidecar(data, StructureLimits(metadata_bytes=1 << 16)) == {"00100010": DESCRIBED_NAME}


def test_the_sequences_of_a_private_owner_are_left_out_like_others() -> None:
    creator = element(0x20010010, "LO", b"Philips Imaging DD 001")
    items = item(implicit_element(0x00080100, b"A ")) * 1000
    data = file_with(NAME + creator + element(0x2001105F, "UN", items))
    result = sidecar(data, StructureLimits(elements=100))
    assert result["2001105F"] == {"vr": "SQ"}
