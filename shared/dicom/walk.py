"""The walk over a data set: every element, sequence and item in turn, proven whole (PS3.5 7)."""

from collections.abc import Iterator, Mapping, Set
from enum import Enum, auto
from typing import NamedTuple, TypeVar

from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from shared.dicom.header import (
    BIG_ENDIAN,
    GROUP_OF_ITEMS,
    ITEM,
    ITEM_DELIMITATION,
    LITTLE_ENDIAN,
    SEQUENCE_DELIMITATION,
    UNDEFINED_LENGTH,
    VRS_OF_LONG_LENGTH,
    VRS_OF_SHORT_LENGTH,
    Layout,
    cut_header,
    cut_value,
    dictionary_vr,
    is_like_a_vr,
    read_explicit_header,
    tag_name,
)
from shared.dicom.limits import MAX_FRAGMENTS, StructureLimits
from shared.dicom.part10 import EncodedDataset, only_zeros_follow
from shared.dicom.refusal import NotUnderstood

# PS3.5 A.1, and Papyrus 3 Implicit VR Little Endian, retired, of PS3.6 Table A-1.
_IMPLICIT = frozenset({ImplicitVRLittleEndian, "1.2.840.10008.1.20"})

Known = TypeVar("Known")


class StepKind(Enum):
    ELEMENT = auto()
    SEQUENCE = auto()
    ITEM = auto()
    END_OF_ITEM = auto()
    END_OF_SEQUENCE = auto()


