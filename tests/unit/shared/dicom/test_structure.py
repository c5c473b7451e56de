import mmap
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pydicom
import pydicom.filereader
import pytest
from encoded import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    ITEM_END,
    JPEG,
    LONG_LENGTH_VRS,
    SEQUENCE_END,
    UNDEFINED,
    deflated,
    element,
    file_with,
    implicit_element,
    item,
)
from pydicom.dataelem import RawDataElement

from shared.dicom.limits import (
    HIGHEST,
    MAX_ELEMENTS,
    MAX_FILE_META_BYTES,
    MAX_INFLATED_BYTES,
    MAX_NESTED_SEQUENCES,
    StructureLimits,
)
from shared.dicom.metadata import metadata_json
from shared.dicom.refusal import (
    CheckLimitExceeded,
    InstanceRefused,
    NotUnderstood,
    TransferSyntaxNotSupported,
)
from shared.dicom.structure import check_structure, first_structure
from shared.dicom.uids import SERIES_INSTANCE_UID, SOP_INSTANCE_UID

DATA = Path(pydicom.__file__).parent / "data"
TEST_FILES = DATA / "test_files"
NOT_DICOM = {".py", ".pyc", ".json", ".txt", ".md", ".icc", ".dump", ".gz"}
ALL_FILES = sorted(
    path
    for path in DATA.rglob("*")
    if path.is_file() and path.suffix not in NOT_DICOM and path.name != "README"
)
REFUSED_FILES = {
    "ExplVR_BigEndNoMeta.dcm": "send it as a Part 10 file",
    "ExplVR_LitEndNoMeta.dcm": "send it as a Part 10 file",
    "rtstruct.dcm": "send it as a Part 10 file",
    "no_meta.dcm": "no DICOM preamble: DICM is missing at byte 128",
    "meta_missing_tsyntax.dcm": "TransferSyntaxUID (0002,0010) is missing",
    "MR_truncated.dcm": "(7FE0,0010) at byte 1488 is truncated: it needs 8192 bytes",
    "rtplan_truncated.dcm": "(300A,00B0) at byte 1410 is truncated: it needs 976 bytes",
    "DICOMDIR-nooffset": "(FFFE,E000) at byte 10860 is truncated: it needs 248 bytes",
}


def refusal(data: bytes) -> str:
    with pytest.raises(NotUnderstood) as refused:
        check_structure(data)
    return str(refused.value)


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(DATA)))
def test_every_real_file_is_accepted_unless_it_is_known_to_be_broken(path: Path) -> None:
    data = path.read_bytes()
    if path.name in REFUSED_FILES:
        assert REFUSED_FILES[path.name] in refusal(data)
    else:
        structure = check_structure(data)
        expected = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
        assert structure.transfer_syntax_uid == expected


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_small_odd.dcm",  # explicit
        "rtplan.dcm",  # implicit, nested sequences
        "reportsi.dcm",  # explicit, nested sequences
        "SC_rgb_rle_2frame.dcm",  # encapsulated
    ],
)
def test_a_file_truncated_within_a_top_level_element_is_refused(name: str) -> None:
    data = (TEST_FILES / name).read_bytes()
    accepted = []
    for size in range(len(data) + 1):
        try:
            check_structure(data[:size])
        except NotUnderstood:
            continue
        accepted.append(size)

    starts = _starts_of_top_level_elements(TEST_FILES / name)
    assert accepted == [*starts[1:], len(data)]


def _starts_of_top_level_elements(path: Path) -> list[int]:
    """Return the byte offsets that pydicom finds."""
    meta = pydicom.filereader.read_file_meta_info(path)
    is_implicit = meta.TransferSyntaxUID.is_implicit_VR
    starts = []
    with path.open("rb") as file:
        file.seek(132 + 12 + meta.FileMetaInformationGroupLength)
        for found in pydicom.filereader.data_element_generator(file, is_implicit, True):
            value_start = found.value_tell if isinstance(found, RawDataElement) else found.file_tell
            assert value_start is not None
            has_long_length = not is_implicit and found.VR in LONG_LENGTH_VRS
            starts.append(value_start - (12 if has_long_length else 8))
    return starts


