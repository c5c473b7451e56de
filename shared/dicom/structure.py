"""The structure check: proof that a Part 10 file is whole, before anything else reads it.

pydicom takes a truncated file for a shorter one and recurses into nested sequences. So every part
that arrives is first walked here: iteratively, within limits, copying no values, following each
length to the end of the file (PS3.10 7.1, PS3.5 7). The metadata sidecar is made by the same walk,
so whatever was accepted can also be described.

One cut no walk can see: exactly between two top-level data elements, which leaves a whole, shorter
data set. The length or the closing delimiter of the request guards against that one.
"""

import mmap
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import BinaryIO, NamedTuple, TypeAlias

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from shared.errors import StowgateError

Buffer: TypeAlias = bytes | memoryview | mmap.mmap
Scratch: TypeAlias = Callable[[], BinaryIO]

MAX_NESTED_SEQUENCES = 64
"""Sequences within sequences. Structured reports, the deepest in practice, stay well below; others
will read the file with pydicom, which overflows Python's stack at about 200."""

MAX_ELEMENTS = 200_000
"""Data elements and sequence items, nested ones included. Enhanced multi-frame objects of thousands
of frames have some tens of thousands; this many are walked in a fraction of a second."""

MAX_FRAGMENTS = 2_000_000
"""Fragments of encapsulated pixel data. Each frame has at least one (PS3.5 A.4), and whole slides
have some hundreds of thousands of frames; this many are walked in about a second."""

MAX_INFLATED_BYTES = 256 * 1024 * 1024
"""A deflated data set, inflated. Deflate shrinks up to 1000:1, so a megabyte could otherwise become
a gigabyte of scratch space; real objects in this transfer syntax stay far below."""

SMALLEST_BULK_BYTES = 4096
"""An element of no more than this is not worth a range of its own."""

KEPT_VALUE_BYTES = 1024
"""How much of a wanted value is kept: far more than a UID has, whatever its length field says."""

# PS3.6 6 and 7: the elements that the file's encoding and identity are read from.
MEDIA_STORAGE_SOP_CLASS_UID = 0x00020002
MEDIA_STORAGE_SOP_INSTANCE_UID = 0x00020003
TRANSFER_SYNTAX_UID = 0x00020010
SOP_CLASS_UID = 0x00080016
SOP_INSTANCE_UID = 0x00080018
STUDY_INSTANCE_UID = 0x0020000D
SERIES_INSTANCE_UID = 0x0020000E
_WANTED = frozenset(
    {
        MEDIA_STORAGE_SOP_CLASS_UID,
        MEDIA_STORAGE_SOP_INSTANCE_UID,
        TRANSFER_SYNTAX_UID,
        SOP_CLASS_UID,
        SOP_INSTANCE_UID,
        STUDY_INSTANCE_UID,
        SERIES_INSTANCE_UID,
    }
)

BULK_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
"""Top-level elements of these VRs are left out of the metadata sidecar."""

# PS3.5 Table 7.1-2: a 16-bit length follows these VRs.
_VRS_OF_SHORT_LENGTH = {
    vr.encode(): vr
    for vr in (
        *("AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH"),
        *("SL", "SS", "ST", "TM", "UI", "UL", "US"),
    )
}
# PS3.5 Table 7.1-1: two reserved bytes and a 32-bit length follow these, and any VR that a later
# edition of the standard adds.
_VRS_OF_LONG_LENGTH = {
    vr.encode(): vr
    for vr in ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
}

