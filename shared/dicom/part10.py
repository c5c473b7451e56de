"""A Part 10 file: its file meta information, and the data set behind that (PS3.10 7)."""

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
    cut_header,
    cut_value,
    is_vr,
    read_explicit_header,
    tag_name,
)
from shared.dicom.limits import MAX_FILE_META_BYTES, MAX_INFLATED_BYTES
from shared.dicom.refusal import NotUnderstood, TooMuchToCheck, TransferSyntaxNotAccepted
from shared.dicom.uids import TRANSFER_SYNTAX_UID, WANTED_UIDS, is_uid, keep_value, uid_text

Buffer: TypeAlias = bytes | memoryview | mmap.mmap
Scratch: TypeAlias = Callable[[], BinaryIO]

# PS3.5 A.5, and JPIP Referenced Deflate and JPIP HTJ2K Referenced Deflate of PS3.6 Table A-1: all
# behind the file meta information is one deflate stream.
_DEFLATED = frozenset(
    {DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
)

# PS3.6 Table A-1 has these, and pydicom's dictionary not yet: JPEG XL, and frames that are deflated
# each by itself (PS3.5 A.4.13).
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
    """A data set as bytes, from `start` to the end of `view`."""

    view: memoryview
    start: int
    transfer_syntax_uid: str
    is_inflated: bool


@contextmanager
def open_dataset(
    data: Buffer, values: dict[int, bytes], scratch: Scratch
) -> Iterator[EncodedDataset]:
    """Read the file meta information, and give the data set behind it, inflated where needed.

    The wanted values of the file meta information are added to `values`. The data set's `view` is
    good within the context only. Raises as `check_structure` does.
    """
    with memoryview(data) as view:
        start = _read_file_meta(view, values)
        transfer_syntax_uid = _accepted_transfer_syntax(values)
        if transfer_syntax_uid not in _DEFLATED:
            yield EncodedDataset(view, start, transfer_syntax_uid, is_inflated=False)
            return
        if len(view) > MAX_INFLATED_BYTES:
            # As empty blocks, or as padding behind the stream; whoever reads it reads it all.
            raise TooMuchToCheck(
                f"the deflated file itself has more than {MAX_INFLATED_BYTES} bytes, which is the "
                "limit for a deflated transfer syntax"
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
    """Keep the wanted values of group 0002 (PS3.10 7.1), and return where the data set begins.

    The file meta information ends where the group changes, as real files lack Group Length
    (0002,0000) or have it wrong. Where it is right, elements of group 0002 behind that end are
    leftovers of a writer: of these the transfer syntax must be the same, as readers differ in which
    one they follow, and the rest counts for nothing.
    """
    size_bytes = len(view)
    if size_bytes == 0:
        raise NotUnderstood("the part is empty: there is no file in it")
    if bytes(view[_PREAMBLE_BYTES : _PREAMBLE_BYTES + 4]) != b"DICM":
        raise NotUnderstood(
            _words_without_preamble(view, f"there is no DICM at byte {_PREAMBLE_BYTES}")
        )
    position = start = _PREAMBLE_BYTES + 4
    end_by_length, is_behind_end, is_explicit = 0, False, True
    while True:
        header = bytes(view[position : position + 6])
        is_behind_end = is_behind_end or position == end_by_length
        if position == start or is_behind_end:
            is_explicit = is_vr(header[4:])
        # A deflate stream may begin with the same two bytes.
        if (
            is_behind_end
            and not is_explicit
            and uid_text(values.get(TRANSFER_SYNTAX_UID, b"")) in _DEFLATED
        ):
            break
        if not header or not b"\2\0".startswith(header[:2]):
            break
        tag = 0x00020000 | int.from_bytes(header[2:4], "little")
        length, value_start = _read_meta_header(view, position, is_explicit=is_explicit)
        if length > size_bytes - value_start:
            raise cut_value(tag, position, length, size_bytes - value_start, "the file")
        position = value_start + length
        if position > MAX_FILE_META_BYTES:
            raise TooMuchToCheck(
                f"the file meta information has more than {MAX_FILE_META_BYTES} bytes, which is "
                "the limit"
            )
        if tag == _GROUP_LENGTH and length != 4:
            raise NotUnderstood(
                f"{tag_name(tag)} has {length} bytes where it must have 4; other readers fail on it"
            )
        if tag == _GROUP_LENGTH and not end_by_length:
            end_by_length = position + int.from_bytes(view[value_start:position], "little")
        if tag in WANTED_UIDS and not (
            is_behind_end and tag in values and tag != TRANSFER_SYNTAX_UID
        ):
            keep_value(values, tag, view, value_start, position)
    if position == start:
        raise NotUnderstood(
            _words_without_preamble(
                view, "DICM at byte 128 is not followed by file meta information (PS3.10 7.1)"
            )
            if _looks_like_a_dataset(view)
            else "there is no file meta information (PS3.10 7.1) behind the preamble, so "
            "TransferSyntaxUID (0002,0010) is missing"
        )
    return position


def _read_meta_header(view: memoryview, start: int, *, is_explicit: bool) -> tuple[int, int]:
    """The length of an element's value, and where it begins.

    PS3.10 7.1 has file meta information in explicit VR, but there are files that have not.
    """
    size_bytes = len(view)
    if is_explicit:
        header = read_explicit_header(view, start, size_bytes, LITTLE_ENDIAN)
        if header is None:
            raise cut_header(start, size_bytes, "the file")
        _, _, length, value_start = header
        return length, value_start
    if size_bytes - start < 8:
        raise cut_header(start, size_bytes, "the file")
    (length,) = LITTLE_ENDIAN.implicit_length.unpack_from(view, start)
    return length, start + 8


def _looks_like_a_dataset(view: memoryview) -> bool:
    """Whether it begins as a data set, or file meta information alone, does; or has any VR."""
    begin = bytes(view[:6])
    return begin[:2] in (b"\2\0", b"\x08\0", b"\0\x08") or begin[4:] in VRS_OF_SHORT_LENGTH


def _words_without_preamble(view: memoryview, why: str) -> str:
    words = f"no DICOM preamble: {why}"
    if _looks_like_a_dataset(view):
        return (
            f"{words}; this looks like a data set alone, which has to be sent as a Part 10 file, "
            "with preamble and file meta information (PS3.10 7.1)"
        )
    return f"{words}; this is no Part 10 file, or not its beginning"


def _accepted_transfer_syntax(values: Mapping[int, bytes]) -> str:
    transfer_syntax_uid = uid_text(values.get(TRANSFER_SYNTAX_UID, b""))
    if not transfer_syntax_uid:
        raise NotUnderstood("TransferSyntaxUID (0002,0010) is missing or empty")
    if not is_uid(transfer_syntax_uid):
        raise NotUnderstood("TransferSyntaxUID (0002,0010) is not a UID")
    # Without validation, as pydicom would warn of leading zeros.
    known = UID(transfer_syntax_uid, validation_mode=IGNORE).type == "Transfer Syntax"
    if not known and transfer_syntax_uid not in _NEWER_THAN_PYDICOM:
        raise TransferSyntaxNotAccepted(
            f"TransferSyntaxUID (0002,0010) is {transfer_syntax_uid}, "
            "which is no transfer syntax of the DICOM standard"
        )
    return transfer_syntax_uid


def _inflate(view: memoryview, start: int, file: BinaryIO) -> None:
    """Inflate all of `view` from `start` into `file`, in pieces and within the limit."""
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)  # PS3.5 A.5: RFC 1951, without header
    checksum = inflated_bytes = 0
    position = start
    while not inflater.eof:
        deflated = inflater.unconsumed_tail
        if not deflated:
            deflated = bytes(view[position : position + _READ_BYTES])
            position += len(deflated)
            if not deflated:
                raise NotUnderstood(
                    f"the deflated data set is cut: its stream has no end by byte {len(view)}, "
                    "where the file ends"
                )
        try:
            piece = inflater.decompress(deflated, _INFLATE_BYTES)
        except zlib.error:
            raise NotUnderstood(
                f"the deflated data set is damaged at or before byte {position}"
            ) from None
        inflated_bytes += len(piece)
        if inflated_bytes > MAX_INFLATED_BYTES:
            raise TooMuchToCheck(
                f"the deflated data set has more than {MAX_INFLATED_BYTES} bytes once inflated, "
                "which is the limit"
            )
        checksum = zlib.crc32(piece, checksum)
        file.write(piece)
    rest = position - len(inflater.unused_data)
    # Some writers leave the trailer of a gzip stream (RFC 1952 2.3.1) behind.
    if view[rest:] != struct.pack("<LL", checksum, inflated_bytes) and not only_zeros_follow(
        view, rest
    ):
        raise NotUnderstood(f"there is something behind the deflated data set, from byte {rest} on")


def only_zeros_follow(view: memoryview, start: int) -> bool:
    """Whether nothing but zero bytes follows: padding, as some writers and media leave it."""
    for position in range(start, len(view), _READ_BYTES):
        piece = bytes(view[position : position + _READ_BYTES])
        if piece.count(0) != len(piece):
            return False
    return True