@pytest.mark.parametrize(
    "dataset",
    [
        element(0x00081140, "SQ", item(element(0x00080060, "CS", b"CT"))),
        element(
            0x00081140,
            "SQ",
            item(element(0x00080060, "CS", b"CT") + ITEM_END, UNDEFINED) + SEQUENCE_END,
            UNDEFINED,
        ),
        element(
            0x00091001,
            "UN",
            item(implicit_element(0x00080060, b"CT") + ITEM_END, UNDEFINED) + SEQUENCE_END,
            UNDEFINED,
        ),
        element(0x7FE00010, "OB", item() + item(b"frame1") + SEQUENCE_END, UNDEFINED),
        element(0x7FE00010, "OW", b"\1\2" * 20),
        element(0x00420011, "OB", b"%PDF"),
    ],
    ids=["defined lengths", "undefined lengths", "UN", "encapsulated", "native", "document"],
)
def test_every_truncation_of_an_element_is_refused(dataset: bytes) -> None:
    check_structure(file_with(dataset))
    for size in range(1, len(dataset)):
        assert "is truncated" in refusal(file_with(dataset[:size]))


def test_a_file_truncated_in_its_file_meta_information_is_refused() -> None:
    meta = element(0x00020002, "UI", b"1.2.3\0")
    data = file_with(element(0x00080018, "UI", b"1.2.4\0"), EXPLICIT, meta)
    check_structure(data)
    dataset_start = data.index(b"\x08\0\x18\0")
    for size in range(dataset_start):
        assert refusal(data[:size])
    assert "no data set" in refusal(data[:dataset_start])
    assert "no data set" in refusal(data[:dataset_start] + b"\0" * 100)


def test_a_refusal_names_tag_and_offset_but_never_a_value() -> None:
    data = file_with(element(0x00100010, "PN", b"Doe^Jane") + element(0x00100020, "LO", b"42", 8))
    error = refusal(data)
    assert error == "(0010,0020) at byte 176 is truncated: it needs 8 bytes and the file has 2 left"
    assert data[176:180] == b"\x10\x00\x20\x00"


def test_a_refusal_has_the_sop_uids_if_both_are_valid() -> None:
    sop_class = element(0x00080016, "UI", b"1.2.3\0")
    sop_instance = element(0x00080018, "UI", b"1.2.4\0")
    rest = element(0x00100010, "PN", b"", 8)
    with pytest.raises(NotUnderstood) as refused:
        check_structure(file_with(sop_class + sop_instance + rest))
    assert refused.value.sop_class_uid == "1.2.3"
    assert refused.value.sop_instance_uid == "1.2.4"

    with pytest.raises(NotUnderstood) as refused:
        check_structure(file_with(sop_class + element(0x00080018, "UI", b"1.x.4\0") + rest))
    assert (refused.value.sop_class_uid, refused.value.sop_instance_uid) == (None, None)


def test_a_refusal_before_the_data_set_has_the_sop_uids_of_the_file_meta() -> None:
    meta = element(0x00020002, "UI", b"1.2.3\0") + element(0x00020003, "UI", b"1.2.4\0")
    with pytest.raises(TransferSyntaxNotSupported) as refused:
        check_structure(file_with(b"", b"1.2.999", meta))
    assert refused.value.sop_class_uid == "1.2.3"
    assert refused.value.sop_instance_uid == "1.2.4"


def test_a_file_that_is_not_part_10_is_refused_with_the_reason() -> None:
    assert "empty" in refusal(b"")
    assert "DICM is missing at byte 128" in refusal(b"x" * 1000)
    assert "DICM is missing at byte 128" in refusal(b"\0" * 128 + b"DIC")
    for dataset in (
        element(0x00080005, "CS", b"ISO_IR 100"),
        implicit_element(0x00080016, b"1.2.3\0"),
        b"\x00\x08\x00\x05CS\x00\x00",
        file_with(b"")[132:],
    ):
        assert "send it as a Part 10 file" in refusal(dataset)