# PS3.5 A.5, and JPIP Referenced Deflate and JPIP HTJ2K Referenced Deflate of PS3.6 Table A-1: all
# behind the file meta information is one deflate stream.
_DEFLATED = frozenset(
    {DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
)
# PS3.5 A.1, and Papyrus 3 Implicit VR Little Endian, retired, of PS3.6 Table A-1.
_IMPLICIT = frozenset({ImplicitVRLittleEndian, "1.2.840.10008.1.20"})

# PS3.5 Table 7.5-1 to 7.5-3
_ITEM = 0xFFFEE000
_ITEM_DELIMITATION = 0xFFFEE00D
_SEQUENCE_DELIMITATION = 0xFFFEE0DD
_GROUP_OF_ITEMS = 0xFFFE
_UNDEFINED_LENGTH = 0xFFFFFFFF

UID_MAX_CHARACTERS = 64
_UID_GRAMMAR = re.compile(r"[0-9]+(\.[0-9]+)*")
_PREAMBLE_BYTES = 128
_READ_BYTES = 64 * 1024
_INFLATE_BYTES = 1024 * 1024


class InstanceRefused(StowgateError):
    """One part that is not stored. Its text says why, without values of the data set.

    The two SOP UIDs are set when both are known and legal, so that the sender can be told which
    instance is meant (PS3.18 10.5.3: Failed SOP Sequence), and otherwise both None.
    """

    def __init__(
        self,
        words: str,
        sop_class_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> None:
        super().__init__(words)
        self.sop_class_uid = sop_class_uid
        self.sop_instance_uid = sop_instance_uid


class NotUnderstood(InstanceRefused):
    """Not Part 10, truncated, malformed, or over the structural limits: Failure Reason C000."""


class TransferSyntaxNotAccepted(InstanceRefused):
    """Not a transfer syntax of PS3.6 Table A-1: Failure Reason C122."""


class AttributesMissing(InstanceRefused):
    """An attribute that every instance has is not there: Failure Reason A900."""


@dataclass(frozen=True)
class Structure:
    """What the check learnt on its way through a whole file.

    `values` holds the raw values of the elements that identity is read from, by tag, each at most
    `KEPT_VALUE_BYTES` long. `bulk_ranges` are (start, end) byte ranges of the file, ascending and
    apart, over whole top-level elements that the metadata sidecar leaves out: the file without them
    gives the same sidecar. Empty for a deflated file.
    """

    transfer_syntax_uid: str
    values: Mapping[int, bytes]
    bulk_ranges: tuple[tuple[int, int], ...]


class StepKind(Enum):
    ELEMENT = auto()
    SEQUENCE = auto()
    ITEM = auto()
    END_OF_ITEM = auto()
    END_OF_SEQUENCE = auto()


class Step(NamedTuple):
    """One step of the walk. Only an ELEMENT has its value and offsets set.

    `vr` is the one to read the value with: the data dictionary's (PS3.6) where the file gives none,
    UN, or one of no edition, and UN where the dictionary does not help either. It is "US or SS"
    where only Pixel Representation (0028,0103) can tell. `byte_order` is `<` or `>`. `depth` is how
    many sequences are around the element. The offsets count bytes of the buffer that is walked: the
    header begins at `start`, the value is [`value_start`, `value_end`), and `end` is where the next
    header begins.
    """

    kind: StepKind
    tag: int = 0
    vr: str = ""
    byte_order: str = ""
    depth: int = 0
    start: int = 0
    value_start: int = 0
    value_end: int = 0
    end: int = 0


class EncodedDataset(NamedTuple):
    """A data set as bytes, from `start` to the end of `view`."""

    view: memoryview
    start: int
    transfer_syntax_uid: str
    is_inflated: bool


def is_uid(text: str) -> bool:
    """Whether `text` is a UID as we take it: PS3.5 9.1, but a component may begin with zeros."""
    return len(text) <= UID_MAX_CHARACTERS and _UID_GRAMMAR.fullmatch(text) is not None


def uid_text(value: bytes) -> str:
    """A UID without its padding: NUL by PS3.5 9.1, spaces by custom."""
    return value.rstrip(b"\0 ").decode("latin-1")


def tag_name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def check_structure(data: Buffer, scratch: Scratch = tempfile.TemporaryFile) -> Structure:
    """Walk one Part 10 file from its first byte to its last.

    Time is linear in the number of elements and memory constant: `data` may map a file of any size.
    A deflated data set is inflated into the file that `scratch` opens. That file needs a descriptor
    and is closed again.

    Raises `NotUnderstood` for what is not whole, malformed or over the limits of this module, and
    `TransferSyntaxNotAccepted`.
    """
    values: dict[int, bytes] = {}
    try:
        with open_dataset(data, values, scratch) as dataset:
            bulk_ranges = _collect(dataset, values)
    except InstanceRefused as refused:
        of_dataset = sop_uids(values, SOP_CLASS_UID, SOP_INSTANCE_UID)
        # The walk may have ended before these; PS3.10 7.1 has them ahead of the data set as well.
        refused.sop_class_uid, refused.sop_instance_uid = (
            of_dataset
            if of_dataset[0]
            else sop_uids(values, MEDIA_STORAGE_SOP_CLASS_UID, MEDIA_STORAGE_SOP_INSTANCE_UID)
        )
        raise
    return Structure(
        dataset.transfer_syntax_uid, values, () if dataset.is_inflated else bulk_ranges
    )


def _collect(dataset: EncodedDataset, values: dict[int, bytes]) -> tuple[tuple[int, int], ...]:
    """Walk to the end, add the wanted values to `values`, and return the bulk ranges."""
    bulk_ranges: list[tuple[int, int]] = []
    step = None
    for step in walk(dataset):
        if step.depth or step.kind is not StepKind.ELEMENT:
            continue
        if step.tag in _WANTED:
            _keep(values, step.tag, dataset.view, step.value_start, step.value_end)
        elif step.vr in BULK_VRS and step.end - step.start > SMALLEST_BULK_BYTES:
            if bulk_ranges and bulk_ranges[-1][1] == step.start:
                bulk_ranges[-1] = (bulk_ranges[-1][0], step.end)
            else:
                bulk_ranges.append((step.start, step.end))
    if step is None:
        raise NotUnderstood("the file ends with its file meta information: it has no data set")
    return tuple(bulk_ranges)


def _keep(values: dict[int, bytes], tag: int, view: memoryview, start: int, end: int) -> None:
    value = bytes(view[start : min(end, start + KEPT_VALUE_BYTES)])
    # PS3.5 7.1: a tag occurs at most once. Files exist that repeat one of these unchanged; where it
    # changes, two readers would take the file for two different instances.
    if values.setdefault(tag, value) != value:
        raise NotUnderstood(f"{tag_name(tag)} occurs twice, and differs at byte {start}")


def sop_uids(
    values: Mapping[int, bytes], class_tag: int, instance_tag: int
) -> tuple[str, str] | tuple[None, None]:
    """The two UIDs that name an instance to its sender, when both are known and legal."""
    sop_class_uid = uid_text(values.get(class_tag, b""))
    sop_instance_uid = uid_text(values.get(instance_tag, b""))
    if is_uid(sop_class_uid) and is_uid(sop_instance_uid):
        return sop_class_uid, sop_instance_uid
    return None, None


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
    """Take the wanted values of group 0002 (PS3.10 7.1), and return where the data set begins.

    Group Length (0002,0000) is not relied on, as real files lack it or have it wrong: the file meta
    information ends where the group changes.
    """
    size_bytes = len(view)
    if size_bytes == 0:
        raise NotUnderstood("the part is empty: there is no file in it")
    if bytes(view[_PREAMBLE_BYTES : _PREAMBLE_BYTES + 4]) != b"DICM":
        raise NotUnderstood(_words_without_preamble(view))
    position = _PREAMBLE_BYTES + 4
    for _ in range(MAX_ELEMENTS):
        group = bytes(view[position : position + 2])
        if not group or not b"\2\0".startswith(group):
            return position
        header = _explicit_header(view, position, size_bytes, _LITTLE_ENDIAN)
        if header is None:
            raise _cut_header(position, size_bytes, "the file")
        tag, _, length, value_start = header
        if length > size_bytes - value_start:
            raise _cut_value(tag, position, length, size_bytes - value_start, "the file")
        position = value_start + length
        if tag in _WANTED:
            _keep(values, tag, view, value_start, position)
    raise NotUnderstood(f"the file meta information has more than {MAX_ELEMENTS} elements")


def _words_without_preamble(view: memoryview) -> str:
    words = f"no DICOM preamble: there is no DICM at byte {_PREAMBLE_BYTES}"
    begin = bytes(view[:6])
    # The groups that a data set, or file meta information alone, begins with; or any VR.
    if begin[:2] in (b"\2\0", b"\x08\0", b"\0\x08") or begin[4:] in _VRS_OF_SHORT_LENGTH:
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
    if UID(transfer_syntax_uid, validation_mode=IGNORE).type != "Transfer Syntax":
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
            raise NotUnderstood(f"the deflated data set has more than {MAX_INFLATED_BYTES} bytes")
        checksum = zlib.crc32(piece, checksum)
        file.write(piece)
    rest = position - len(inflater.unused_data)
    # Some writers leave the trailer of a gzip stream (RFC 1952 2.3.1) behind.
    if view[rest:] != struct.pack("<LL", checksum, inflated_bytes) and not _is_zero(view, rest):
        raise NotUnderstood(f"there is something behind the deflated data set, from byte {rest} on")


class _Layout(NamedTuple):
    """PS3.5 7.1.2 and 7.1.3: how a header is laid out, in one byte order."""

    byte_order: str
    explicit_header: struct.Struct
    implicit_header: struct.Struct
    long_length: struct.Struct


_LITTLE_ENDIAN, _BIG_ENDIAN = (
    _Layout(
        byte_order,
        explicit_header=struct.Struct(byte_order + "HH2sH"),
        implicit_header=struct.Struct(byte_order + "HHL"),
        long_length=struct.Struct(byte_order + "L"),
    )
    for byte_order in "<>"
)


class _Container(NamedTuple):
    """What the walk is in: the data set, an item, or a sequence.

    Its bytes end at `limit`, or where it is delimited, with a delimitation item before that.
    """

    is_sequence: bool
    tag: int
    start: int
    limit: int
    is_delimited: bool
    is_explicit: bool
    layout: _Layout


def walk(dataset: EncodedDataset) -> Iterator[Step]:
    """Give each element, sequence and item of the data set in turn, and prove it whole on the way.

    Iterative; time is linear, and memory bounded by the limits of this module. Raises
    `NotUnderstood`.

    Sequences of VR UN are descended into as PS3.5 6.2.2 says. But whether headers have a VR is told
    by the first element of the data set and of each item, whatever the transfer syntax says: there
    are files that are implicit under an explicit one, and UN sequences with explicit items, and
    other readers take them.
    """
    return iter(_Walk(dataset).step, None)


class _Walk:
    def __init__(self, dataset: EncodedDataset) -> None:
        self._view = dataset.view
        self._position = dataset.start
        self._whole = "the inflated data set" if dataset.is_inflated else "the file"
        self._around: list[_Container] = []
        self._depth = 0
        self._elements = 0
        self._fragments = 0
        self._inside = _Container(
            is_sequence=False,
            tag=0,
            start=dataset.start,
            limit=len(dataset.view),
            is_delimited=False,
            is_explicit=dataset.transfer_syntax_uid not in _IMPLICIT,
            layout=(
                _BIG_ENDIAN
                if dataset.transfer_syntax_uid == ExplicitVRBigEndian
                else _LITTLE_ENDIAN
            ),
        )
        self._look_for_vr()

    def step(self) -> Step | None:
        """The next step, or None behind the last."""
        inside = self._inside
        if self._position == inside.limit and not inside.is_delimited:
            return self._leave() if self._around else None
        if inside.is_sequence:
            return self._item()
        return self._element()

    def _item(self) -> Step:
        """Enter the item that begins here, or leave the sequence at its delimitation item."""
        view, start, inside = self._view, self._position, self._inside
        if inside.limit - start < 8:
            raise self._out_of_bytes()
        group, number, length = inside.layout.implicit_header.unpack_from(view, start)
        tag = group << 16 | number
        # The length of a delimitation item is 0 (PS3.5 7.5.2), but some writers put other bytes
        # there, and nobody needs them.
        if tag == _SEQUENCE_DELIMITATION and inside.is_delimited:
            self._position = start + 8
            return self._leave()
        if tag != _ITEM:
            raise NotUnderstood(
                f"{tag_name(inside.tag)}, the sequence that begins at byte {inside.start}, has "
                f"{tag_name(tag)} at byte {start}, where only an item or its end can be"
            )
        self._elements += 1
        if self._elements > MAX_ELEMENTS:
            raise self._too_many()
        self._enter(tag, length, start + 8, is_sequence=False)
        self._look_for_vr()
        return Step(StepKind.ITEM)

    def _element(self) -> Step | None:
        view, start, inside = self._view, self._position, self._inside
        if inside.limit - start < 8:
            if not self._around and _is_zero(view, start):
                return None
            raise self._out_of_bytes()
        byte_order = inside.layout.byte_order
        if inside.is_explicit:
            header = _explicit_header(view, start, inside.limit, inside.layout)
            if header is None:
                raise self._out_of_bytes()
            tag, vr, length, value_start = header
            has_unknown_vr = vr == "UN"
            if has_unknown_vr:
                vr, byte_order = _dictionary_vr(tag), "<"  # PS3.5 6.2.2: always little endian
        else:
            group, number, length = inside.layout.implicit_header.unpack_from(view, start)
            tag = group << 16 | number
            vr, value_start = _dictionary_vr(tag), start + 8
            has_unknown_vr = vr == "UN"

        if tag >> 16 == _GROUP_OF_ITEMS:
            return self._item_delimitation(tag)
        if tag == 0:  # a command set's (PS3.7 6.3), or padding
            if not self._around and _is_zero(view, start):
                return None
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {start} is no element of a data set, and no padding, as "
                "other than zero bytes follow"
            )
        self._elements += 1
        if self._elements > MAX_ELEMENTS:
            raise self._too_many()

        if length == _UNDEFINED_LENGTH:
            if vr in ("OB", "OW"):
                value_end = self._end_of_fragments(tag, value_start)
                end = value_end + 8
            elif vr == "SQ" or has_unknown_vr:
                return self._sequence(tag, length, value_start, has_unknown_vr)
            else:
                raise NotUnderstood(
                    f"{tag_name(tag)} at byte {start} has undefined length, which its VR cannot "
                    "have (PS3.5 7.1.1)"
                )
        else:
            left = inside.limit - value_start
            if length > left:
                raise _cut_value(tag, start, length, left, self._surroundings())
            if vr == "SQ":
                if not has_unknown_vr or self._is_sequence_of_items(value_start, length):
                    return self._sequence(tag, length, value_start, has_unknown_vr)
                vr = "UN"
            value_end = end = value_start + length
        self._position = end
        return Step(
            StepKind.ELEMENT, tag, vr, byte_order, self._depth, start, value_start, value_end, end
        )

    def _sequence(self, tag: int, length: int, value_start: int, has_unknown_vr: bool) -> Step:
        if self._depth == MAX_NESTED_SEQUENCES:
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self._position} is a sequence within "
                f"{MAX_NESTED_SEQUENCES} others, and no more are taken"
            )
        step = Step(StepKind.SEQUENCE, tag, "SQ", depth=self._depth)
        self._enter(tag, length, value_start, is_sequence=True)
        self._depth += 1
        if has_unknown_vr:  # PS3.5 6.2.2: implicit VR little endian, whatever is around
            self._inside = self._inside._replace(is_explicit=False, layout=_LITTLE_ENDIAN)
        return step

    def _is_sequence_of_items(self, value_start: int, length: int) -> bool:
        """Whether a value of VR UN is what the data dictionary says, a sequence."""
        item_tag = b"\xfe\xff\x00\xe0"
        return length == 0 or bytes(self._view[value_start : value_start + 4]) == item_tag

    def _item_delimitation(self, tag: int) -> Step:
        inside = self._inside
        if tag != _ITEM_DELIMITATION or not inside.is_delimited:
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self._position} stands where an element should be"
            )
        self._position += 8
        return self._leave()

    def _enter(self, tag: int, length: int, value_start: int, *, is_sequence: bool) -> None:
        """Go into the sequence or item whose header begins at the position."""
        inside = self._inside
        is_delimited = length == _UNDEFINED_LENGTH
        left = inside.limit - value_start
        if length > left and not is_delimited:
            raise _cut_value(tag, self._position, length, left, self._surroundings())
        self._around.append(inside)
        self._inside = _Container(
            is_sequence,
            tag,
            self._position,
            inside.limit if is_delimited else value_start + length,
            is_delimited,
            inside.is_explicit,
            inside.layout,
        )
        self._position = value_start

    def _leave(self) -> Step:
        is_sequence = self._inside.is_sequence
        self._inside = self._around.pop()
        if is_sequence:
            self._depth -= 1
            return Step(StepKind.END_OF_SEQUENCE)
        return Step(StepKind.END_OF_ITEM)

    def _look_for_vr(self) -> None:
        """Tell from the first element of a data set or item whether its headers have a VR."""
        inside = self._inside
        vr = bytes(self._view[self._position + 4 : min(self._position + 6, inside.limit)])
        if len(vr) < 2:
            return
        if inside.is_explicit:
            is_explicit = _is_like_a_vr(vr)
        else:
            # A length can by chance read as a VR, but only if it is over 16 KiB; one of the VRs
            # that exist is much less likely than any two letters.
            is_explicit = vr in _VRS_OF_SHORT_LENGTH or vr in _VRS_OF_LONG_LENGTH
        if is_explicit != inside.is_explicit:
            self._inside = inside._replace(is_explicit=is_explicit)

    def _end_of_fragments(self, tag: int, value_start: int) -> int:
        """Where the delimitation item of encapsulated pixel data begins (PS3.5 A.4)."""
        inside, view = self._inside, self._view
        limit = inside.limit
        unpack_from = inside.layout.implicit_header.unpack_from
        position = value_start
        while limit - position >= 8:
            group, number, length = unpack_from(view, position)
            if group != _GROUP_OF_ITEMS or number != _ITEM & 0xFFFF:
                if group << 16 | number == _SEQUENCE_DELIMITATION:
                    return position
                raise NotUnderstood(
                    f"{tag_name(tag)} at byte {self._position} has "
                    f"{tag_name(group << 16 | number)} at byte {position}, where only a fragment "
                    "or its end can be"
                )
            position += 8
            if length > limit - position:
                raise NotUnderstood(
                    f"{tag_name(tag)} at byte {self._position} is cut: its fragment at byte "
                    f"{position - 8} needs {length} bytes and {self._surroundings()} has "
                    f"{limit - position} left"
                )
            position += length
            self._fragments += 1
            if self._fragments > MAX_FRAGMENTS:
                raise NotUnderstood(f"more than {MAX_FRAGMENTS} fragments of pixel data")
        raise _no_end(tag, self._position, limit, self._surroundings())

    def _too_many(self) -> NotUnderstood:
        return NotUnderstood(f"the data set has more than {MAX_ELEMENTS} elements and items")

    def _surroundings(self) -> str:
        if self._inside.limit < len(self._view):
            return "the item or sequence around it"
        return self._whole

    def _out_of_bytes(self) -> NotUnderstood:
        inside = self._inside
        if inside.is_delimited:
            return _no_end(inside.tag, inside.start, inside.limit, self._surroundings())
        return _cut_header(self._position, inside.limit, self._surroundings())


