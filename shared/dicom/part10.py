"""Part 10 files: the file meta information and the data set after it (PS3.10 7)."""

import mmap
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, TypeAlias

from pydicom.config import IGNORE
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from shared.dicom.header import (
    LITTLE_ENDIAN,
    VRS_OF_SHORT_LENGTH,
    is_vr,
    read_explicit_header,
    tag_name,
    truncated_header,
    truncated_value,
)
from shared.dicom.limits import MAX_FILE_META_BYTES, MAX_INFLATED_BYTES
from shared.dicom.refusal import CheckLimitExceeded, NotUnderstood, TransferSyntaxNotSupported
from shared.dicom.uids import TRANSFER_SYNTAX_UID, WANTED_UIDS, is_uid, keep_value, uid_text

Buffer: TypeAlias = bytes | memoryview | mmap.mmap
Scratch: TypeAlias = Callable[[], BinaryIO]

# PS3.5 A.5, and JPIP Referenced Deflate and JPIP HTJ2K Referenced Deflate of PS3.6 Table A-1: one
# deflate stream follows the file meta information.
_DEFLATED = frozenset(
    {DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
)

# Transfer syntaxes of PS3.6 Table A-1 that pydicom lacks: JPEG XL, and Deflated Image Frame
# Compression (PS3.5 A.4.13).
_NEWER_THAN_PYDICOM = frozenset(
    {
        "1.2.840.10008.1.2.4.110",
        "1.2.840.10008.1.2.4.111",
        "1.2.840.10008.1.2.4.112",
        "1.2.840.10008.1.2.8.1",
    }
)

_PREAMBLE_BYTES = 128
_GROUP_LENGTH = 0x00020000
_READ_BYTES = 64 * 1024
_INFLATE_BYTES = 1024 * 1024


class EncodedDataset(NamedTuple):
    """Hold an encoded data set: the bytes of `view` from offset `start` to its end."""

    view: memoryview
    start: int
    transfer_syntax_uid: str
    is_inflated: bool


@contextmanager
def open_dataset(
    data: Buffer, values: dict[int, bytes], scratch: Scratch
) -> Iterator[EncodedDataset]:
    """Read the file meta information, and yield the data set, inflated if it is deflated.

    Adds the wanted values of the file meta information to `values`. The data set's `view` is valid
    within the context only. Raises what `check_structure` raises.
    """
    with memoryview(data) as view:
        start = _read_file_meta(view, values)
        transfer_syntax_uid = _accepted_transfer_syntax(values)
        if transfer_syntax_uid not in _DEFLATED:
            yield EncodedDataset(view, start, transfer_syntax_uid, is_inflated=False)
            return
        if len(view) > MAX_INFLATED_BYTES:
            # Empty blocks, or padding after the stream, which the worker would read too.
            raise CheckLimitExceeded(
                f"the deflated file has more than {MAX_INFLATED_BYTES} bytes, which is the limit "
                "for a deflated transfer syntax"
            )
        with scratch() as file:
            _inflate(view, start, file)
            if file.tell() == 0:
                yield EncodedDataset(memoryview(b""), 0, transfer_syntax_uid, is_inflated=True)
                return
            file.flush()
            with (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as inflated,
                memoryview(inflated) as inflated_view,
            ):
                yield EncodedDataset(inflated_view, 0, transfer_syntax_uid, is_inflated=True)


def _read_file_meta(view: memoryview, values: dict[int, bytes]) -> int:
    """Keep the wanted values of group 0002 (PS3.10 7.1), and return the offset of the data set.

    The file meta information ends where the group changes, as in real files Group Length
    (0002,0000) may be missing or wrong. If it is right, data elements of group 0002 after that end
    are leftovers of a writer, and are ignored. Only a Transfer Syntax UID among them must be the
    same as before, because readers disagree on which one applies.
    """
    size_bytes = len(view)
    if size_bytes == 0:
        raise NotUnderstood("the part is empty; send a Part 10 file")
    if bytes(view[_PREAMBLE_BYTES : _PREAMBLE_BYTES + 4]) != b"DICM":
        raise NotUnderstood(_missing_preamble(view, f"DICM is missing at byte {_PREAMBLE_BYTES}"))
    position = start = _PREAMBLE_BYTES + 4
    end_by_length, is_past_end, is_explicit = 0, False, True
    while True:
        header = bytes(view[position : position + 6])
        is_past_end = is_past_end or position == end_by_length
        if position == start or is_past_end:
            is_explicit = is_vr(header[4:])
        # A deflate stream may begin with the same two bytes.
        if (
            is_past_end
            and not is_explicit
            and uid_text(values.get(TRANSFER_SYNTAX_UID, b"")) in _DEFLATED
        ):
            break
        if not header or not b"\2\0".startswith(header[:2]):
            break
        tag = 0x00020000 | int.from_bytes(header[2:4], "little")
        length, value_start = _read_meta_header(view, position, is_explicit=is_explicit)
        if length > size_bytes - value_start:
            raise truncated_value(tag, position, length, size_bytes - value_start, "the file")
        position = value_start + length
        if position > MAX_FILE_META_BYTES:
            raise CheckLimitExceeded(
                f"the file meta information has more than {MAX_FILE_META_BYTES} bytes, which is "
                "the limit"
            )
        if tag == _GROUP_LENGTH and length != 4:
            raise NotUnderstood(
                f"{tag_name(tag)} has {length} bytes instead of 4; other readers fail on it"
            )
        if tag == _GROUP_LENGTH and not end_by_length:
            end_by_length = position + int.from_bytes(view[value_start:position], "little")
        if tag in WANTED_UIDS and not (
            is_past_end and tag in values and tag != TRANSFER_SYNTAX_UID
        ):
            keep_value(values, tag, view, value_start, position)
    if position == start:
        raise NotUnderstood(
            _missing_preamble(
                view, "DICM at byte 128 is not followed by file meta information (PS3.10 7.1)"
            )
            if _looks_like_a_dataset(view)
            else "no file meta information (PS3.10 7.1) follows the preamble, so TransferSyntaxUID "
            "(0002,0010) is missing"
        )
    return position


def _read_meta_header(view: memoryview, start: int, *, is_explicit: bool) -> tuple[int, int]:
    """Return the length of a value and its offset, in bytes.

    PS3.10 7.1 requires explicit VR in the file meta information, but some files deviate.
    """
    size_bytes = len(view)
    if is_explicit:
        header = read_explicit_header(view, start, size_bytes, LITTLE_ENDIAN)
        if header is None:
            raise truncated_header(start, size_bytes, "the file")
        _, _, length, value_start = header
        return length, value_start
    if size_bytes - start < 8:
        raise truncated_header(start, size_bytes, "the file")
    (length,) = LITTLE_ENDIAN.implicit_length.unpack_from(view, start)
    return length, start + 8


def _looks_like_a_dataset(view: memoryview) -> bool:
    """Return whether the file begins like a data set or like file meta information."""
    begin = bytes(view[:6])
    return begin[:2] in (b"\2\0", b"\x08\0", b"\0\x08") or begin[4:] in VRS_OF_SHORT_LENGTH


def _missing_preamble(view: memoryview, cause: str) -> str:
    message = f"no DICOM preamble: {cause}"
    if _looks_like_a_dataset(view):
        return (
            f"{message}; this looks like a data set alone: send it as a Part 10 file, with "
            "preamble and file meta information (PS3.10 7.1)"
        )
    return f"{message}; this is not a Part 10 file, or not the beginning of one"


def _accepted_transfer_syntax(values: Mapping[int, bytes]) -> str:
    transfer_syntax_uid = uid_text(values.get(TRANSFER_SYNTAX_UID, b""))
    if not transfer_syntax_uid:
        raise NotUnderstood("TransferSyntaxUID (0002,0010) is missing or empty")
    if not is_uid(transfer_syntax_uid):
        raise NotUnderstood("TransferSyntaxUID (0002,0010) is not a valid UID")
    # Validation would make pydicom warn about leading zeros.
    known = UID(transfer_syntax_uid, validation_mode=IGNORE).type == "Transfer Syntax"
    if not known and transfer_syntax_uid not in _NEWER_THAN_PYDICOM:
        raise TransferSyntaxNotSupported(
            f"TransferSyntaxUID (0002,0010) is {transfer_syntax_uid}, "
            "which is not a transfer syntax of the DICOM standard"
        )
    return transfer_syntax_uid


def _inflate(view: memoryview, start: int, file: BinaryIO) -> None:
    """Inflate `view` from `start` into `file`, in pieces and within the limit."""
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)  # PS3.5 A.5: RFC 1951, no zlib header
    checksum = inflated_bytes = 0
    position = start
    while not inflater.eof:
        deflated = inflater.unconsumed_tail
        if not deflated:
            deflated = bytes(view[position : position + _READ_BYTES])
            position += len(deflated)
            if not deflated:
                raise NotUnderstood(
                    f"the deflated data set is truncated: the file ends at byte {len(view)}, "
                    "before the end of the deflate stream"
                )
        try:
            piece = inflater.decompress(deflated, _INFLATE_BYTES)
        except zlib.error:
            raise NotUnderstood(
                f"the deflated data set is damaged at or before byte {position}"
            ) from None
        inflated_bytes += len(piece)
        if inflated_bytes > MAX_INFLATED_BYTES:
            raise CheckLimitExceeded(
                f"the deflated data set inflates to more than {MAX_INFLATED_BYTES} bytes, "
                "which is the limit"
            )
        checksum = zlib.crc32(piece, checksum)
        file.write(piece)
    rest = position - len(inflater.unused_data)
    # Some writers append the trailer of a gzip stream (RFC 1952 2.3.1).
    if view[rest:] != struct.pack("<LL", checksum, inflated_bytes) and not only_zeros_follow(
        view, rest
    ):
        raise NotUnderstood(f"unexpected bytes follow the deflated data set, from byte {rest} on")


def only_zeros_follow(view: memoryview, start: int) -> bool:
    """Return whether only zero bytes follow: padding, which some writers and media add."""
    for position in range(start, len(view), _READ_BYTES):
        piece = bytes(view[position : position + _READ_BYTES])
        if piece.count(0) != len(piece):
            return False
    return True