def test_a_transfer_syntax_must_be_present_valid_and_known() -> None:
    empty = b"\0" * 128 + b"DICM"
    assert "TransferSyntaxUID (0002,0010) is missing" in refusal(empty)
    assert "TransferSyntaxUID (0002,0010) is missing" in refusal(file_with(b"", b""))
    assert "TransferSyntaxUID (0002,0010) is not a valid UID" in refusal(file_with(b"", b"1.2.x"))
    for unknown in (b"1.2.3", b"01.002.3", b"1.2.840.10008.1.1"):
        with pytest.raises(TransferSyntaxNotSupported, match=unknown.decode()):
            check_structure(file_with(b"", unknown))


@pytest.mark.parametrize(
    "transfer_syntax_uid",
    [
        b"1.2.840.10008.1.2.4.110",
        b"1.2.840.10008.1.2.4.111",
        b"1.2.840.10008.1.2.4.112",
        b"1.2.840.10008.1.2.8.1",
    ],
)
def test_a_transfer_syntax_unknown_to_pydicom_is_accepted(transfer_syntax_uid: bytes) -> None:
    frames = element(0x7FE00010, "OB", item() + item(b"frame1") + SEQUENCE_END, UNDEFINED)
    instance = element(0x00080018, "UI", b"1.2.4\0") + frames

    structure = check_structure(file_with(instance, transfer_syntax_uid))

    assert structure.transfer_syntax_uid == transfer_syntax_uid.decode()


def test_file_meta_information_ends_where_group_0002_ends() -> None:
    dataset = element(0x00080018, "UI", b"1.2.4\0")
    check_structure(file_with(dataset))
    for wrong_length in (0, 2, 100_000):
        meta = element(0x00020000, "UL", struct.pack("<L", wrong_length))
        structure = check_structure(file_with(dataset, EXPLICIT, meta))
        assert structure.values[SOP_INSTANCE_UID] == b"1.2.4\0"


def test_a_big_endian_file_is_read_in_big_endian() -> None:
    sequence = struct.pack(">HH2sHL", 0x0008, 0x1140, b"SQ", 0, 16) + struct.pack(
        ">HHLHH2sH", 0xFFFE, 0xE000, 8, 0x0008, 0x0060, b"CS", 0
    )
    data = file_with(sequence, BIG_ENDIAN)
    check_structure(data)
    assert "is truncated" in refusal(data[:-1])


@pytest.mark.parametrize("vr", ["SQ", "UN"])
def test_nesting_is_limited(vr: str) -> None:
    def nested(depth: int) -> bytes:
        if vr == "SQ":
            begin = element(0x00081140, "SQ", item(b"", UNDEFINED), UNDEFINED)
        else:
            begin = element(0x00091001, "UN", item(b"", UNDEFINED), UNDEFINED)
        return file_with(begin * depth + (ITEM_END + SEQUENCE_END) * depth)

    check_structure(nested(MAX_NESTED_SEQUENCES))
    for depth in (MAX_NESTED_SEQUENCES + 1, 10_000):
        assert f"within {MAX_NESTED_SEQUENCES} others" in refusal(nested(depth))


def test_nesting_with_defined_lengths_is_limited() -> None:
    content = b""
    for _ in range(10_000):
        content = implicit_element(0x00081140, item(content))
    assert "others" in refusal(file_with(content, IMPLICIT))


