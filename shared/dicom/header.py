"""The header of one data element: tag, VR and length (PS3.5 7.1, 7.5)."""

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
# PS3.5 Table 7.1-1: two reserved bytes and a 32-bit length follow these VRs.
VRS_OF_LONG_LENGTH = {
    vr.encode(): vr
    for vr in ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
}

# PS3.5 Table 6.2-1: VRs of binary numbers, with the format characters of `struct`.
NUMBER_FORMATS = {
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
    """Hold the layout of a header in one byte order (PS3.5 7.1.2 and 7.1.3)."""

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
    """Format a tag for an error message.

    A tag that is not in the data dictionary is never printed: after a wrong length, its bytes may
    be the text of a value.
    """
    if _is_known(tag):
        return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
    return "a private data element" if tag & 0x10000 else "an unknown data element"


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
    """Read the header at `start`, in explicit VR (PS3.5 7.1.2).

    Returns:
        Tag, VR, length and start of the value, all in bytes; None if the header is truncated. The
        VR is "" for Items, delimitation Items and zero bytes.

    Raises:
        NotUnderstood: the VR is missing or not in the standard. Readers disagree on the size of its
            length field, and so on everything that follows.
    """
    if limit - start < 8:
        return None
    group, number, vr_bytes, length = layout.explicit_header.unpack_from(view, start)
    tag = group << 16 | number
    vr = VRS_OF_SHORT_LENGTH.get(vr_bytes)
    if vr is not None:
        return tag, vr, length, start + 8
    if not looks_like_vr(vr_bytes):
        if group == GROUP_OF_ITEMS or tag == 0:
            return tag, "", 0, start + 8
        raise NotUnderstood(f"{tag_name(tag)} at byte {start} has no VR; explicit VR requires one")
    vr = VRS_OF_LONG_LENGTH.get(vr_bytes)
    if vr is None:
        raise NotUnderstood(f"{tag_name(tag)} at byte {start} has a VR that is not in the standard")
    if limit - start < 12:
        return None
    (length,) = layout.long_length.unpack_from(view, start + 8)
    return tag, vr, length, start + 12


def is_vr(vr_bytes: bytes) -> bool:
    """Return whether the standard defines this VR (PS3.5 6.2)."""
    return vr_bytes in VRS_OF_SHORT_LENGTH or vr_bytes in VRS_OF_LONG_LENGTH


def looks_like_vr(vr_bytes: bytes) -> bool:
    """Return whether these are two upper-case letters (PS3.5 6.2)."""
    return vr_bytes.isalpha() and vr_bytes.isupper()


@lru_cache(maxsize=8192)
def dictionary_vr(tag: int) -> str:
    """Return the VR of a tag in the data dictionary (PS3.6 6), or "UN"."""
    if tag & 0xFFFF == 0:
        return "UL"  # Group Length, PS3.5 7.2
    if tag & 0x10000:
        # PS3.5 7.8.1: elements 0010 to 00FF of an odd group are private creators.
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return "UN"
    # PS3.5 A.1: under implicit VR, Pixel Data and similar elements are OW. LUT Data may also be US.
    return vr if len(vr) == 2 or vr == "US or SS" else "OW"


def is_private_creator(tag: int) -> bool:
    """Return whether (gggg,00bb) reserves (gggg,bb00) to (gggg,bbFF) (PS3.5 7.8.1)."""
    return bool(tag & 0x10000) and 0x10 <= tag & 0xFFFF <= 0xFF


def truncated_header(start: int, limit: int, enclosing: str) -> NotUnderstood:
    return NotUnderstood(
        f"the header at byte {start} is truncated: {enclosing} has {limit - start} bytes left"
    )


def truncated_value(
    tag: int, start: int, length: int, left_bytes: int, enclosing: str
) -> NotUnderstood:
    needs = f"it needs {length} bytes and " if _is_known(tag) else ""
    return NotUnderstood(
        f"{tag_name(tag)} at byte {start} is truncated: {needs}{enclosing} has {left_bytes} left"
    )