def _explicit_header(
    view: memoryview, start: int, limit: int, layout: _Layout
) -> tuple[int, str, int, int] | None:
    """Tag, VR, length and where the value begins, by PS3.5 7.1.2; None where the header is cut.

    A VR of no edition is given as UN, and "" where there is none: with items and zero bytes.
    """
    if limit - start < 8:
        return None
    group, number, vr_bytes, length = layout.explicit_header.unpack_from(view, start)
    tag = group << 16 | number
    vr = _VRS_OF_SHORT_LENGTH.get(vr_bytes)
    if vr is not None:
        return tag, vr, length, start + 8
    if not _is_like_a_vr(vr_bytes):
        if group == _GROUP_OF_ITEMS or tag == 0:
            return tag, "", 0, start + 8
        raise NotUnderstood(f"{tag_name(tag)} at byte {start} has no VR where one must be")
    if limit - start < 12:
        return None
    (length,) = layout.long_length.unpack_from(view, start + 8)
    return tag, _VRS_OF_LONG_LENGTH.get(vr_bytes, "UN"), length, start + 12


def _is_like_a_vr(vr_bytes: bytes) -> bool:
    """Whether these are two upper-case letters (PS3.5 6.2)."""
    return vr_bytes.isalpha() and vr_bytes.isupper()