@pytest.mark.parametrize(
    "dataset",
    [
        element(0x00091001, "LO") * 300_000,
        element(0x00081140, "SQ") * 300_000,
        element(0x00081140, "SQ", item() * 300_000),
        element(0x00081140, "SQ", item(element(0x00080060, "CS")) * 150_000),
    ],
    ids=["elements", "sequences", "items", "nested elements"],
)
def test_the_number_of_elements_and_items_is_limited(
    dataset: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_structure(file_with(dataset))
    monkeypatch.setattr("shared.dicom.walk.MAX_CHECKED_ELEMENTS", 299_999)
    with pytest.raises(CheckLimitExceeded, match="more than 299999 data elements"):
        check_structure(file_with(dataset))


def test_fragments_do_not_count_as_elements() -> None:
    pixels = element(0x7FE00010, "OB", item(b"ab") * 300_000 + SEQUENCE_END, UNDEFINED)
    check_structure(file_with(pixels, JPEG))


def test_the_number_of_fragments_is_limited() -> None:
    pixels = element(0x7FE00010, "OB", item() * 2_000_001 + SEQUENCE_END, UNDEFINED)
    with pytest.raises(CheckLimitExceeded, match="fragments"):
        check_structure(file_with(pixels, JPEG))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            element(0x00081140, "SQ", item(b"", 8) + b"\0" * 4) + element(0x00200011, "IS"),
            "(FFFE,E000) at byte 172 is truncated: it needs 8 bytes and the enclosing Item",
        ),
        (
            element(0x00081140, "SQ", item() + b"\0" * 4),
            "header at byte 180 is truncated",
        ),
        (
            element(0x00081140, "SQ", item(element(0x00080060, "CS", b"CT", 4)) + item()),
            "(0008,0060) at byte 180 is truncated: it needs 4 bytes and the enclosing Item",
        ),
        (
            element(0x00081140, "SQ", element(0x00080060, "CS", b"CT")),
            "has (0008,0060) at byte 172; expected an Item or the end",
        ),
        (
            element(0x00081140, "SQ", SEQUENCE_END + item()),
            "has (FFFE,E0DD) at byte 172; expected an Item or the end",
        ),
        (
            element(0x00081140, "SQ", item(ITEM_END + element(0x00080060, "CS"))),
            "(FFFE,E00D) at byte 180 is out of place: expected a data element",
        ),
        (
            element(0x00081140, "SQ", item(b"", UNDEFINED), UNDEFINED),
            "(FFFE,E000) at byte 172 is truncated: the file ends at byte 180 without its",
        ),
        (
            element(0x00081140, "SQ", item(), UNDEFINED),
            "(0008,1140) at byte 160 is truncated: the file ends at byte 180 without its",
        ),
        (SEQUENCE_END, "(FFFE,E0DD) at byte 160 is out of place: expected a data element"),
        (item(), "(FFFE,E000) at byte 160 is out of place: expected a data element"),
        (
            element(0x7FE00010, "OB", item(b"ab") + element(0x00080060, "CS", b"CT"), UNDEFINED),
            "has (0008,0060) at byte 182; expected a fragment",
        ),
        (
            element(0x7FE00010, "OB", item(b"", UNDEFINED) + SEQUENCE_END, UNDEFINED),
            "is truncated: its fragment at byte 172 needs 4294967295 bytes",
        ),
        (element(0x00104000, "UT", b"", UNDEFINED), "(0010,4000) at byte 160 has undefined length"),
        (element(0x00080060, "\1\2", b"CT"), "(0008,0060) at byte 160 has no VR"),
        (
            element(0x00080005, "CS") + element(0x00080060, "c2"),
            "(0008,0060) at byte 168 has no VR",
        ),
    ],
)
def test_malformed_data_sets_are_refused_with_the_reason(dataset: bytes, message: str) -> None:
    assert message in refusal(file_with(dataset))


def test_a_vr_that_is_not_in_the_standard_is_refused() -> None:
    """With the 16-bit length that pydicom reads, the second UID is part of a value."""
    strange = struct.pack("<HH2sHL", 0x0009, 0x1001, b"ZZ", 0, 14)
    hidden = element(0x00080018, "UI", b"1.2.9\0")
    assert "a VR that is not in the standard" in refusal(file_with(strange + hidden))


@pytest.mark.parametrize("tag", [0x00080005, 0x00080016, 0x00080018, 0x0020000D, 0x0020000E])
def test_an_element_that_identifies_the_instance_must_have_its_standard_vr(tag: int) -> None:
    for vr in ("IS", "OB", "FD", "PN", "SQ"):
        assert f"has the VR {vr}" in refusal(file_with(element(tag, vr, b"")))
    check_structure(file_with(element(tag, "UN", b"")))
    known = "CS" if tag == 0x00080005 else "UI"
    check_structure(file_with(element(tag, known, b"")))


def test_a_uid_in_an_item_may_have_any_vr() -> None:
    nested = element(0x00081140, "SQ", item(element(0x00080018, "LO", b"1.2.3 ")))
    check_structure(file_with(nested))


def test_an_unreadable_character_set_is_refused_at_any_depth() -> None:
    for value in (b"ISO_IR 100\0\\x", b"1\\" * 600):
        wrong = element(0x00080005, "CS", value)
        for dataset in (wrong, element(0x00081140, "SQ", item(wrong))):
            assert "is not a valid Specific Character Set" in refusal(file_with(dataset))
    check_structure(file_with(element(0x00080005, "CS", b"ISO_IR 100\0 ")))
    check_structure(file_with(element(0x00080005, "CS", b"\\ISO 2022 IR 87")))


