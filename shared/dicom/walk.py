"""The walk over a data set: every element, sequence and item in turn, proven whole (PS3.5 7)."""

import copy
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
    VRS_OF_SHORT_LENGTH,
    Layout,
    cut_header,
    cut_value,
    dictionary_vr,
    is_like_a_vr,
    is_private_creator,
    is_vr,
    private_vr,
    read_explicit_header,
    tag_name,
)
from shared.dicom.limits import (
    MAX_CHECKED_ELEMENTS,
    MAX_FRAGMENTS,
    MAX_RETRIED_ELEMENTS,
    StructureLimits,
)
from shared.dicom.part10 import EncodedDataset, only_zeros_follow
from shared.dicom.refusal import NotUnderstood, TooMuchToCheck

# PS3.5 A.1, and Papyrus 3 Implicit VR Little Endian, retired, of PS3.6 Table A-1.
_IMPLICIT = frozenset({ImplicitVRLittleEndian, "1.2.840.10008.1.20"})

_CREATOR_MAX_BYTES = 64
_BLANK_VRS = (b"  ", b"\0\0")
_NOTHING: frozenset[int] = frozenset()

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
    `creators` are those of its private elements, by group and block (PS3.5 7.8.1).
    """

    is_sequence: bool
    tag: int
    start: int
    limit: int
    is_delimited: bool
    is_explicit: bool
    layout: Layout
    creators: dict[int, str]


class _NestedTooDeep(NotUnderstood):
    """However the rest may be encoded."""


class _Attempt(NamedTuple):
    """How far the walk comes from `start` if what begins there is encoded in a certain way."""

    start: int
    end: int
    error: NotUnderstood | None


class Walk:
    """The walk over one data set. Iterative; its time is linear, and its memory bounded by `limits`
    and those of `limits.py`.

    Sequences of VR UN are descended into as PS3.5 6.2.2 says. A data set or an item whose first
    element looks as if it were encoded otherwise than declared, with or without VRs, is believed to
    be if it can be walked to its end that way, and not as declared: such files exist.
    """

    def __init__(
        self, dataset: EncodedDataset, limits: StructureLimits, *, is_whole: bool = True
    ) -> None:
        """Unless it `is_whole`, the data set goes on behind its end, and what depends on that is
        refused. Raises as `step` does."""
        self._limits = limits
        self._view = dataset.view
        self._is_whole = is_whole
        self._whole = "the inflated data set" if dataset.is_inflated else "the file"
        self.position = dataset.start
        self.element_count = 0
        self._max_elements = MAX_CHECKED_ELEMENTS
        self._retries_left = MAX_RETRIED_ELEMENTS
        self._is_trial = False
        self._may_be_padded = True
        self._furthest = _Attempt(0, 0, None)
        self._around: list[_Container] = []
        self._depth = 0
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
            creators={},
        )
        self._settle_encoding()

    def steps(self, told: Set[int] | None = None) -> Iterator[Step]:
        """All steps in turn.

        With `told`, elements of a VR of short length (PS3.5 Table 7.1-2) are proven whole all the
        same, and given only if their tag is one of these. Raises as `step` does.
        """
        while True:
            yield from self.plain_elements(told)
            try:
                step = self.step()
            except NotUnderstood as error:
                raise self._likelier(error) from None
            if step is None:
                return
            yield step

    def _likelier(self, error: NotUnderstood) -> NotUnderstood:
        """The error of the encoding in which the walk comes the furthest: of what is declared to be
        implicit and is explicit, and is cut, the sender is told where it is cut."""
        other = self._furthest
        return other.error if other.error and other.start <= self.position < other.end else error

    def step(self) -> Step | None:
        """The next step, or None behind the last. Raises `NotUnderstood` and `TooMuchToCheck`."""
        inside = self._inside
        if self.position == inside.limit and not inside.is_delimited:
            return self._leave() if self._around else None
        if inside.is_sequence:
            return self._item()
        return self._element()

    def skip_sequence(self) -> None:
        """Go on behind the sequence that the last step has entered."""
        levels = len(self._around)
        while len(self._around) >= levels:
            for _ in self.plain_elements(_NOTHING):
                pass
            self.step()

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
        while (start := self.position) <= last and self.element_count < self._max_elements:
            group, number, vr_bytes, length = unpack_from(view, start)
            vr = VRS_OF_SHORT_LENGTH.get(vr_bytes)
            end = start + 8 + length
            # Behind the last of a data set or item there is more to do.
            if vr is None or end > last or group in (0, GROUP_OF_ITEMS):
                return
            self.position = end
            self.element_count += 1
            tag = group << 16 | number
            if group & 1 and number <= 0xFF:
                self._note_creator(tag, vr, start + 8, end)
            if told is None or tag in told:
                yield Step(StepKind.ELEMENT, tag, vr, byte_order, depth, start, start + 8, end, end)

    def value(self, step: Step) -> bytes:
        return bytes(self._view[step.value_start : step.value_end])

    def encoded(self, step: Step) -> bytes:
        """The whole element, its header included."""
        return bytes(self._view[step.start : step.end])

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
        view, position, last = self._view, self.position, inside.limit - 8
        layout, room = inside.layout, self._max_elements - self.element_count
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
        self.position = position
        self.element_count += len(found)
        return found

    def _item(self) -> Step:
        """Enter the item that begins here, or leave the sequence at its delimitation item."""
        view, start, inside = self._view, self.position, self._inside
        if inside.limit - start < 8:
            raise self._out_of_bytes()
        group, number, length = inside.layout.implicit_header.unpack_from(view, start)
        tag = group << 16 | number
        # The length of a delimitation item is 0 (PS3.5 7.5.2), but some writers put other bytes
        # there, and nobody needs them.
        # Some writers delimit a sequence that has a length as well.
        if tag == SEQUENCE_DELIMITATION and (inside.is_delimited or start + 8 == inside.limit):
            self.position = start + 8
            return self._leave()
        if tag != ITEM:
            raise NotUnderstood(
                f"{tag_name(inside.tag)}, the sequence that begins at byte {inside.start}, has "
                f"{tag_name(tag)} at byte {start}, where only an item or its end can be"
            )
        self.element_count += 1
        if self.element_count > self._max_elements:
            raise self._too_many()
        self._enter(tag, length, start + 8, is_sequence=False)
        self._settle_encoding()
        return Step(StepKind.ITEM)

    def _element(self) -> Step | None:
        view, start, inside = self._view, self.position, self._inside
        if inside.limit - start < 8:
            if not self._around and self._may_be_padded and only_zeros_follow(view, start):
                return None
            raise self._out_of_bytes()
        byte_order = inside.layout.byte_order
        has_unknown_vr = False
        if inside.is_explicit:
            tag, vr, length, value_start = self._explicit_header(start)
            if vr == "UN":
                has_unknown_vr = True
                vr, byte_order = dictionary_vr(tag), "<"  # PS3.5 6.2.2: always little endian
        else:
            group, number, length = inside.layout.implicit_header.unpack_from(view, start)
            tag = group << 16 | number
            vr, value_start = dictionary_vr(tag), start + 8
            has_unknown_vr = vr == "UN"

        if tag >> 16 == GROUP_OF_ITEMS:
            return self._item_delimitation(tag)
        if tag >> 16 == 0:  # a command set's (PS3.7 6.3), or padding
            if (
                tag == 0
                and not self._around
                and self._may_be_padded
                and only_zeros_follow(view, start)
            ):
                return None
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {start} is no element of a data set, and no padding, as "
                "other than zero bytes follow"
            )
        self.element_count += 1
        if self.element_count > self._max_elements:
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
            if vr == "UN" and self._is_private_sequence(tag, length, value_start):
                return self._sequence(tag, length, value_start, has_unknown_vr)
            if vr == "SQ":
                is_declared = inside.is_explicit and not has_unknown_vr
                layout = LITTLE_ENDIAN if has_unknown_vr else inside.layout
                if is_declared or self._begins_with_item(value_start, length, layout):
                    return self._sequence(tag, length, value_start, has_unknown_vr)
                vr = "UN"  # the dictionary has a sequence, and the file something else
            value_end = end = value_start + length
            if is_private_creator(tag):
                self._note_creator(tag, vr, value_start, value_end)
        self.position = end
        return Step(
            StepKind.ELEMENT, tag, vr, byte_order, self._depth, start, value_start, value_end, end
        )

    def _explicit_header(self, start: int) -> tuple[int, str, int, int]:
        """Tag, VR, length and where the value begins, as `read_explicit_header` gives them."""
        inside = self._inside
        try:
            header = read_explicit_header(self._view, start, inside.limit, inside.layout)
        except NotUnderstood:
            if is_like_a_vr(bytes(self._view[start + 4 : start + 6])):
                raise
            header = self._header_without_vr(start)
            if header is None:
                raise
        if header is None:
            raise self._out_of_bytes()
        return header

    def _header_without_vr(self, start: int) -> tuple[int, str, int, int] | None:
        """The header of an element that lacks its VR where it must have one.

        Its length is one of 32 bits, as under implicit VR, or behind a blank VR one of 16 bits.
        Readers differ in which, so it is accepted where only one of these leads to the next element
        or the end: then nothing can be misread. None where it does not, where some readers take the
        length for a VR, and where it is the first of a data set or item, which some readers then
        take to lack VRs altogether.
        """
        view, inside = self._view, self._inside
        is_first = start == (inside.start + 8 if self._around else inside.start)
        if is_first or b"AA" <= bytes(view[start + 4 : start + 6]) <= b"ZZ":
            return None
        group, number, length = inside.layout.implicit_header.unpack_from(view, start)
        tag, value_start = group << 16 | number, start + 8
        vr = dictionary_vr(tag)
        if length == UNDEFINED_LENGTH:
            return (tag, "SQ", length, value_start) if vr in ("SQ", "UN") else None
        lengths = {length}
        if bytes(view[start + 4 : start + 6]) in _BLANK_VRS:
            lengths |= set(inside.layout.short_length.unpack_from(view, start))
        fitting = [n for n in lengths if self._goes_on_at(value_start + n, tag)]
        if len(fitting) != 1:
            return None
        (length,) = fitting
        if vr == "SQ" and not self._begins_with_item(value_start, length, inside.layout):
            vr = "UN"
        return tag, vr, length, value_start

    def _goes_on_at(self, position: int, tag: int) -> bool:
        """Whether an element behind `tag`, or the end, is where another one would end."""
        view, inside = self._view, self._inside
        if position == inside.limit:
            return not inside.is_delimited
        if inside.limit - position < 8:
            return False
        group, number, length = inside.layout.implicit_header.unpack_from(view, position)
        following = group << 16 | number
        if group == GROUP_OF_ITEMS:
            return bool(following == ITEM_DELIMITATION and inside.is_delimited)
        if following <= tag:
            return False
        if is_vr(bytes(view[position + 4 : position + 6])):
            return True
        # Another one without a VR.
        fits = position + 8 + length <= inside.limit
        return dictionary_vr(following) != "UN" and fits

    def _note_creator(self, tag: int, vr: str, value_start: int, value_end: int) -> None:
        if vr == "LO" and is_private_creator(tag):
            value = bytes(self._view[value_start : min(value_end, value_start + 128)])
            creator = value.decode("latin-1").strip(" \0")
            if len(creator) <= _CREATOR_MAX_BYTES:
                self._inside.creators[tag >> 16 << 8 | tag & 0xFF] = creator

    def private_vr(self, tag: int) -> str:
        """The VR that the owner of a private element of this data set or item is known to give it,
        else UN."""
        creator = self._inside.creators.get(tag >> 8)
        return private_vr(tag, creator) if creator else "UN"

    def _is_private_sequence(self, tag: int, length: int, value_start: int) -> bool:
        """Whether the owner's dictionary has a sequence, and items fill the value."""
        if not tag & 0x10000 or self.private_vr(tag) != "SQ" or self._is_trial:
            return False
        if length == 0:
            return True
        if not self._begins_with_item(value_start, length, LITTLE_ENDIAN):
            return False
        sequence = _Container(
            is_sequence=True,
            tag=tag,
            start=self.position,
            limit=value_start + length,
            is_delimited=False,
            is_explicit=False,
            layout=LITTLE_ENDIAN,
            creators={},
        )
        around = [*self._around, self._inside]
        return self._try(sequence, around, value_start).error is None

    def _sequence(self, tag: int, length: int, value_start: int, has_unknown_vr: bool) -> Step:
        if self._depth == self._limits.nested_sequences:
            raise _NestedTooDeep(
                f"{tag_name(tag)} at byte {self.position} is a sequence within "
                f"{self._limits.nested_sequences} others, and no more are accepted"
            )
        step = Step(StepKind.SEQUENCE, tag, "SQ", depth=self._depth, start=self.position)
        self._enter(tag, length, value_start, is_sequence=True)
        self._depth += 1
        if has_unknown_vr:  # PS3.5 6.2.2: implicit VR little endian, whatever is around
            self._inside = self._inside._replace(is_explicit=False, layout=LITTLE_ENDIAN)
        return step

    def _begins_with_item(self, value_start: int, length: int, layout: Layout) -> bool:
        """Whether a value that is not declared to be a sequence is one, or empty."""
        if length < 8:
            return length == 0
        group, number, _ = layout.implicit_header.unpack_from(self._view, value_start)
        return bool(group << 16 | number == ITEM)

    def _item_delimitation(self, tag: int) -> Step:
        inside = self._inside
        # Some writers delimit an item that has a length as well.
        ends_here = inside.is_delimited or (self._around and self.position + 8 == inside.limit)
        if tag != ITEM_DELIMITATION or not ends_here:
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self.position} stands where an element should be"
            )
        self.position += 8
        return self._leave()

    def _enter(self, tag: int, length: int, value_start: int, *, is_sequence: bool) -> None:
        """Go into the sequence or item whose header begins at the position."""
        inside = self._inside
        is_delimited = length == UNDEFINED_LENGTH
        left = inside.limit - value_start
        if length > left and not is_delimited:
            raise cut_value(tag, self.position, length, left, self._surroundings())
        self._around.append(inside)
        self._inside = _Container(
            is_sequence,
            tag,
            self.position,
            inside.limit if is_delimited else value_start + length,
            is_delimited,
            inside.is_explicit,
            inside.layout,
            {},
        )
        self.position = value_start

    def _leave(self) -> Step:
        is_sequence = self._inside.is_sequence
        self._inside = self._around.pop()
        if is_sequence:
            self._depth -= 1
            return Step(StepKind.END_OF_SEQUENCE)
        return Step(StepKind.END_OF_ITEM)

    def _settle_encoding(self) -> None:
        """Find out whether the headers of the data set or item that begins here have a VR."""
        inside = self._inside
        if inside.limit - self.position < 8:
            return
        group, _, vr, _ = inside.layout.explicit_header.unpack_from(self._view, self.position)
        if group == GROUP_OF_ITEMS:
            return
        # Any 16-bit number may read as two letters, and fewer of them as a VR that exists.
        looks_explicit = is_like_a_vr(vr) if inside.is_explicit else is_vr(vr)
        if looks_explicit == inside.is_explicit:
            return
        if not self._is_whole:
            raise NotUnderstood("only the whole data set can tell how it is encoded")
        other = inside._replace(is_explicit=looks_explicit)
        if self._is_trial:
            self._inside = other
            return
        as_other = self._try(other, self._around, self.position)
        if as_other.error is None:
            as_declared = self._try(inside, self._around, self.position, may_be_padded=False)
            if as_declared.error is not None:
                self._inside = other
        elif as_other.end > self._furthest.end:
            self._furthest = as_other

    def _try(
        self,
        container: _Container,
        around: list[_Container],
        position: int,
        *,
        may_be_padded: bool = True,
    ) -> _Attempt:
        """Walk to the end of the container that begins at `position`, without going there.

        In it no other attempts are made, so that time stays linear: what looks otherwise encoded
        is believed to be, and what may be a private sequence is passed over.
        """
        trial = copy.copy(self)
        trial._is_trial, trial._may_be_padded = True, may_be_padded
        trial._around, trial._inside = [*around], container
        trial.position, trial.element_count = position, 0
        trial._max_elements = self._retries_left
        levels = len(trial._around)
        error = None
        try:
            while True:
                for _ in trial.plain_elements(_NOTHING):
                    pass
                if trial.step() is None or len(trial._around) < levels:
                    break
        except _NestedTooDeep:
            raise
        except NotUnderstood as caught:
            error = caught
        self._retries_left -= trial.element_count
        return _Attempt(position, trial.position, error)

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
                    f"{tag_name(tag)} at byte {self.position} has "
                    f"{tag_name(group << 16 | number)} at byte {position}, where only a fragment "
                    "or its end can be"
                )
            position += 8
            if length > limit - position:
                raise NotUnderstood(
                    f"{tag_name(tag)} at byte {self.position} is cut: its fragment at byte "
                    f"{position - 8} needs {length} bytes and {self._surroundings()} has "
                    f"{limit - position} left"
                )
            position += length
            self._fragments += 1
            if self._fragments > MAX_FRAGMENTS:
                raise TooMuchToCheck(
                    f"the instance has more than {MAX_FRAGMENTS} fragments of pixel data, which is "
                    "the limit"
                )
        raise self._no_end(tag, self.position)

    def _too_many(self) -> TooMuchToCheck:
        if self._is_trial:
            return TooMuchToCheck(
                f"more than {MAX_RETRIED_ELEMENTS} elements and items are encoded otherwise than "
                "declared, which is the limit"
            )
        return TooMuchToCheck(
            f"the data set has more than {MAX_CHECKED_ELEMENTS} elements and items, which is the "
            "limit"
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
        return cut_header(self.position, inside.limit, self._surroundings())