class Step(NamedTuple):
    """One step of the walk. Only an ELEMENT has its value and offsets set.

    `vr` is the one to read the value with: the data dictionary's (PS3.6) where the file gives none
    or UN, and UN where the dictionary does not help either. It is "US or SS"
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
    layout: Layout


def walk(
    dataset: EncodedDataset, limits: StructureLimits, told: Set[int] | None = None
) -> Iterator[Step]:
    """Give each element, sequence and item of the data set in turn, and prove it whole on the way.

    With `told`, elements of a VR of short length (PS3.5 Table 7.1-2) are proven whole all the same,
    and given only if their tag is one of these.
    Iterative; time is linear, and memory bounded by `limits` and those of `limits.py`.
    Raises `NotUnderstood`.

    Sequences of VR UN are descended into as PS3.5 6.2.2 says. But whether headers have a VR is told
    by the first element of the data set and of each item, whatever the transfer syntax says: there
    are files that are implicit under an explicit one, and UN sequences with explicit items, and
    other readers take them.
    """
    run = Walk(dataset, limits)
    while True:
        yield from run.plain_elements(told)
        step = run.step()
        if step is None:
            return
        yield step


class Walk:
    """The walk step by step, for who can shorten it: nothing is passed over unproven."""

    def __init__(self, dataset: EncodedDataset, limits: StructureLimits) -> None:
        self._limits = limits
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
                BIG_ENDIAN if dataset.transfer_syntax_uid == ExplicitVRBigEndian else LITTLE_ENDIAN
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

    def plain_elements(self, told: Set[int] | None) -> Iterator[Step]:
        """The whole elements with a VR of short length that come next.

        Anything out of the ordinary is left to `step`. This is all that `step` would do for them,
        in a third of the time; they are most of any data set.
        """
        inside = self._inside
        if inside.is_sequence or not inside.is_explicit:
            return
        view, byte_order, depth = self._view, inside.layout.byte_order, self._depth
        unpack_from = inside.layout.explicit_header.unpack_from
        last = inside.limit - 8
        while (start := self._position) <= last and self._elements < self._limits.elements:
            group, number, vr_bytes, length = unpack_from(view, start)
            vr = VRS_OF_SHORT_LENGTH.get(vr_bytes)
            end = start + 8 + length
            # Behind the last of a data set or item there is more to do.
            if vr is None or end > last or group in (0, GROUP_OF_ITEMS):
                return
            self._position = end
            self._elements += 1
            tag = group << 16 | number
            if told is None or tag in told:
                yield Step(StepKind.ELEMENT, tag, vr, byte_order, depth, start, start + 8, end, end)

    @property
    def encoding(self) -> tuple[bool, str]:
        """Whether the headers that come next have a VR, and the byte order, `<` or `>`."""
        return self._inside.is_explicit, self._inside.layout.byte_order

    def known_elements(self, known: Mapping[bytes, Known], most_bytes: int) -> list[Known]:
        """What is known of the elements that come next, up to the first of which nothing is.

        The keys of `known` are whole elements in this `encoding`, their header of 8 bytes included,
        and none is longer than `most_bytes`. One takes a tenth of the time of its `step`.
        """
        found: list[Known] = []
        inside = self._inside
        if inside.is_sequence:
            return found
        view, position, last = self._view, self._position, inside.limit - 8
        layout, room = inside.layout, self._limits.elements - self._elements
        length = layout.short_length if inside.is_explicit else layout.implicit_length
        while position <= last and len(found) < room:
            end = position + 8 + length.unpack_from(view, position)[0]
            # Behind the last of a data set or item there is more to do.
            if end > last or end - position > most_bytes:
                break
            element = known.get(bytes(view[position:end]))
            if element is None:
                break
            found.append(element)
            position = end
        self._position = position
        self._elements += len(found)
        return found

    def _item(self) -> Step:
        """Enter the item that begins here, or leave the sequence at its delimitation item."""
        view, start, inside = self._view, self._position, self._inside
        if inside.limit - start < 8:
            raise self._out_of_bytes()
        group, number, length = inside.layout.implicit_header.unpack_from(view, start)
        tag = group << 16 | number
        # The length of a delimitation item is 0 (PS3.5 7.5.2), but some writers put other bytes
        # there, and nobody needs them.
        if tag == SEQUENCE_DELIMITATION and inside.is_delimited:
            self._position = start + 8
            return self._leave()
        if tag != ITEM:
            raise NotUnderstood(
                f"{tag_name(inside.tag)}, the sequence that begins at byte {inside.start}, has "
                f"{tag_name(tag)} at byte {start}, where only an item or its end can be"
            )
        self._elements += 1
        if self._elements > self._limits.elements:
            raise self._too_many()
        self._enter(tag, length, start + 8, is_sequence=False)
        self._look_for_vr()
        return Step(StepKind.ITEM)

    def _element(self) -> Step | None:
        view, start, inside = self._view, self._position, self._inside
        if inside.limit - start < 8:
            if not self._around and only_zeros_follow(view, start):
                return None
            raise self._out_of_bytes()
        byte_order = inside.layout.byte_order
        if inside.is_explicit:
            header = read_explicit_header(view, start, inside.limit, inside.layout)
            if header is None:
                raise self._out_of_bytes()
            tag, vr, length, value_start = header
            has_unknown_vr = vr == "UN"
            if has_unknown_vr:
                vr, byte_order = dictionary_vr(tag), "<"  # PS3.5 6.2.2: always little endian
        else:
            group, number, length = inside.layout.implicit_header.unpack_from(view, start)
            tag = group << 16 | number
            vr, value_start = dictionary_vr(tag), start + 8
            has_unknown_vr = vr == "UN"

        if tag >> 16 == GROUP_OF_ITEMS:
            return self._item_delimitation(tag)
        if tag >> 16 == 0:  # a command set's (PS3.7 6.3), or padding
            if tag == 0 and not self._around and only_zeros_follow(view, start):
                return None
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {start} is no element of a data set, and no padding, as "
                "other than zero bytes follow"
            )
        self._elements += 1
        if self._elements > self._limits.elements:
            raise self._too_many()

        if length == UNDEFINED_LENGTH:
            # PS3.5 6.2.2: UN of undefined length is a sequence, whatever the dictionary says.
            if vr in ("OB", "OW") and not has_unknown_vr:
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
                raise cut_value(tag, start, length, left, self._surroundings())
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
        if self._depth == self._limits.nested_sequences:
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self._position} is a sequence within "
                f"{self._limits.nested_sequences} others, and no more are taken"
            )
        step = Step(StepKind.SEQUENCE, tag, "SQ", depth=self._depth)
        self._enter(tag, length, value_start, is_sequence=True)
        self._depth += 1
        if has_unknown_vr:  # PS3.5 6.2.2: implicit VR little endian, whatever is around
            self._inside = self._inside._replace(is_explicit=False, layout=LITTLE_ENDIAN)
        return step

    def _is_sequence_of_items(self, value_start: int, length: int) -> bool:
        """Whether a value of VR UN is what the data dictionary says, a sequence."""
        item_tag = b"\xfe\xff\x00\xe0"
        return length == 0 or bytes(self._view[value_start : value_start + 4]) == item_tag

    def _item_delimitation(self, tag: int) -> Step:
        inside = self._inside
        if tag != ITEM_DELIMITATION or not inside.is_delimited:
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self._position} stands where an element should be"
            )
        self._position += 8
        return self._leave()

    def _enter(self, tag: int, length: int, value_start: int, *, is_sequence: bool) -> None:
        """Go into the sequence or item whose header begins at the position."""
        inside = self._inside
        is_delimited = length == UNDEFINED_LENGTH
        left = inside.limit - value_start
        if length > left and not is_delimited:
            raise cut_value(tag, self._position, length, left, self._surroundings())
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
            is_explicit = is_like_a_vr(vr)
        else:
            # A length can by chance read as a VR, but only if it is over 16 KiB; one of the VRs
            # that exist is much less likely than any two letters.
            is_explicit = vr in VRS_OF_SHORT_LENGTH or vr in VRS_OF_LONG_LENGTH
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
            if group != GROUP_OF_ITEMS or number != ITEM & 0xFFFF:
                if group << 16 | number == SEQUENCE_DELIMITATION:
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
        raise self._no_end(tag, self._position)

    def _too_many(self) -> NotUnderstood:
        return NotUnderstood(
            f"the data set has more than {self._limits.elements} elements and items"
        )

    def _surroundings(self) -> str:
        if self._inside.limit < len(self._view):
            return "the item or sequence around it"
        return self._whole

    def _no_end(self, tag: int, start: int) -> NotUnderstood:
        return NotUnderstood(
            f"{tag_name(tag)} at byte {start} is cut: {self._surroundings()} ends at byte "
            f"{self._inside.limit} without its delimitation item"
        )

    def _out_of_bytes(self) -> NotUnderstood:
        inside = self._inside
        if inside.is_delimited:
            return self._no_end(inside.tag, inside.start)
        return cut_header(self._position, inside.limit, self._surroundings())
