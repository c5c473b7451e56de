"""Private data elements without a VR, by the dictionary of their creator (PS3.5 7.8.1)."""

import base64
import json
import struct
import tracemalloc
from typing import Any

import pytest
from encoded import EXPLICIT, IMPLICIT, element, file_with, implicit_element, item

from shared.dicom.metadata import metadata_json
from shared.dicom.structure import check_structure

PHILIPS = b"Philips Imaging DD 001"
# An Item of (2001,105F) and a value of (2001,1003), which are SQ and FL in that dictionary.
ITEM_VALUE = bytes.fromhex("FE FF 00 E0 0A 00 00 00 08 00 00 01 02 00 00 00 41 20")
B_VALUE = struct.pack("<f", 1000.0)


def described(dataset: bytes, syntax: bytes) -> dict[str, Any]:
    data = file_with(dataset, syntax)
    check_structure(data)
    result = json.loads(metadata_json(data))
    assert isinstance(result, dict)
    return result


def private(syntax: bytes, creator: bytes, *elements: tuple[int, bytes]) -> bytes:
    group = elements[0][0] >> 16 << 16
    creator += b" " * (len(creator) % 2)
    if syntax == EXPLICIT:
        return element(group | 0x10, "LO", creator) + b"".join(
            element(tag, "UN", value) for tag, value in elements
        )
    return implicit_element(group | 0x10, creator) + b"".join(
        implicit_element(tag, value) for tag, value in elements
    )


def in_an_item(syntax: bytes, content: bytes) -> bytes:
    if syntax == EXPLICIT:
        return element(0x00081140, "SQ", item(content))
    return implicit_element(0x00081140, item(content))


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_a_private_sequence_of_a_known_creator_is_described_as_a_sequence(syntax: bytes) -> None:
    content = private(syntax, PHILIPS, (0x2001105F, ITEM_VALUE))
    expected = {"vr": "SQ", "Value": [{"00080100": {"vr": "SH", "Value": ["A"]}}]}
    assert described(content, syntax)["2001105F"] == expected
    nested = described(in_an_item(syntax, content), syntax)
    assert nested["00081140"]["Value"][0]["2001105F"] == expected
    large = private(syntax, PHILIPS, (0x2001105F, ITEM_VALUE * 1000))
    assert len(described(large, syntax)["2001105F"]["Value"]) == 1000
    empty = private(syntax, PHILIPS, (0x2001105F, b""))
    assert described(empty, syntax)["2001105F"] == {"vr": "SQ"}


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize(
    "value",
    [ITEM_VALUE[:-1], ITEM_VALUE + b"\0\0", b"ab" + ITEM_VALUE, ITEM_VALUE[:8], b"text"],
    ids=["truncated", "bytes after", "bytes before", "header only", "text"],
)
def test_a_private_value_must_be_all_items_to_be_a_sequence(syntax: bytes, value: bytes) -> None:
    content = private(syntax, PHILIPS, (0x2001105F, value))
    assert described(content, syntax).keys() == {"20010010"}
    nested = described(in_an_item(syntax, content), syntax)["00081140"]["Value"][0]
    binary = base64.b64encode(value).decode()
    assert nested["2001105F"] == {"vr": "UN", "InlineBinary": binary}


@pytest.mark.parametrize("creator", [b"Acme", PHILIPS[:-1], b"x" * 5000, b""])
def test_a_private_sequence_of_an_unknown_creator_is_left_out(creator: bytes) -> None:
    content = private(IMPLICIT, creator, (0x2001105F, ITEM_VALUE), (0x20011003, B_VALUE))
    assert described(content, IMPLICIT).keys() == {"20010010"}


def test_a_private_creator_applies_to_its_block_in_its_own_item_only() -> None:
    elsewhere = implicit_element(0x20010011, PHILIPS) + implicit_element(0x2001105F, ITEM_VALUE)
    assert "2001105F" not in described(elsewhere, IMPLICIT)
    right = implicit_element(0x20010011, PHILIPS) + implicit_element(0x2001115F, ITEM_VALUE)
    assert described(right, IMPLICIT)["2001115F"]["vr"] == "SQ"
    of_another = implicit_element(0x00081140, item(implicit_element(0x20010010, PHILIPS)))
    outside = of_another + implicit_element(0x2001105F, ITEM_VALUE)
    assert "2001105F" not in described(outside, IMPLICIT)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize(
    "creator", [PHILIPS, PHILIPS.upper(), PHILIPS.lower(), b" " + PHILIPS, PHILIPS + b"\0"]
)
def test_a_private_creator_is_matched_without_case(syntax: bytes, creator: bytes) -> None:
    content = private(syntax, creator, (0x20011003, B_VALUE), (0x2001105F, ITEM_VALUE))
    for _ in range(2):  # the second time from the cache
        result = described(content, syntax)
        assert result["20011003"] == {"vr": "FL", "Value": [1000]}
        assert result["2001105F"]["vr"] == "SQ"