def test_an_element_of_a_command_set_is_refused_in_any_byte_order() -> None:
    """In big endian, pydicom reads nothing after such a data element."""
    command = struct.pack(">HH2sH", 0x0000, 0x0002, b"UI", 6) + b"1.2.3\0"
    assert "(0000,0002)" in refusal(file_with(command, BIG_ENDIAN))
    assert "(0000,0002)" in refusal(file_with(element(0x00000002, "UI", b"1.2.3\0")))


@pytest.mark.parametrize(
    "dataset",
    [
        element(0x00091001, "LO", b"ab"),  # without a private creator
        element(0x00090010, "LO", b"ACME") + element(0x00091001, "UN", b"\1\2\3"),
        element(0x00090010, "LO", b"ACME") + element(0x00091001, "SQ", item()),
        element(0x00091001, "OB", item(b"ab") + SEQUENCE_END, UNDEFINED),
    ],
    ids=["no creator", "UN", "sequence", "fragments"],
)
def test_private_elements_are_accepted(dataset: bytes) -> None:
    check_structure(file_with(dataset + element(0x00200011, "IS", b"1 ")))


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_values_of_odd_length_are_accepted(syntax: bytes) -> None:
    """PS3.5 7.1.1 requires even lengths, but many writers omit the padding."""
    if syntax == EXPLICIT:
        odd = element(0x00080018, "UI", b"1.2.4") + element(0x00100010, "PN", b"Doe")
        odd += element(0x00081140, "SQ", item(element(0x00080060, "CS", b"C")))
        odd += element(0x7FE00010, "OW", b"\1\2\3")
    else:
        odd = implicit_element(0x00080018, b"1.2.4") + implicit_element(0x00100010, b"Doe")
        odd += implicit_element(0x7FE00010, b"\1\2\3")
    structure = check_structure(file_with(odd, syntax))
    assert structure.values[SOP_INSTANCE_UID] == b"1.2.4"


def test_uids_that_do_not_identify_the_instance_may_be_empty_or_invalid() -> None:
    check_structure(
        file_with(
            element(0x00080018, "UI", b"1.2.4\0")
            + element(0x00081140, "SQ", item(element(0x00081155, "UI") + element(0x00080018, "UI")))
            + element(0x0020000D, "UI", b"")
            + element(0x00200052, "UI", b"")
            + element(0x00209164, "UI", b"none")
        )
    )


def test_a_file_without_group_length_and_version_is_accepted() -> None:
    data = file_with(element(0x00080018, "UI", b"1.2.4\0"))
    assert data[132:138] == b"\2\0\x10\0UI"
    check_structure(data)


def test_un_of_undefined_length_is_a_sequence_of_implicit_or_explicit_items() -> None:
    for content in (implicit_element(0x00091002, b"ab"), element(0x00080060, "CS", b"CT")):
        for container in (item(content), item(content + ITEM_END, UNDEFINED)):
            unknown = element(0x00091001, "UN", container + SEQUENCE_END, UNDEFINED)
            check_structure(file_with(unknown + element(0x00200011, "IS", b"1 ")))


def test_pixel_data_of_vr_un_and_undefined_length_is_a_sequence() -> None:
    """A fragment could hide a data element on which other readers fail."""
    hidden = implicit_element(0x00080005, b"\0\0x")
    unknown = element(0x7FE00010, "UN", item(hidden) + SEQUENCE_END, UNDEFINED)
    assert "is not a valid Specific Character Set" in refusal(file_with(unknown))
    no_elements = element(0x7FE00010, "UN", item(b"fragment") + SEQUENCE_END, UNDEFINED)
    assert "is truncated" in refusal(file_with(no_elements))


def test_un_of_undefined_length_is_little_endian_in_a_big_endian_file() -> None:
    unknown = struct.pack(">HH2sHL", 0x0009, 0x1001, b"UN", 0, UNDEFINED)
    content = item(implicit_element(0x00091002, b"ab")) + SEQUENCE_END
    check_structure(file_with(unknown + content, BIG_ENDIAN))