@lru_cache(maxsize=8192)
def _standard_vr(tag: int) -> str:
    try:
        return dictionary_VR(tag)
    except KeyError:
        return "UN"


def _dictionary_vr(tag: int) -> str:
    """The VR of PS3.6 6 where the file has none; "UN" where it is not known."""
    if tag & 0xFFFF == 0:
        return "UL"  # Group Length, PS3.5 7.2
    if tag & 0x10000:
        # PS3.5 7.8.1: private, and a private creator if in these sixteen rows
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    vr = _standard_vr(tag)
    # PS3.5 A.1: Pixel Data and its like are OW without a VR. LUT Data may also be US.
    return vr if len(vr) == 2 or vr == "US or SS" else "OW"


def _is_zero(view: memoryview, start: int) -> bool:
    """Whether nothing but zero bytes follows: padding, as some writers and media leave it."""
    for position in range(start, len(view), _READ_BYTES):
        piece = bytes(view[position : position + _READ_BYTES])
        if piece.count(0) != len(piece):
            return False
    return True


def _cut_header(start: int, limit: int, surroundings: str) -> NotUnderstood:
    return NotUnderstood(
        f"a header that begins at byte {start} is cut: {surroundings} has {limit - start} bytes "
        "left"
    )


def _cut_value(
    tag: int, start: int, length: int, left_bytes: int, surroundings: str
) -> NotUnderstood:
    return NotUnderstood(
        f"{tag_name(tag)} at byte {start} is cut: it needs {length} bytes and {surroundings} has "
        f"{left_bytes} left"
    )


def _no_end(tag: int, start: int, limit: int, surroundings: str) -> NotUnderstood:
    return NotUnderstood(
        f"{tag_name(tag)} at byte {start} is cut: {surroundings} ends at byte {limit} without its "
        "delimitation item"
    )
