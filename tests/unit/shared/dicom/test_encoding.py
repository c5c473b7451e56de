"""Data sets and Items whose encoding looks different from the declared one."""

import json
import struct
from typing import Any

import pytest
from encoded import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    ITEM_END,
    SEQUENCE_END,
    UNDEFINED,
    deflated,
    element,
    file_with,
    implicit_element,
    item,
    without,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.dicom import walk
from shared.dicom.header import VRS_OF_SHORT_LENGTH
from shared.dicom.limits import StructureLimits
from shared.dicom.metadata import metadata_json
from shared.dicom.refusal import CheckLimitExceeded, NotUnderstood
from shared.dicom.structure import check_structure, first_structure
from shared.dicom.uids import SERIES_INSTANCE_UID

NEXT = element(0x00200011, "IS", b"1 ")
IMPLICIT_NEXT = implicit_element(0x00200011, b"1 ")


def described(data: bytes) -> dict[str, Any]:
    check_structure(data)
    result = json.loads(metadata_json(data))
    assert isinstance(result, dict)
    return result


def modality_without_vr() -> bytes:
    return implicit_element(0x00080060, b"CT")


def is_refused(data: bytes) -> bool:
    try:
        check_structure(data)
    except NotUnderstood:
        return True
    return False


def reference(size_bytes: int) -> bytes:
    """Return an implicit Item of that size: a Referenced SOP Class and Instance UID."""
    return item(
        implicit_element(0x00081150, b"1.2.3\0")
        + implicit_element(0x00081155, b"1" * (size_bytes - 30))
    )


def key_object(references: int, size_bytes: int) -> bytes:
    """Return a file with an Item whose first data element is a Referenced SOP Sequence."""
    content = implicit_element(0x00081199, reference(size_bytes) * references)
    return file_with(implicit_element(0x0040A375, item(content)) + IMPLICIT_NEXT, IMPLICIT)


@pytest.mark.parametrize(
    ("references", "size_bytes"), [(178, 112), (179, 112), (180, 112), (203, 100), (166, 130)]
)
def test_an_implicit_item_stays_implicit_if_a_length_looks_like_a_vr(
    references: int, size_bytes: int
) -> None:
    result = described(key_object(references, size_bytes))

    (nested,) = result["0040A375"]["Value"]
    assert len(nested["00081199"]["Value"]) == references
    assert result["00200011"]["Value"] == [1]


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.sampled_from([vr for vr in VRS_OF_SHORT_LENGTH if vr[0] % 2 == 0]),
    st.booleans(),
    st.booleans(),
)
def test_any_length_in_an_implicit_item_may_look_like_a_vr(
    vr: bytes, is_delimited: bool, is_private: bool
) -> None:
    first = implicit_element(
        0x00090001 if is_private else 0x00081030, b"x" * int.from_bytes(vr, "little")
    )
    content = first + implicit_element(0x00200013, b"7 ")
    nested = item(content + ITEM_END, UNDEFINED) if is_delimited else item(content)

    result = described(file_with(implicit_element(0x0040A375, nested) + IMPLICIT_NEXT, IMPLICIT))

    (only,) = result["0040A375"]["Value"]
    assert only["00200013"]["Value"] == [7]


def looks_explicit(size_bytes: int) -> bytes:
    """Return explicit data elements of that size, including a Patient ID."""
    hidden = element(0x00100020, "LO", b"HIDDEN")
    return hidden + element(0x00104000, "LT", b"x" * (size_bytes - len(hidden) - 8))


def test_a_private_value_that_looks_like_explicit_elements_is_a_value() -> None:
    private = implicit_element(0x00091001, looks_explicit(20_300))
    for nested in (item(private), item(private + ITEM_END, UNDEFINED)):
        result = described(
            file_with(implicit_element(0x0040A375, nested) + IMPLICIT_NEXT, IMPLICIT)
        )
        assert result["0040A375"]["Value"][0].keys() == {"00091001"}


def test_a_top_level_value_that_looks_like_explicit_elements_is_a_value() -> None:
    private = implicit_element(0x00071001, looks_explicit(20_300))
    result = described(file_with(private + IMPLICIT_NEXT, IMPLICIT))
    assert result == {"00200011": {"vr": "IS", "Value": [1]}}