def test_un_of_a_known_sequence_is_entered_if_it_has_items() -> None:
    known = 0x00081140
    check_structure(file_with(element(known, "UN", item(implicit_element(0x00080060, b"CT")))))
    check_structure(file_with(element(known, "UN", b"no items")))
    assert "is truncated" in refusal(file_with(element(known, "UN", item(b"", 100))))


def test_the_length_of_a_delimitation_item_is_ignored() -> None:
    odd_item_end = implicit_element(0xFFFEE00D, b"", 0x20202020)
    odd_sequence_end = implicit_element(0xFFFEE0DD, b"", 0x20202020)
    check_structure(
        file_with(
            element(0x00081140, "SQ", item(odd_item_end, UNDEFINED) + odd_sequence_end, UNDEFINED)
        )
    )


def test_an_item_delimitation_item_with_a_vr_is_refused() -> None:
    end = implicit_element(0xFFFEE00D, b"", int.from_bytes(b"UC\0\0", "little"))
    sequence = item(element(0x00080060, "CS") + end, UNDEFINED) + SEQUENCE_END
    assert "has a VR" in refusal(file_with(element(0x00081140, "SQ", sequence, UNDEFINED)))


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_only_zero_bytes_are_accepted_as_padding_after_the_data_set(syntax: bytes) -> None:
    tail = element(0x00200011, "IS", b"1 ") if syntax == EXPLICIT else implicit_element(0x200011)
    data = file_with(tail, syntax)
    for size in (1, 7, 8, 9, 4096, 200_000):
        check_structure(data + b"\0" * size)
    assert refusal(data + b"\0" * 200_000 + b"\1")
    assert refusal(data + b"\0\0\1")
    assert refusal(data + b"\r\n")
    assert "(0000,0000)" in refusal(data + implicit_element(0, b"ab"))


def test_an_identifying_element_may_be_repeated_with_the_same_value_only() -> None:
    first = element(0x00080018, "UI", b"1.2.4\0")
    check_structure(file_with(first + first))
    message = refusal(file_with(first + element(0x00080018, "UI", b"1.2.5\0")))
    assert "(0008,0018) occurs twice" in message


def test_only_the_beginning_of_an_overlong_identifier_is_kept() -> None:
    structure = check_structure(file_with(implicit_element(0x0020000D, b"1" * 500_000), IMPLICIT))
    assert len(structure.values[0x0020000D]) == 1024


def test_left_out_ranges_cover_top_level_bulk_values() -> None:
    small = element(0x00091002, "UN", b"x" * 100)
    text = element(0x00104000, "UT", b"x" * 5000)
    nested = element(0x00081140, "SQ", item(element(0x00420011, "OB", b"x" * 5000)))
    document = element(0x00420011, "OB", b"x" * 5000)
    overlay = element(0x60003000, "OW", b"x" * 6000)
    pixels = element(0x7FE00010, "OB", item() + item(b"x" * 9000) + SEQUENCE_END, UNDEFINED)
    padding = element(0xFFFCFFFC, "OB", b"\0" * 10)
    data = file_with(small + nested + text + document + small + overlay + pixels + padding)

    document_start = data.index(document, data.index(text))
    assert check_structure(data).left_out.ranges == ((document_start, len(data)),)


def test_a_small_element_after_a_described_one_gets_no_byte_range() -> None:
    small = element(0x00091002, "UN", b"x" * 100)
    text = element(0x00104000, "LT", b"x")
    pixels = element(0x7FE00010, "OW", b"x" * 6000)
    later = element(0x7FE10010, "LO", b"x ")
    data = file_with(small + text + pixels + later + small)

    pixels_start = data.index(pixels)
    assert check_structure(data).left_out.ranges == ((pixels_start, pixels_start + len(pixels)),)


def test_zeros_behind_the_last_bulk_value_are_left_out_with_it() -> None:
    data = file_with(element(0x7FE00010, "OW", b"x" * 6000)) + b"\0" * 10

    ((_, end),) = check_structure(data).left_out.ranges

    assert end == len(data)


