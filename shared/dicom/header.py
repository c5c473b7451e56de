"""The header of one data element: its tag, VR and length (PS3.5 7.1, 7.5)."""

import struct
from functools import lru_cache
from typing import NamedTuple

from pydicom.datadict import dictionary_VR

from shared.dicom.refusal import NotUnderstood

# PS3.5 Table 7.1-2: a 16-bit length follows these VRs.
VRS_OF_SHORT_LENGTH = {
    vr.encode(): vr
    for vr in (
        *("AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH"),
        *("SL", "SS", "ST", "TM", "UI", "UL", "US"),
    )
}
# PS3.5 Table 7.1-1: two reserved bytes and a 32-bit length follow these.
VRS_OF_LONG_LENGTH = {
    vr.encode(): vr
    for vr in ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
}

# PS3.5 Table 6.2-1: binary numbers, with their format characters of `struct`.
NUMBERS = {
    "FL": "f",
    "FD": "d",
    "SL": "i",
    "SS": "h",
    "SV": "q",
    "UL": "I",
    "US": "H",
    "UV": "Q",
}

# PS3.5 Table 7.5-1 to 7.5-3
ITEM = 0xFFFEE000
ITEM_DELIMITATION = 0xFFFEE00D
SEQUENCE_DELIMITATION = 0xFFFEE0DD
GROUP_OF_ITEMS = 0xFFFE
UNDEFINED_LENGTH = 0xFFFFFFFF


class Layout(NamedTuple):
    """PS3.5 7.1.2 and 7.1.3: how a header is laid out, in one byte order."""

    byte_order: str
    explicit_header: struct.Struct
    implicit_header: struct.Struct
    short_length: struct.Struct
    implicit_length: struct.Struct
    long_length: struct.Struct


LITTLE_ENDIAN, BIG_ENDIAN = (
    Layout(
        byte_order,
        explicit_header=struct.Struct(byte_order + "HH2sH"),
        implicit_header=struct.Struct(byte_order + "HHL"),
        short_length=struct.Struct(byte_order + "6xH"),
        implicit_length=struct.Struct(byte_order + "4xL"),
        long_length=struct.Struct(byte_order + "L"),
    )
    for byte_order in "<>"
)


def tag_name(tag: int) -> str:
    """A tag in words for the sender.

    One that the data dictionary does not have is not repeated: behind a wrong length, what stands
    where a tag should be may be the text of a value.
    """
    if _is_known(tag):
        return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
    return "a private element" if tag & 0x10000 else "an element of no dictionary"


def _is_known(tag: int) -> bool:
    if tag in (ITEM, ITEM_DELIMITATION, SEQUENCE_DELIMITATION):
        return True
    try:
        return bool(dictionary_VR(tag))
    except KeyError:
        return False


def read_explicit_header(
    view: memoryview, start: int, limit: int, layout: Layout
) -> tuple[int, str, int, int] | None:
    """Tag, VR, length and where the value begins, by PS3.5 7.1.2; None where the header is cut.

    The VR is "" where there is none: with items and zero bytes. Raises `NotUnderstood` where there
    is none of the standard's: readers differ in how long its length field is, and so in what
    follows.
    """
    if limit - start < 8:
        return None
    group, number, vr_bytes, length = layout.explicit_header.unpack_from(view, start)
    tag = group << 16 | number
    vr = VRS_OF_SHORT_LENGTH.get(vr_bytes)
    if vr is not None:
        return tag, vr, length, start + 8
    if not is_like_a_vr(vr_bytes):
        if group == GROUP_OF_ITEMS or tag == 0:
            return tag, "", 0, start + 8
        raise NotUnderstood(f"{tag_name(tag)} at byte {start} has no VR where one must be")
    vr = VRS_OF_LONG_LENGTH.get(vr_bytes)
    if vr is None:
        raise NotUnderstood(f"{tag_name(tag)} at byte {start} has a VR that is not in the standard")
    if limit - start < 12:
        return None
    (length,) = layout.long_length.unpack_from(view, start + 8)
    return tag, vr, length, start + 12


def is_vr(vr_bytes: bytes) -> bool:
    """Whether these are a VR of the standard (PS3.5 6.2)."""
    return vr_bytes in VRS_OF_SHORT_LENGTH or vr_bytes in VRS_OF_LONG_LENGTH


def is_like_a_vr(vr_bytes: bytes) -> bool:
    """Whether these are two upper-case letters (PS3.5 6.2)."""
    return vr_bytes.isalpha() and vr_bytes.isupper()


@lru_cache(maxsize=8192)
def dictionary_vr(tag: int) -> str:
    """The VR of PS3.6 6 where the file has none; "UN" where it is not known."""
    if tag & 0xFFFF == 0:
        return "UL"  # Group Length, PS3.5 7.2
    if tag & 0x10000:
        # PS3.5 7.8.1: private, and a private creator if in these sixteen rows
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return "UN"
    # PS3.5 A.1: Pixel Data and its like are OW without a VR. LUT Data may also be US.
    return vr if len(vr) == 2 or vr == "US or SS" else "OW"


def is_private_creator(tag: int) -> bool:
    """Whether (gggg,00bb) reserves the elements (gggg,bb00) to (gggg,bbFF) (PS3.5 7.8.1)."""
    return bool(tag & 0x10000) and 0x10 <= tag & 0xFFFF <= 0xFF


def cut_header(start: int, limit: int, surroundings: str) -> NotUnderstood:
    return NotUnderstood(
        f"a header that begins at byte {start} is cut: {surroundings} has {limit - start} bytes "
        "left"
    )


def cut_value(
    tag: int, start: int, length: int, left_bytes: int, surroundings: str
) -> NotUnderstood:
    needs = f"it needs {length} bytes and " if _is_known(tag) else ""
    return NotUnderstood(
        f"{tag_name(tag)} at byte {start} is cut: {needs}{surroundings} has {left_bytes} left"
    )
