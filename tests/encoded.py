"""Data elements and Part 10 files as bytes, legal or not (PS3.5 7, PS3.10 7.1)."""

import struct
import zlib
from collections.abc import Iterable

EXPLICIT = b"1.2.840.10008.1.2.1"
IMPLICIT = b"1.2.840.10008.1.2"
BIG_ENDIAN = b"1.2.840.10008.1.2.2"
DEFLATED = b"1.2.840.10008.1.2.1.99"
JPEG = b"1.2.840.10008.1.2.4.50"
UNDEFINED = 0xFFFFFFFF
LONG_LENGTH_VRS = {"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"}


def element(tag: int, vr: str, value: bytes = b"", length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    header = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    if vr in LONG_LENGTH_VRS:
        return header + struct.pack("<HL", 0, length) + value
    return header + struct.pack("<H", length) + value


def implicit_element(tag: int, value: bytes = b"", length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, length) + value


def item(content: bytes = b"", length: int | None = None) -> bytes:
    return implicit_element(0xFFFEE000, content, length)


ITEM_END = implicit_element(0xFFFEE00D)
SEQUENCE_END = implicit_element(0xFFFEE0DD)


def file_with(dataset: bytes, transfer_syntax: bytes = EXPLICIT, meta: bytes = b"") -> bytes:
    padded = transfer_syntax + b"\0" * (len(transfer_syntax) % 2)
    return b"\0" * 128 + b"DICM" + meta + element(0x00020010, "UI", padded) + dataset


def deflated(dataset: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(dataset) + deflater.flush()


def without(data: bytes, ranges: Iterable[tuple[int, int]]) -> bytes:
    """What is left when these byte ranges, ascending and apart, are cut out."""
    kept, position = [], 0
    for start, end in ranges:
        assert position <= start < end <= len(data)
        kept.append(data[position:start])
        position = end
    return b"".join([*kept, data[position:]])