def test_bulk_values_in_implicit_vr_are_recognized_by_the_data_dictionary() -> None:
    private = implicit_element(0x00091002, b"x" * 5000)
    creator = implicit_element(0x00090010, b"x" * 5000)
    text = implicit_element(0x00104000, b"x" * 5000)
    pixels = implicit_element(0x7FE00010, b"x" * 5000)
    data = file_with(creator + private + text + pixels, IMPLICIT)
    private_start, pixels_start = data.index(private), data.index(pixels)
    assert check_structure(data).left_out.ranges == (
        (private_start, private_start + len(private)),
        (pixels_start, pixels_start + len(pixels)),
    )


def test_the_rest_keeps_its_encoding_if_the_first_element_is_left_out() -> None:
    first = implicit_element(0x00071001, b"x" * 5000)
    # Without the first data element, the length of this one looks like a VR.
    text = implicit_element(0x0008103E, b"x" * int.from_bytes(b"LO", "little"))
    pixels = implicit_element(0x7FE00010, b"x" * 5000)
    data = file_with(first + text + pixels, IMPLICIT)

    ranges = check_structure(data).left_out.ranges

    assert [data[start:end] for start, end in ranges] == [first, pixels]
    assert metadata_json(file_with(text, IMPLICIT)) == metadata_json(data)


@pytest.fixture
def sparse_file() -> Iterator[Path]:
    with tempfile.NamedTemporaryFile() as file:
        yield Path(file.name)


def test_a_mapped_file_of_two_gibibytes_takes_no_memory_and_can_be_closed(
    sparse_file: Path,
) -> None:
    pixel_bytes = 2**31
    head = file_with(element(0x00080018, "UI", b"1.2.4\0"))
    header = element(0x7FE00010, "OW", b"", pixel_bytes)
    with sparse_file.open("r+b") as file:
        file.write(head + header)
        file.truncate(len(head) + len(header) + pixel_bytes)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tracemalloc.start()
        try:
            structure = check_structure(mapped)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        mapped.close()
    assert peak_bytes < 1_000_000
    assert structure.left_out.ranges == ((len(head), len(head) + len(header) + pixel_bytes),)


def test_a_mapped_file_can_be_closed_after_a_refusal(sparse_file: Path) -> None:
    sparse_file.write_bytes(file_with(element(0x00100010, "PN", b"", 8)))
    with sparse_file.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pytest.raises(NotUnderstood):
            check_structure(mapped)
        mapped.close()


def test_a_deflated_data_set_is_checked_after_inflation() -> None:
    dataset = element(0x00080018, "UI", b"1.2.4\0") + element(0x7FE00010, "OW", b"x" * 3_000_000)
    stream = deflated(dataset)
    structure = check_structure(file_with(stream, DEFLATED))
    assert structure.values[SOP_INSTANCE_UID] == b"1.2.4\0"
    assert structure.left_out.is_inflated
    assert structure.left_out.ranges == ((14, len(dataset)),)
    check_structure(file_with(stream + b"\0", DEFLATED))
    assert "no data set" in refusal(file_with(deflated(b""), DEFLATED))

    message = refusal(file_with(deflated(dataset[:-1]), DEFLATED))
    assert "(7FE0,0010) at byte 14 is truncated" in message
    assert "the inflated data set has 2999999 left" in message


def test_a_truncated_or_damaged_deflate_stream_is_refused() -> None:
    stream = deflated(bytes(range(256)) * 10 + element(0x00080018, "UI", b"1.2.4\0"))
    for size in range(len(stream)):
        assert "truncated" in refusal(file_with(stream[:size], DEFLATED))
    assert "damaged" in refusal(file_with(b"\xff" * 100, DEFLATED))
    assert "follow the deflated data set" in refusal(file_with(deflated(b"") + b"\1", DEFLATED))


def test_a_correct_gzip_trailer_is_accepted() -> None:
    dataset = element(0x00080018, "UI", b"1.2.4\0")
    trailer = struct.pack("<LL", zlib.crc32(dataset), len(dataset))
    check_structure(file_with(deflated(dataset) + trailer, DEFLATED))
    assert refusal(file_with(deflated(dataset) + trailer[:-1], DEFLATED))
    assert refusal(file_with(deflated(dataset) + b"\1" + trailer[1:], DEFLATED))