UIDS = {0x00080016: b"1.2.3\0", 0x00080018: b"1.2.4\0", 0x0020000D: b"1.2.5\0"}
FALSE_UIDS = b"".join(element(tag, "UI", b"6.6.6\0") for tag in UIDS)


@pytest.mark.parametrize("following", ["ambiguous item", "padding", "ambiguous element"])
def test_a_value_that_looks_like_a_data_set_cannot_replace_the_real_one(following: str) -> None:
    """The value holds explicit data elements; the last one claims the rest of the file."""
    rest = b"".join(implicit_element(tag, value) for tag, value in UIDS.items())
    rest += implicit_element(0x00100020, b"TRUE")
    if following == "ambiguous item":
        nested = implicit_element(0x00080104, b"\0" * int.from_bytes(b"SH", "little"))
        rest += implicit_element(0x0040A730, item(nested))
    elif following == "padding":
        rest += bytes(16)
    else:
        rest += implicit_element(0x00400275, b"\0" * int.from_bytes(b"SH", "little"))
    false = FALSE_UIDS + element(0x00100020, "LO", b"FALSE ")
    size_bytes = int.from_bytes(b"LO", "little")
    false += element(0x00104000, "LT", b"x" * (size_bytes - len(false) - 8 - 12))
    value = false + element(0x00211001, "OB", b"", len(rest))
    assert len(value) == size_bytes

    data = file_with(implicit_element(0x00071001, value) + rest, IMPLICIT)

    assert described(data)["00100020"]["Value"] == ["TRUE"]
    assert check_structure(data).values[0x00080018] == b"1.2.4\0"


def test_the_cache_does_not_change_how_an_element_without_a_vr_is_read() -> None:
    """The same bytes may be an empty data element, or the beginning of one of 8 KiB."""
    blank = struct.pack("<HH2sH", 0x0028, 0x1051, b"  ", 0)
    last = element(0x00400275, "SQ")
    true = element(0x00100020, "LO", b"TRUE") + element(0x0020000E, "UI", b"1.2\0")
    empty = file_with(true + blank + last)
    content = element(0x00100020, "LO", b"FALSE ") + element(0x00281101, "LT", b"x" * 0x1FF0)
    content += b"x" * (0x2020 - len(content))
    filled = file_with(true + blank + content + last)
    alone = metadata_json(filled)
    assert described(empty)["00281051"] == {"vr": "DS"}
    assert metadata_json(filled) == alone
    assert json.loads(alone)["00100020"]["Value"] == ["TRUE"]


@pytest.mark.parametrize(
    "dataset",
    [
        element(0x00071001, "OB", b"x" * 5000) + modality_without_vr() + element(0x00080070, "LO"),
        element(0x00080005, "CS") + modality_without_vr() + element(0x00091001, "OB", b"x" * 5000),
    ],
    ids=["before", "after"],
)
def test_a_data_set_with_an_element_without_a_vr_has_no_left_out_ranges(dataset: bytes) -> None:
    for data in (file_with(dataset), file_with(deflated(dataset), DEFLATED)):
        left_out = check_structure(data).left_out
        assert left_out.ranges == ()
        assert json.loads(metadata_json(data, left_out))["00080060"]["Value"] == ["CT"]


def test_a_large_data_set_with_an_element_without_a_vr_is_not_described() -> None:
    data = file_with(element(0x00080005, "CS") + modality_without_vr() + element(0x00091001, "OB"))
    left_out = check_structure(data, limits=StructureLimits(max_elements=2)).left_out
    assert metadata_json(without(data, left_out.ranges), left_out) == b"{}"


def test_the_rest_of_a_data_set_is_read_in_the_encoding_of_the_complete_one() -> None:
    """Without the pixels, the rest could be the value of one data element in implicit VR."""
    rest = element(0x00081030, "LT", b"x" * (int.from_bytes(b"CS", "little") - 8))
    dataset = element(0x00080005, "CS") + rest + element(0x7FE00010, "OW", b"x" * 5000)
    data = file_with(dataset, IMPLICIT)
    left_out = check_structure(data).left_out
    assert left_out.ranges
    kept = without(data, left_out.ranges)
    assert json.loads(metadata_json(kept, left_out)).keys() == {"00080005", "00081030"}


