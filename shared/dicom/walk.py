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
    is_private_creator,
    is_vr,
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
from shared.dicom.private_elements import MAX_PROVEN_BYTES, PrivateCreators, is_disproved
from shared.dicom.refusal import NotUnderstood, TooMuchToCheck
from shared.dicom.uids import SERIES_INSTANCE_UID, SOP_INSTANCE_UID

# PS3.5 A.1, and Papyrus 3 Implicit VR Little Endian, retired, of PS3.6 Table A-1.
_IMPLICIT = frozenset({ImplicitVRLittleEndian, "1.2.840.10008.1.20"})

_BLANK_VRS = (b"  ", b"\0\0", b" \0", b"??")

# What a trial costs beside its elements, in the time of one of these.
_TRIAL_COST = 10

_NOTHING: frozenset[int] = frozenset()
_IDENTITY = frozenset({SOP_INSTANCE_UID})

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
    creators: PrivateCreators


class _NestedTooDeep(NotUnderstood):
    """However the rest may be encoded."""


class Walk:
    """The walk over one data set. Iterative; its time is linear, and its memory bounded by `limits`
    and those of `limits.py`.

    Sequences of VR UN are descended into as PS3.5 6.2.2 says. A data set or an item whose first
    element looks as if it were encoded otherwise than declared, with or without VRs, is believed to
    be if it can be walked to its end that way, and not as declared: such files exist.

    `is_explicit` says whether the data set has VRs, where that is not as declared; else it is None.
    `has_missing_vr` says whether a top-level element without a VR was met: what it is depends on
    those around it.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        limits: StructureLimits,
        *,
        is_whole: bool = True,
        is_explicit: bool | None = None,
    ) -> None:
        """Unless it `is_whole`, the data set goes on behind its end, and what depends on that is
        refused. `is_explicit` is how an earlier walk has found it to be. Raises as `step` does."""
        self._limits = limits
        self._view = dataset.view
        self._is_whole = is_whole
        self._whole = "the inflated data set" if dataset.is_inflated else "the file"
        self.position = dataset.start
        self.element_count = 0
        self.has_missing_vr = False
        self._max_elements = MAX_CHECKED_ELEMENTS
        self._retries_left = MAX_RETRIED_ELEMENTS
        self._furthest: _Trial | None = None
        self._around: list[_Container] = []
        self._depth = 0
        self._fragments = 0
        self._is_declared_explicit = dataset.transfer_syntax_uid not in _IMPLICIT
        self._inside = _Container(
            is_sequence=False,
            tag=0,
            start=dataset.start,
            limit=len(dataset.view),
            is_delimited=False,
            is_explicit=self._is_declared_explicit if is_explicit is None else is_explicit,
            layout=(
                BIG_ENDIAN if dataset.transfer_syntax_uid == ExplicitVRBigEndian else LITTLE_ENDIAN
            ),
            creators=PrivateCreators(),
        )
        if is_explicit is None:
            self._settle_encoding()
        self.is_explicit = (
            None
            if self._inside.is_explicit == self._is_declared_explicit
            else self._inside.is_explicit
        )

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
        trial = self._furthest
        if trial is not None and trial.error and trial.start <= self.position < trial.position:
            return trial.error
        return error

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
            if vr == "LO" and group & 1 and number <= 0xFF:
                self._note_creator(tag, start + 8, end)
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

    def is_the_same_elsewhere(self, step: Step) -> bool:
        """Whether the element's bytes alone tell what it is, in this `encoding`, so that
        `known_elements` may give it."""
        if self._inside.is_explicit:
            return bytes(self._view[step.start + 4 : step.start + 6]) in VRS_OF_SHORT_LENGTH and (
                not is_private_creator(step.tag)  # these have to be noted
            )
        return not step.tag & 0x10000 and step.vr != "US or SS"

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
            if self._is_padding(start):
                return None
            raise self._out_of_bytes()
        byte_order = inside.layout.byte_order
        if inside.is_explicit:
            tag, vr, length, value_start = self._explicit_header(start)
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
            if tag == 0 and self._is_padding(start):
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
            if vr == "SQ":
                is_declared = inside.is_explicit and not has_unknown_vr
                layout = self._layout_of_unknown_vr if has_unknown_vr else inside.layout
                if is_declared or self._begins_with_item(value_start, length, layout):
                    return self._sequence(tag, length, value_start, has_unknown_vr)
                vr = "UN"  # the dictionary has a sequence, and the file something else
            elif vr == "UN" and tag & 0x10000:
                vr = self._private_vr(tag, length, value_start)
                if vr == "SQ":
                    return self._sequence(tag, length, value_start, has_unknown_vr)
            value_end = end = value_start + length
            if vr == "LO" and is_private_creator(tag):
                self._note_creator(tag, value_start, value_end)
        self.position = end
        return Step(
            StepKind.ELEMENT, tag, vr, byte_order, self._depth, start, value_start, value_end, end
        )

    def _is_padding(self, start: int) -> bool:
        return not self._around and only_zeros_follow(self._view, start)

    def _explicit_header(self, start: int) -> tuple[int, str, int, int]:
        """Tag, VR, length and where the value begins, as `read_explicit_header` gives them."""
        inside = self._inside
        try:
            header = read_explicit_header(self._view, start, inside.limit, inside.layout)
        except NotUnderstood:
            header = self._header_without_vr(start)
            if header is None:
                raise
            self.has_missing_vr = self.has_missing_vr or not self._around
        if header is None:
            raise self._out_of_bytes()
        return header

    def _header_without_vr(self, start: int) -> tuple[int, str, int, int] | None:
        """The header of an element that lacks its VR where it must have one; None where readers
        differ in what it is.

        Its length is one of 32 bits, as under implicit VR, or behind a blank VR one of 16 bits. It
        is accepted where only one of these leads to the next element or the end. Readers differ
        where the length looks like a VR, and where it is the first of a data set or item, which
        some take to lack VRs altogether. Some read a blank VR as a length of 32 bits, and find
        nothing behind it; so the elements that identify the instance must have come before.
        """
        view, inside = self._view, self._inside
        vr_bytes = bytes(view[start + 4 : start + 6])
        is_first = start == (inside.start + 8 if self._around else inside.start)
        if is_first or b"AA" <= vr_bytes <= b"ZZ":
            return None
        group, number, length = inside.layout.implicit_header.unpack_from(view, start)
        tag, value_start = group << 16 | number, start + 8
        vr = dictionary_vr(tag)
        if length == UNDEFINED_LENGTH:
            return (tag, "SQ", length, value_start) if vr in ("SQ", "UN") else None
        top_level_tag = tag if not self._around else [*self._around, inside][1].tag
        lengths = {length}
        if vr_bytes in _BLANK_VRS and top_level_tag > SERIES_INSTANCE_UID:
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
            return position < inside.limit and self._is_padding(position)
        group, number, length = inside.layout.implicit_header.unpack_from(view, position)
        following = group << 16 | number
        if following == ITEM_DELIMITATION:
            return self._may_end_item(position)
        if following <= tag:
            return following == 0 and self._is_padding(position)
        if group == GROUP_OF_ITEMS:
            return False
        if is_vr(bytes(view[position + 4 : position + 6])):
            return True
        # Another one without a VR.
        fits = position + 8 + length <= inside.limit
        return dictionary_vr(following) != "UN" and fits

    def _note_creator(self, tag: int, value_start: int, value_end: int) -> None:
        self._inside.creators.note(tag, self._view[value_start:value_end])

    def _private_vr(self, tag: int, length: int, value_start: int) -> str:
        """The VR that the owner of a private element is known to give it, where its value agrees
        with that; else UN."""
        vr = self._inside.creators.vr(tag)
        if vr == "SQ":
            return vr if self._is_filled_with_items(tag, length, value_start) else "UN"
        if length > MAX_PROVEN_BYTES:
            return "UN"
        value = bytes(self._view[value_start : value_start + length])
        return "UN" if is_disproved(vr, value) else vr

    def _is_filled_with_items(self, tag: int, length: int, value_start: int) -> bool:
        if length == 0:
            return True
        layout = self._layout_of_unknown_vr
        if not self._begins_with_item(value_start, length, layout):
            return False
        sequence = _Container(
            is_sequence=True,
            tag=tag,
            start=self.position,
            limit=value_start + length,
            is_delimited=False,
            is_explicit=False,
            layout=layout,
            creators=PrivateCreators(),
        )
        return self._try(sequence, value_start, [*self._around, self._inside]).error is None

    def _sequence(self, tag: int, length: int, value_start: int, has_unknown_vr: bool) -> Step:
        if self._depth == self._limits.nested_sequences:
            raise _NestedTooDeep(
                f"{tag_name(tag)} at byte {self.position} is a sequence within "
                f"{self._limits.nested_sequences} others, and no more are accepted"
            )
        step = Step(StepKind.SEQUENCE, tag, "SQ", depth=self._depth, start=self.position)
        layout = self._layout_of_unknown_vr
        self._enter(tag, length, value_start, is_sequence=True)
        self._depth += 1
        if has_unknown_vr:
            self._inside = self._inside._replace(is_explicit=False, layout=layout)
        return step

    @property
    def _layout_of_unknown_vr(self) -> Layout:
        """PS3.5 6.2.2: a sequence of VR UN is in implicit VR little endian, whatever is around."""
        return LITTLE_ENDIAN if self._inside.is_explicit else self._inside.layout

    def _begins_with_item(self, value_start: int, length: int, layout: Layout) -> bool:
        """Whether a value that is not declared to be a sequence is one, or empty."""
        if length < 8:
            return length == 0
        group, number, _ = layout.implicit_header.unpack_from(self._view, value_start)
        return bool(group << 16 | number == ITEM)

    def _item_delimitation(self, tag: int) -> Step:
        if tag != ITEM_DELIMITATION or not self._may_end_item(self.position):
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self.position} stands where an element should be"
            )
        if self._inside.is_explicit and (
            bytes(self._view[self.position + 4 : self.position + 6]) in VRS_OF_LONG_LENGTH
        ):
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self.position} has a VR, and readers differ in how long "
                "it is then"
            )
        self.position += 8
        return self._leave()

    def _may_end_item(self, position: int) -> bool:
        """Some writers delimit an item that has a length as well."""
        inside = self._inside
        return inside.is_delimited or (bool(self._around) and position + 8 == inside.limit)

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
            PrivateCreators(),
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
        self._settle_doubt(inside._replace(is_explicit=looks_explicit))

    def _settle_doubt(self, other: _Container) -> None:
        """Take the data set or item to be encoded as `other` if that is the only way to read it."""
        as_other = self._try(other, self.position, self._around)
        if as_other.error is None:
            as_declared = self._try(self._inside, self.position, self._around, believes_looks=False)
            if not (as_declared.is_complete or as_declared.has_sop_instance_uid):
                self._inside = other
        elif isinstance(as_other.error, _NestedTooDeep):
            raise as_other.error
        elif other.is_explicit and (
            self._furthest is None or as_other.position > self._furthest.position
        ):
            self._furthest = as_other

    def _try(
        self,
        container: _Container,
        position: int,
        around: list[_Container],
        *,
        believes_looks: bool = True,
    ) -> "_Trial":
        """Walk to the end of the container that begins at `position`, without going there."""
        trial = _Trial(self, container, position, around, believes_looks=believes_looks)
        trial.run()
        self._retries_left -= _TRIAL_COST + trial.element_count + trial._fragments - self._fragments
        return trial

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


class _Trial(Walk):
    """A walk to the end of one container, to find out whether it is what it is taken for.

    A trial starts no others, so that time stays linear. What looks otherwise encoded in it is
    believed to be, or not at all; and what may be a private sequence is passed over.
    """

    def __init__(
        self,
        walk: Walk,
        container: _Container,
        position: int,
        around: list[_Container],
        *,
        believes_looks: bool,
    ) -> None:
        vars(self).update(vars(walk))
        self._around, self._inside = [*around], container
        self.start = self.position = position
        self.element_count = 0
        self._max_elements = walk._retries_left
        self._believes_looks = believes_looks
        self._limit, self._levels = container.limit, len(around)
        self.error: NotUnderstood | None = None
        self.has_sop_instance_uid = False

    @property
    def is_complete(self) -> bool:
        """Whether it came to the end, and not to what may be padding or the value of an element."""
        return self.error is None and (self._levels > 0 or self.position == self._limit)

    def run(self) -> None:
        try:
            while True:
                for _ in self.plain_elements(_IDENTITY):
                    self._note_identity()
                step = self.step()
                if step is None or len(self._around) < self._levels:
                    return
                if step.tag == SOP_INSTANCE_UID:
                    self._note_identity()
        except NotUnderstood as error:
            self.error = error

    def _note_identity(self) -> None:
        self.has_sop_instance_uid = self.has_sop_instance_uid or not self._around

    def _settle_doubt(self, other: _Container) -> None:
        if self._believes_looks:
            self._inside = other

    def _is_filled_with_items(self, tag: int, length: int, value_start: int) -> bool:  # noqa: ARG002
        return length == 0

    def _too_many(self) -> TooMuchToCheck:
        return TooMuchToCheck(
            f"more than {MAX_RETRIED_ELEMENTS} elements and items are encoded otherwise than "
            "declared, which is the limit"
        )