def test_a_deflate_bomb_is_refused_in_constant_memory_and_closes_its_file() -> None:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflater.compress(b"\0" * 2**20)
    deflater.flush(zlib.Z_FULL_FLUSH)
    # After a full flush nothing refers back, so the same compressed megabyte can be repeated.
    megabyte = deflater.compress(b"\0" * 2**20) + deflater.flush(zlib.Z_FULL_FLUSH)
    bomb = file_with(megabyte * 1024 + deflater.flush(), DEFLATED)
    assert len(bomb) < 2_000_000

    opened = []

    def scratch() -> BinaryIO:
        opened.append(tempfile.TemporaryFile())  # noqa: SIM115 - closing it is what is tested
        return opened[-1]

    tracemalloc.start()
    try:
        with pytest.raises(CheckLimitExceeded, match="more than 268435456 bytes"):
            check_structure(bomb, scratch)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * 2**20
    assert len(opened) == 1
    assert opened[0].closed


def test_every_refusal_is_an_instance_refused() -> None:
    assert issubclass(NotUnderstood, InstanceRefused)
    assert issubclass(TransferSyntaxNotSupported, InstanceRefused)


def test_text_in_the_place_of_a_tag_does_not_appear_in_the_error() -> None:
    """After a wrong length, the next header is read from within a patient's name."""
    data = (TEST_FILES / "CT_small.dcm").read_bytes()
    name = data.index(b"\x10\x00\x10\x00PN")
    length = int.from_bytes(data[name + 6 : name + 8], "little")
    assert length > 8
    marked = data[: name + 8] + b"MARKED^N" + data[name + 16 :]
    refused = []
    for wrong in range(0, length, 2):
        try:
            check_structure(marked[: name + 6] + wrong.to_bytes(2, "little") + marked[name + 8 :])
        except NotUnderstood as error:
            refused.append(str(error))

    assert refused
    text = b"MARKED^N"
    for start in range(len(text) - 3):
        little = text[start : start + 4]
        as_tag = f"{little[1]:02X}{little[0]:02X},{little[3]:02X}{little[2]:02X}"
        as_lengths = {str(int.from_bytes(little[:size], "little")) for size in (2, 4)}
        for message in refused:
            assert as_tag not in message
            assert not as_lengths & set(message.split())


def test_the_size_of_the_file_meta_information_is_limited() -> None:
    meta = element(0x00020102, "OB", bytes(MAX_FILE_META_BYTES))
    with pytest.raises(CheckLimitExceeded, match="file meta information has more than"):
        check_structure(file_with(element(0x00200011, "IS", b"1 "), meta=meta))


def test_a_deflated_file_over_the_limit_for_inflated_data_is_refused() -> None:
    """A worker reads the complete file, although it inflates to almost nothing."""
    with tempfile.TemporaryFile() as file:
        file.write(file_with(deflated(element(0x00200011, "IS", b"1 ")), DEFLATED))
        file.truncate(MAX_INFLATED_BYTES + 1)
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as padded,
            pytest.raises(CheckLimitExceeded, match="the deflated file has"),
        ):
            check_structure(padded)


def test_the_beginning_of_a_deflated_file_gives_no_values() -> None:
    uid = element(0x0020000E, "UI", b"1.2.4\0")

    assert first_structure(file_with(uid), SERIES_INSTANCE_UID) is not None
    assert first_structure(file_with(deflated(uid), DEFLATED), SERIES_INSTANCE_UID) is None


def nested_sequences(depth: int) -> bytes:
    begin = element(0x00081140, "SQ", item(b"", UNDEFINED), UNDEFINED)
    return file_with(begin * depth + (ITEM_END + SEQUENCE_END) * depth)


def test_the_limit_of_nesting_can_be_lowered() -> None:
    check_structure(nested_sequences(3), limits=StructureLimits(max_nested_sequences=3))
    with pytest.raises(NotUnderstood, match="within 2 others"):
        check_structure(nested_sequences(3), limits=StructureLimits(max_nested_sequences=2))


def test_an_instance_within_the_highest_limits_can_be_described() -> None:
    dataset = element(0x00200011, "IS", b"1 ") * (MAX_ELEMENTS + 1)
    for data in (file_with(dataset), nested_sequences(HIGHEST.max_nested_sequences)):
        check_structure(data, limits=HIGHEST)
        assert metadata_json(data)