def test_a_sequence_of_vr_un_is_implicit_unless_only_explicit_vr_fits() -> None:
    long = implicit_element(0x00081030, b"x" * int.from_bytes(b"PN", "little"))
    explicit = element(0x00080060, "CS", b"CT")
    for content, tag in ((long, "00081030"), (explicit, "00080060")):
        for nested in (item(content), item(content + ITEM_END, UNDEFINED)):
            unknown = element(0x00091001, "UN", nested + SEQUENCE_END, UNDEFINED)
            known = element(0x00081140, "UN", nested)
            for sequence, key in ((unknown, "00091001"), (known, "00081140")):
                result = described(file_with(sequence + NEXT))
                assert result[key]["Value"][0].keys() == {tag}
                assert result["00200011"]["Value"] == [1]


def test_explicit_items_of_an_implicit_data_set_are_read_as_explicit() -> None:
    content = element(0x00080060, "CS", b"CT") + element(0x00100010, "PN", b"Doe^Jane")
    for nested in (item(content), item(content + ITEM_END, UNDEFINED)):
        result = described(
            file_with(implicit_element(0x0040A375, nested) + IMPLICIT_NEXT, IMPLICIT)
        )
        assert result["0040A375"]["Value"][0]["00100010"]["Value"] == [{"Alphabetic": "Doe^Jane"}]


def test_a_data_set_that_is_not_encoded_as_declared_is_read() -> None:
    """In the declared encoding, its black pixels would look like padding."""
    pixels = b"\0" * 1_500_000
    explicit = element(0x00080005, "CS", b"ISO_IR 100") + NEXT + element(0x7FE00010, "OW", pixels)
    assert described(file_with(explicit, IMPLICIT))["00200011"]["Value"] == [1]
    implicit = IMPLICIT_NEXT + implicit_element(0x7FE00010, pixels)
    assert described(file_with(implicit, EXPLICIT))["00200011"]["Value"] == [1]


def test_a_truncated_data_set_not_encoded_as_declared_reports_the_right_byte() -> None:
    cut = element(0x00080005, "CS", b"ISO_IR 100") + element(0x00100020, "LO", b"42", 8)
    with pytest.raises(NotUnderstood, match=r"\(0010,0020\) at byte \d+ is truncated: it needs 8"):
        check_structure(file_with(cut, IMPLICIT))


def test_the_encoding_is_not_detected_from_the_beginning_of_a_data_set() -> None:
    explicit = element(0x00080005, "CS", b"ISO_IR 100") + element(0x0020000E, "UI", b"1.2\0")
    assert first_structure(file_with(explicit + NEXT), SERIES_INSTANCE_UID) is not None
    assert first_structure(file_with(explicit + NEXT, IMPLICIT), SERIES_INSTANCE_UID) is None