@pytest.mark.parametrize(
    ("creator", "vr"),
    [(b"SPI RELEASE 1", "CS"), (b"SPI Release 1", "LO"), (b"Spi Release 1", "CS")],
)
def test_a_private_creator_listed_in_two_cases_is_matched_exactly_first(
    creator: bytes, vr: str
) -> None:
    content = private(IMPLICIT, creator, (0x00111020, b"NO"))
    assert described(content, IMPLICIT)["00111020"] == {"vr": vr, "Value": ["NO"]}


@pytest.mark.parametrize(
    ("creator", "tag", "value"),
    [
        (b"ELSCINT1", 0x01F11026, b"0.264 "),  # FD, but not a multiple of eight bytes
        (b"ELSCINT1", 0x01F11026, b"0.488281"),  # FD, but digits: 1.4e-71
        (b"ELSCINT1", 0x01F11026, b"1\\0.2840"),
        (PHILIPS, 0x20011003, b"0.48"),  # FL
        (PHILIPS, 0x20011001, b"\1\2\3"),  # FL
        (PHILIPS, 0x20011002, b"\1\0\0\0"),  # IS
    ],
)
def test_a_private_vr_that_contradicts_the_bytes_is_un(
    creator: bytes, tag: int, value: bytes
) -> None:
    content = private(IMPLICIT, creator, (tag, value))
    nested = described(in_an_item(IMPLICIT, content), IMPLICIT)["00081140"]["Value"][0]
    binary = base64.b64encode(value).decode()
    assert nested[f"{tag:08X}"] == {"vr": "UN", "InlineBinary": binary}


@pytest.mark.parametrize("number", [*range(71), 12336, 2816, 2944])
def test_small_binary_numbers_are_not_read_as_digits(number: int) -> None:
    for tag, vr, form in ((0x00191002, "SL", "<i"), (0x0019105E, "SL", "<i")):
        content = private(IMPLICIT, b"GEMS_ACQU_01", (tag, struct.pack(form, number)))
        assert described(content, IMPLICIT)[f"{tag:08X}"] == {"vr": vr, "Value": [number]}
    height = private(IMPLICIT, PHILIPS, (0x20011003, struct.pack("<f", number)))
    assert described(height, IMPLICIT)["20011003"] == {"vr": "FL", "Value": [number]}


def test_many_private_creators_take_constant_memory() -> None:
    many = b"".join(
        implicit_element(group << 16 | block, PHILIPS)
        for group in range(0x2001, 0x2201, 2)
        for block in range(0x10, 0x100)
    )
    data = file_with(many, IMPLICIT)
    tracemalloc.start()
    try:
        check_structure(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4_000_000


def test_a_private_vr_that_agrees_with_the_bytes_is_used() -> None:
    pitch = private(IMPLICIT, b"ELSCINT1", (0x01F11026, struct.pack("<d", 0.264)))
    assert described(pitch, IMPLICIT)["01F11026"] == {"vr": "FD", "Value": [0.264]}
    text = private(IMPLICIT, b"GEMS_IDEN_01", (0x00091004, "Größe\tä\r\n".encode("latin-1")))
    assert described(text, IMPLICIT)["00091004"]["vr"] == "SH"


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_nested_private_sequences_take_linear_time(syntax: bytes) -> None:
    content = implicit_element(0x00080100, b"A ")
    for _ in range(40):
        nested = implicit_element(0x20010010, PHILIPS) + implicit_element(0x2001105F, item(content))
        content = nested
    outermost = private(syntax, PHILIPS, (0x2001105F, item(content)))

    depth, result = 0, described(outermost, syntax)
    while "Value" in result.get("2001105F", {}):
        (result,) = result["2001105F"]["Value"]
        depth += 1
    assert depth == 20
