"""File meta information as devices and writers leave it (PS3.10 7.1)."""

import json
import struct

import pytest
from encoded import (
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    deflated,
    element,
    implicit_element,
)

from shared.dicom.metadata import metadata_json
from shared.dicom.refusal import NotUnderstood, TransferSyntaxNotAccepted
from shared.dicom.structure import Structure, check_structure
from shared.dicom.uids import SOP_INSTANCE_UID

PREAMBLE = b"\0" * 128 + b"DICM"
GE_PRIVATE_IMPLICIT_BIG_ENDIAN = b"1.2.840.113619.5.2"
INSTANCE = element(SOP_INSTANCE_UID, "UI", b"1.2.4\0")
IMPLICIT_INSTANCE = implicit_element(SOP_INSTANCE_UID, b"1.2.4\0")


def padded(uid: bytes) -> bytes:
    return uid + b"\0" * (len(uid) % 2)


def group(syntax: bytes, instance: bytes = b"1.2.4", *, is_implicit: bool = False) -> bytes:
    """Group 0002 with its right length."""

    def made(tag: int, vr: str, value: bytes) -> bytes:
        return implicit_element(tag, value) if is_implicit else element(tag, vr, value)

    rest = made(0x00020003, "UI", padded(instance)) + made(0x00020010, "UI", padded(syntax))
    return made(0x00020000, "UL", struct.pack("<L", len(rest))) + rest


def checked(data: bytes) -> Structure:
    structure = check_structure(data)
    assert structure.values[SOP_INSTANCE_UID] == b"1.2.4\0"
    assert json.loads(metadata_json(data)) == {"00080018": {"vr": "UI", "Value": ["1.2.4"]}}
    return structure


def test_file_meta_information_in_implicit_vr_is_accepted() -> None:
    for syntax, dataset in ((IMPLICIT, IMPLICIT_INSTANCE), (EXPLICIT, INSTANCE)):
        structure = checked(PREAMBLE + group(syntax, is_implicit=True) + dataset)
        assert structure.transfer_syntax_uid == syntax.decode()


def test_a_private_transfer_syntax_is_named_also_in_implicit_file_meta_information() -> None:
    for is_implicit in (True, False):
        meta = group(GE_PRIVATE_IMPLICIT_BIG_ENDIAN, is_implicit=is_implicit)
        with pytest.raises(TransferSyntaxNotAccepted, match=r"1\.2\.840\.113619\.5\.2"):
            check_structure(PREAMBLE + meta + IMPLICIT_INSTANCE)


@pytest.mark.parametrize("instance", [b"1.2.4", b"1.2.9"])
def test_a_data_set_may_begin_with_a_leftover_of_group_0002(instance: bytes) -> None:
    implicit = implicit_element(0x00020003, padded(instance))
    checked(PREAMBLE + group(IMPLICIT) + implicit + IMPLICIT_INSTANCE)
    explicit = element(0x00020003, "UI", padded(instance))
    checked(PREAMBLE + group(EXPLICIT) + explicit + INSTANCE)


@pytest.mark.parametrize("is_implicit", [True, False])
def test_of_two_groups_0002_the_first_counts_if_its_length_is_right(is_implicit: bool) -> None:
    second = group(EXPLICIT, b"1.2.9", is_implicit=is_implicit)
    structure = checked(PREAMBLE + group(EXPLICIT) + second + INSTANCE)
    assert structure.values[0x00020003] == b"1.2.4\0"


def test_leftovers_of_group_0002_may_each_be_encoded_otherwise() -> None:
    leftovers = implicit_element(0x00020012, b"1.2.7\0") + element(0x00020013, "SH", b"ab")
    checked(PREAMBLE + group(IMPLICIT) + leftovers + IMPLICIT_INSTANCE)


def test_file_meta_information_in_two_encodings_is_refused() -> None:
    """Some readers take all of it to be encoded as its first element."""
    for first, second in (
        (implicit_element(0x00020003, b"1.2.4\0"), element(0x00020010, "UI", padded(EXPLICIT))),
        (element(0x00020003, "UI", b"1.2.4\0"), implicit_element(0x00020010, padded(EXPLICIT))),
    ):
        with pytest.raises(NotUnderstood):
            check_structure(PREAMBLE + first + second + INSTANCE)


def test_group_0002_in_a_data_set_is_in_no_sidecar() -> None:
    later = element(0x00020016, "AE", b"AE")
    checked(PREAMBLE + group(EXPLICIT) + INSTANCE + later)
    checked(PREAMBLE + group(DEFLATED) + deflated(later + INSTANCE))


def test_a_deflated_file_may_have_more_of_group_0002_than_its_length_says() -> None:
    later = element(0x00020016, "AE", b"AE")
    checked(PREAMBLE + group(DEFLATED) + later + deflated(INSTANCE))


def test_two_groups_0002_with_different_transfer_syntaxes_are_refused() -> None:
    """Readers differ in which of them they follow."""
    for second in (group(IMPLICIT), element(0x00020010, "UI", padded(IMPLICIT))):
        with pytest.raises(NotUnderstood, match=r"\(0002,0010\) occurs twice"):
            check_structure(PREAMBLE + group(EXPLICIT) + second + INSTANCE)


def test_a_group_length_that_is_wrong_ends_nothing() -> None:
    for wrong in (0, 2, 14, 100_000):
        meta = element(0x00020000, "UL", struct.pack("<L", wrong))
        meta += element(0x00020003, "UI", b"1.2.4\0") + element(0x00020010, "UI", padded(EXPLICIT))
        checked(PREAMBLE + meta + INSTANCE)


def test_a_group_length_of_another_size_is_refused_as_other_readers_fail_on_it() -> None:
    meta = element(0x00020000, "UL", b"\0\1") + element(0x00020010, "UI", padded(EXPLICIT))
    with pytest.raises(NotUnderstood, match=r"\(0002,0000\) has 2 bytes"):
        check_structure(PREAMBLE + meta + INSTANCE)


def test_a_deflate_stream_may_begin_as_group_0002_does() -> None:
    data = PREAMBLE + group(DEFLATED) + _behind_an_empty_block(INSTANCE)
    assert data[len(PREAMBLE) + len(group(DEFLATED)) :].startswith(b"\2\0")
    checked(data)


def _behind_an_empty_block(dataset: bytes) -> bytes:
    """As a deflate stream that begins with two empty blocks."""
    # RFC 1951 3.2.3: BFINAL 0, BTYPE 01, end of block 0000000; BFINAL 0, BTYPE 00, padding to the
    # next byte, LEN 0, NLEN FFFF.
    return b"\x02\x00" + b"\x00\x00\xff\xff" + deflated(dataset)


def test_dicm_by_chance_in_a_bare_data_set_is_no_preamble() -> None:
    for begin in (element(0x00080005, "CS", b"ISO_IR 100"), implicit_element(0x00080008, b"A")):
        bare = begin + element(0x00080104, "LO", b"x" * (128 - len(begin) - 8))
        assert len(bare) == 128
        for data in (bare + b"DICM" + INSTANCE, bare + INSTANCE):
            with pytest.raises(NotUnderstood, match=r"no DICOM preamble.*data set alone"):
                check_structure(data)


def test_a_preamble_without_file_meta_information_is_told_so() -> None:
    for rest in (b"", INSTANCE):
        with pytest.raises(NotUnderstood, match=r"no file meta information .*\(0002,0010\)"):
            check_structure(PREAMBLE + rest)