def test_ambiguous_items_take_linear_time_and_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level of nesting is ambiguous, and is read again for each enclosing level."""
    content = element(0x00080060, "CS", b"CT") * 1000
    for _ in range(20):
        content = item_of_un(content)
    monkeypatch.setattr(walk, "MAX_RETRIED_ELEMENTS", 50_000)
    check_structure(file_with(content + NEXT))
    monkeypatch.setattr(walk, "MAX_RETRIED_ELEMENTS", 10_000)
    with pytest.raises(CheckLimitExceeded, match="not encoded as declared"):
        check_structure(file_with(content + NEXT))


def item_of_un(content: bytes) -> bytes:
    return element(0x00091001, "UN", item(content) + SEQUENCE_END, UNDEFINED)


# Redundant delimiters (PS3.5 7.5.2)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize("kind", ["SQ", "UN", "private"])
def test_an_item_or_sequence_may_have_both_a_length_and_a_delimiter(
    kind: str, syntax: bytes
) -> None:
    is_explicit = syntax == EXPLICIT and kind == "SQ"
    inner = element(0x00080060, "CS", b"CT") if is_explicit else implicit_element(0x00080060, b"CT")
    items = item(inner + ITEM_END) + item(inner) + SEQUENCE_END
    following = NEXT if syntax == EXPLICIT else IMPLICIT_NEXT
    if kind == "private":
        tag, key = 0x2001105F, "2001105F"
        name = b"Philips Imaging DD 001"
        creator = (
            element(0x20010010, "LO", name)
            if syntax == EXPLICIT
            else implicit_element(0x20010010, name)
        )
        vr = "UN"
        following = b""
    else:
        tag, key, creator, vr = 0x00081140, "00081140", b"", kind
    sequence = element(tag, vr, items) if syntax == EXPLICIT else implicit_element(tag, items)

    result = described(file_with(creator + sequence + following, syntax))

    assert [nested["00080060"]["Value"] for nested in result[key]["Value"]] == [["CT"], ["CT"]]


def test_a_delimiter_before_the_end_of_a_defined_length_is_refused() -> None:
    inner = element(0x00080060, "CS", b"CT")
    assert is_refused(file_with(element(0x00081140, "SQ", item(ITEM_END + inner))))
    assert is_refused(file_with(element(0x00081140, "SQ", SEQUENCE_END + item(inner))))
    assert is_refused(file_with(element(0x00081140, "SQ", item(inner)) + SEQUENCE_END))


# Elements without a VR


def without_vr(tag: int, value: bytes) -> bytes:
    return implicit_element(tag, value)


BLANK_VR = bytes.fromhex("28 00 20 01 20 20 02 00 00 00")


@pytest.mark.parametrize(
    ("strange", "tag", "expected"),
    [
        (BLANK_VR, "00280120", {"vr": "US", "Value": [0]}),
        (without_vr(0x00280120, b"\7\0"), "00280120", {"vr": "US", "Value": [7]}),
        (without_vr(0x00280120, b""), "00280120", {"vr": "US"}),
        (without_vr(0x00081030, b"text"), "00081030", {"vr": "LO", "Value": ["text"]}),
        (
            without_vr(0x00081140, item(element(0x00080060, "CS", b"CT"))),
            "00081140",
            {"vr": "SQ", "Value": [{"00080060": {"vr": "CS", "Value": ["CT"]}}]},
        ),
        (
            without_vr(0x00081140, item(implicit_element(0x00080060, b"CT"))),
            "00081140",
            {"vr": "SQ", "Value": [{"00080060": {"vr": "CS", "Value": ["CT"]}}]},
        ),
        (
            implicit_element(
                0x00081140,
                item(element(0x00080060, "CS", b"CT") + ITEM_END, UNDEFINED) + SEQUENCE_END,
                UNDEFINED,
            ),
            "00081140",
            {"vr": "SQ", "Value": [{"00080060": {"vr": "CS", "Value": ["CT"]}}]},
        ),
    ],
    ids=["blank", "none", "none, empty", "text", "sequence", "implicit items", "undefined length"],
)
def test_an_element_without_a_vr_is_accepted_if_its_length_leads_to_the_next(
    strange: bytes, tag: str, expected: dict[str, Any]
) -> None:
    first = element(0x00080005, "CS")
    last = element(0x00400275, "SQ")
    assert described(file_with(first + strange + last))[tag] == expected
    assert described(file_with(first + strange))[tag] == expected
    for nested in (
        item(first + strange),
        item(first + strange + ITEM_END),
        item(first + strange + ITEM_END, UNDEFINED),
    ):
        result = described(file_with(element(0x0040A730, "SQ", nested)))
        assert result["0040A730"]["Value"][0][tag] == expected
    assert described(file_with(first + strange) + bytes(100))[tag] == expected


def test_consecutive_elements_without_a_vr_are_accepted() -> None:
    strange = without_vr(0x00280010, b"\1\0") + without_vr(0x00280011, b"\2\0")
    result = described(file_with(element(0x00080005, "CS") + strange + element(0x00400275, "SQ")))
    assert (result["00280010"]["Value"], result["00280011"]["Value"]) == ([1], [2])


def test_an_element_without_a_vr_is_refused_if_readers_disagree_on_it() -> None:
    """The 16-bit length leads to a data element that is part of a value with the 32-bit length."""
    long = 0x2020 | 2 << 16
    hidden = element(0x00280121, "US", b"\1\0")
    value = b"\0\0" + hidden
    value += b"x" * (long - len(value))
    both = struct.pack("<HH2sH", 0x0028, 0x0120, b"  ", 2) + value + element(0x00400275, "SQ")
    assert is_refused(file_with(element(0x00080005, "CS") + both))
    for neither in (
        struct.pack("<HH2sH", 0x0028, 0x0120, b"  ", 3) + b"\0\0",
        struct.pack("<HH2sH", 0x0028, 0x0120, b"\1\2", 2) + b"\0\0",
        implicit_element(0x7FE00010, item(b"ab") + SEQUENCE_END, UNDEFINED),
        # Some readers read all that follows as its value, including the UIDs.
        struct.pack("<HH2sH", 0x0010, 0x0010, b"  ", 4) + b"Doe " + element(0x0020000E, "UI"),
        without_vr(0x00281030, b"x" * ord("R")),  # pydicom reads the length as a VR
    ):
        assert is_refused(file_with(element(0x00080005, "CS") + neither))


def test_the_first_element_of_an_explicit_data_set_or_item_must_have_a_vr() -> None:
    """Some readers read the complete data set or Item as implicit, and get different values."""
    strange = without_vr(0x00280010, b"\1\0")
    last = element(0x00400275, "SQ")
    assert is_refused(file_with(strange + last))
    assert is_refused(file_with(element(0x00081140, "SQ", item(strange + last))))


def test_text_under_the_tag_of_a_sequence_is_accepted_in_implicit_vr() -> None:
    text = implicit_element(0x00081140, b"no sequence here")
    result = described(file_with(text + IMPLICIT_NEXT, IMPLICIT))
    assert result == {"00200011": {"vr": "IS", "Value": [1]}}
    nested = implicit_element(0x0040A375, item(text))
    result = described(file_with(nested + IMPLICIT_NEXT, IMPLICIT))
    assert result["0040A375"]["Value"][0]["00081140"] == {
        "vr": "UN",
        "InlineBinary": "bm8gc2VxdWVuY2UgaGVyZQ==",
    }
    assert is_refused(file_with(implicit_element(0x00081140, item(b"", 100)), IMPLICIT))
    assert is_refused(file_with(element(0x00081140, "SQ", b"no sequence here")))


def test_unknown_sequences_in_implicit_big_endian_items_are_big_endian() -> None:
    first = struct.pack(">HH2sH", 0x0008, 0x0005, b"CS", 0)
    inner = struct.pack(">HHL", 0xFFFE, 0xE000, 10) + struct.pack(">HHL", 0x0008, 0x0060, 2) + b"CT"
    unknown = struct.pack(">HHL", 0x0009, 0x1001, UNDEFINED) + inner
    unknown += struct.pack(">HHL", 0xFFFE, 0xE0DD, 0)
    nested = struct.pack(">HHL", 0xFFFE, 0xE000, len(unknown)) + unknown
    sequence = struct.pack(">HH2sHL", 0x0008, 0x1140, b"SQ", 0, len(nested)) + nested
    result = described(file_with(first + sequence, BIG_ENDIAN))
    inside = result["00081140"]["Value"][0]["00091001"]
    assert inside["Value"] == [{"00080060": {"vr": "CS", "Value": ["CT"]}}]


def test_implicit_items_of_a_big_endian_data_set_are_big_endian() -> None:
    first = struct.pack(">HH2sH", 0x0008, 0x0005, b"CS", 0)
    nested = struct.pack(">HHL", 0xFFFE, 0xE000, 10) + struct.pack(">HHL", 0x0008, 0x0060, 2)
    sequence = struct.pack(">HHL", 0x0008, 0x1140, 18) + nested + b"CT"
    result = described(file_with(first + sequence, BIG_ENDIAN))
    assert result["00081140"]["Value"] == [{"00080060": {"vr": "CS", "Value": ["CT"]}}]
