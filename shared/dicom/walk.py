"""The walk over a data set: reads and verifies each data element, Sequence and Item (PS3.5 7)."""

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
    dictionary_vr,
    is_private_creator,
    is_vr,
    looks_like_vr,
    read_explicit_header,
    tag_name,
    truncated_header,
    truncated_value,
)
from shared.dicom.limits import (
    MAX_CHECKED_ELEMENTS,
    MAX_FRAGMENTS,
    MAX_RETRIED_ELEMENTS,
    StructureLimits,
)
from shared.dicom.part10 import EncodedDataset, only_zeros_follow
from shared.dicom.private_elements import MAX_VERIFIED_BYTES, PrivateCreators, contradicts_vr
from shared.dicom.refusal import CheckLimitExceeded, NotUnderstood
from shared.dicom.uids import SERIES_INSTANCE_UID, SOP_INSTANCE_UID

# PS3.5 A.1, and the retired Papyrus 3 Implicit VR Little Endian of PS3.6 Table A-1.
_IMPLICIT = frozenset({ImplicitVRLittleEndian, "1.2.840.10008.1.20"})

_BLANK_VRS = (b"  ", b"\0\0", b" \0", b"??")

# The overhead of one trial, as a number of data elements that take the same time.
_TRIAL_COST = 10

_NOTHING: frozenset[int] = frozenset()
_IDENTITY = frozenset({SOP_INSTANCE_UID})

Cached = TypeVar("Cached")


class StepKind(Enum):
    ELEMENT = auto()
    SEQUENCE = auto()
    ITEM = auto()
    END_OF_ITEM = auto()
    END_OF_SEQUENCE = auto()


class Step(NamedTuple):
    """Describe one step of the walk. Only an ELEMENT has its value and offsets set.

    `vr` is the VR to read the value with. If the file has no VR or UN, it comes from the data
    dictionary (PS3.6), and stays UN if that has none either. It is "US or SS" if it depends on
    Pixel Representation (0028,0103). `byte_order` is `<` or `>`. `depth` is the number of enclosing
    Sequences. The offsets count bytes of the buffer: the header begins at `start`, the value is
    [`value_start`, `value_end`), and the next header begins at `end`.
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
    """Describe the data set, Item or Sequence that the walk is in.

    It ends at `limit` or, if it is delimited, with a delimitation Item before that.
    """

    is_sequence: bool
    tag: int
    start: int
    limit: int
    is_delimited: bool
    is_explicit: bool
    layout: Layout
    creators: PrivateCreators


class _NestedTooDeeply(NotUnderstood):
    """The nesting exceeds the limit, whatever the encoding of the rest."""


class Walk:
    """Walk over one data set, iteratively, in linear time and memory bounded by the limits.

    The walk enters Sequences of VR UN (PS3.5 6.2.2). In some files a data set or an Item is
    explicit but declared implicit, or the reverse. If its first data element looks like that, and
    only that encoding can be read to the end, the walk uses it.

    `is_explicit` is the detected encoding if it is not the declared one, else None.
    `has_missing_vr` is set if a top-level data element had no VR: its interpretation depends on the
    data elements before and after it.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        limits: StructureLimits,
        *,
        is_complete: bool = True,
        is_explicit: bool | None = None,
    ) -> None:
        """Start at the beginning of the data set, and raise what `step` raises.

        Args:
            is_complete: If False, more bytes will follow, and a data set whose encoding depends on
                them is refused.
            is_explicit: The encoding that an earlier walk detected.
        """
        self._limits = limits
        self._view = dataset.view
        self._is_complete = is_complete
        self._source = "the inflated data set" if dataset.is_inflated else "the file"
        self.position = dataset.start
        self.element_count = 0
        self.has_missing_vr = False
        self._max_elements = MAX_CHECKED_ELEMENTS
        self._retries_left = MAX_RETRIED_ELEMENTS
        self._furthest: _Trial | None = None
        self._enclosing: list[_Container] = []
        self._depth = 0
        self._fragments = 0
        self._is_declared_explicit = dataset.transfer_syntax_uid not in _IMPLICIT
        self._current = _Container(
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
            self._detect_encoding()
        self.is_explicit = (
            None
            if self._current.is_explicit == self._is_declared_explicit
            else self._current.is_explicit
        )

    def steps(self, tags: Set[int] | None = None) -> Iterator[Step]:
        """Yield all steps, and raise what `step` raises.

        With `tags`, data elements with a 16-bit length (PS3.5 Table 7.1-2) are verified, but
        yielded only if their tag is in `tags`.
        """
        while True:
            yield from self.plain_elements(tags)
            try:
                step = self.step()
            except NotUnderstood as error:
                raise self._best_error(error) from None
            if step is None:
                return
            yield step

    def _best_error(self, error: NotUnderstood) -> NotUnderstood:
        """Return the error of the encoding that could be read furthest.

        A truncated explicit data set that is declared implicit gives the place of the truncation.
        """
        trial = self._furthest
        if trial is not None and trial.error and trial.start <= self.position < trial.position:
            return trial.error
        return error

    def step(self) -> Step | None:
        """Return the next step, or None after the last one.

        Raises:
            NotUnderstood: the data set is truncated, malformed, or nested too deeply.
            CheckLimitExceeded: it has too many data elements, Items or fragments.
        """
        current = self._current
        if self.position == current.limit and not current.is_delimited:
            return self._leave() if self._enclosing else None
        if current.is_sequence:
            return self._item()
        return self._element()

    def skip_sequence(self) -> None:
        """Skip to the end of the Sequence that the last step entered."""
        levels = len(self._enclosing)
        while len(self._enclosing) >= levels:
            for _ in self.plain_elements(_NOTHING):
                pass
            self.step()

    def plain_elements(self, tags: Set[int] | None) -> Iterator[Step]:
        """Yield the next data elements, up to the first one without a 16-bit length.

        This is equivalent to `step` in a third of the time, for most data elements of any data set.
        It leaves all others to `step`.
        """
        current = self._current
        if current.is_sequence or not current.is_explicit:
            return
        view, byte_order, depth = self._view, current.layout.byte_order, self._depth
        unpack_from = current.layout.explicit_header.unpack_from
        last = current.limit - 8
        while (start := self.position) <= last and self.element_count < self._max_elements:
            group, number, vr_bytes, length = unpack_from(view, start)
            vr = VRS_OF_SHORT_LENGTH.get(vr_bytes)
            end = start + 8 + length
            # `step` handles the last data element of a data set or Item.
            if vr is None or end > last or group in (0, GROUP_OF_ITEMS):
                return
            self.position = end
            self.element_count += 1
            tag = group << 16 | number
            if vr == "LO" and group & 1 and number <= 0xFF:
                self._add_creator(tag, start + 8, end)
            if tags is None or tag in tags:
                yield Step(StepKind.ELEMENT, tag, vr, byte_order, depth, start, start + 8, end, end)

    def value(self, step: Step) -> bytes:
        return bytes(self._view[step.value_start : step.value_end])

    def encoded(self, step: Step) -> bytes:
        """Return the bytes of the data element, header included."""
        return bytes(self._view[step.start : step.end])

    @property
    def encoding(self) -> tuple[bool, str]:
        """Return whether the next headers have a VR, and their byte order, `<` or `>`."""
        return self._current.is_explicit, self._current.layout.byte_order

    def is_cacheable(self, step: Step) -> bool:
        """Return whether the meaning of a data element depends on its bytes and `encoding` only."""
        if self._current.is_explicit:
            return bytes(self._view[step.start + 4 : step.start + 6]) in VRS_OF_SHORT_LENGTH and (
                not is_private_creator(step.tag)  # the walk must record these
            )
        return not step.tag & 0x10000 and step.vr != "US or SS"

    def cached_elements(self, cache: Mapping[bytes, Cached], max_bytes: int) -> list[Cached]:
        """Skip the next data elements that are in `cache`, and return their entries.

        The keys of `cache` are complete data elements in this `encoding`, with a header of 8 bytes,
        of at most `max_bytes`. This takes a tenth of the time of `step`.
        """
        found: list[Cached] = []
        current = self._current
        if current.is_sequence:
            return found
        view, position, last = self._view, self.position, current.limit - 8
        layout, room = current.layout, self._max_elements - self.element_count
        length = layout.short_length if current.is_explicit else layout.implicit_length
        while position <= last and len(found) < room:
            end = position + 8 + length.unpack_from(view, position)[0]
            # `step` handles the last data element of a data set or Item.
            if end > last or end - position > max_bytes:
                break
            element = cache.get(bytes(view[position:end]))
            if element is None:
                break
            found.append(element)
            position = end
        self.position = position
        self.element_count += len(found)
        return found

    def _item(self) -> Step:
        """Enter the Item that begins here, or leave the Sequence at its delimitation Item."""
        view, start, current = self._view, self.position, self._current
        if current.limit - start < 8:
            raise self._truncated()
        group, number, length = current.layout.implicit_header.unpack_from(view, start)
        tag = group << 16 | number
        # The length of a delimitation Item is 0 (PS3.5 7.5.2). Some writers put other bytes there;
        # they are ignored. Some writers also delimit a Sequence of defined length.
        if tag == SEQUENCE_DELIMITATION and (current.is_delimited or start + 8 == current.limit):
            self.position = start + 8
            return self._leave()
        if tag != ITEM:
            raise NotUnderstood(
                f"{tag_name(current.tag)}, the Sequence at byte {current.start}, has "
                f"{tag_name(tag)} at byte {start}; expected an Item or the end of the Sequence"
            )
        self.element_count += 1
        if self.element_count > self._max_elements:
            raise self._too_many()
        self._enter(tag, length, start + 8, is_sequence=False)
        self._detect_encoding()
        return Step(StepKind.ITEM)

    def _element(self) -> Step | None:
        view, start, current = self._view, self.position, self._current
        if current.limit - start < 8:
            if self._is_padding(start):
                return None
            raise self._truncated()
        byte_order = current.layout.byte_order
        if current.is_explicit:
            tag, vr, length, value_start = self._explicit_header(start)
            has_unknown_vr = vr == "UN"
            if has_unknown_vr:
                vr, byte_order = dictionary_vr(tag), "<"  # PS3.5 6.2.2
        else:
            group, number, length = current.layout.implicit_header.unpack_from(view, start)
            tag = group << 16 | number
            vr, value_start = dictionary_vr(tag), start + 8
            has_unknown_vr = vr == "UN"

        if tag >> 16 == GROUP_OF_ITEMS:
            return self._item_delimitation(tag)
        if tag >> 16 == 0:  # a command set (PS3.7 6.3), or padding
            if tag == 0 and self._is_padding(start):
                return None
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {start} does not belong in a data set, and is not "
                "padding: bytes other than zero follow"
            )
        self.element_count += 1
        if self.element_count > self._max_elements:
            raise self._too_many()

        if length == UNDEFINED_LENGTH:
            # PS3.5 6.2.2: UN of undefined length is a Sequence, whatever the dictionary says.
            if vr in ("OB", "OW") and not has_unknown_vr:
                value_end = self._end_of_fragments(tag, value_start)
                end = value_end + 8
            elif vr == "SQ" or has_unknown_vr:
                return self._sequence(tag, length, value_start, has_unknown_vr)
            else:
                raise NotUnderstood(
                    f"{tag_name(tag)} at byte {start} has undefined length, which its VR does not "
                    "allow (PS3.5 7.1.1)"
                )
        else:
            left = current.limit - value_start
            if length > left:
                raise truncated_value(tag, start, length, left, self._enclosing_name())
            if vr == "SQ":
                is_declared = current.is_explicit and not has_unknown_vr
                layout = self._layout_of_unknown_vr if has_unknown_vr else current.layout
                if is_declared or self._begins_with_item(value_start, length, layout):
                    return self._sequence(tag, length, value_start, has_unknown_vr)
                vr = "UN"  # a Sequence in the dictionary, but not in the file
            elif vr == "UN" and tag & 0x10000:
                vr = self._private_vr(tag, length, value_start)
                if vr == "SQ":
                    return self._sequence(tag, length, value_start, has_unknown_vr)
            value_end = end = value_start + length
            if vr == "LO" and is_private_creator(tag):
                self._add_creator(tag, value_start, value_end)
        self.position = end
        return Step(
            StepKind.ELEMENT, tag, vr, byte_order, self._depth, start, value_start, value_end, end
        )

    def _is_padding(self, start: int) -> bool:
        return not self._enclosing and only_zeros_follow(self._view, start)

    def _explicit_header(self, start: int) -> tuple[int, str, int, int]:
        """Return tag, VR, length and start of the value, like `read_explicit_header`."""
        current = self._current
        try:
            header = read_explicit_header(self._view, start, current.limit, current.layout)
        except NotUnderstood:
            header = self._header_without_vr(start)
            if header is None:
                raise
            self.has_missing_vr = self.has_missing_vr or not self._enclosing
        if header is None:
            raise self._truncated()
        return header

    def _header_without_vr(self, start: int) -> tuple[int, str, int, int] | None:
        """Return the header of an explicit data element without a VR; None if it is ambiguous.

        Its length has 32 bits, as in implicit VR, or 16 bits after a blank VR. The header is
        accepted if exactly one of these leads to the next data element or the end. Readers disagree
        if the length looks like a VR, and if it is the first of a data set or Item, which some read
        as implicit altogether. Some read a blank VR as part of a 32-bit length, and nothing after
        it, so the data elements that identify the instance must come before.
        """
        view, current = self._view, self._current
        vr_bytes = bytes(view[start + 4 : start + 6])
        is_first = start == (current.start + 8 if self._enclosing else current.start)
        if is_first or b"AA" <= vr_bytes <= b"ZZ":
            return None
        group, number, length = current.layout.implicit_header.unpack_from(view, start)
        tag, value_start = group << 16 | number, start + 8
        vr = dictionary_vr(tag)
        if length == UNDEFINED_LENGTH:
            return (tag, "SQ", length, value_start) if vr in ("SQ", "UN") else None
        top_level_tag = tag if not self._enclosing else [*self._enclosing, current][1].tag
        lengths = {length}
        if vr_bytes in _BLANK_VRS and top_level_tag > SERIES_INSTANCE_UID:
            lengths |= set(current.layout.short_length.unpack_from(view, start))
        fitting = [n for n in lengths if self._element_may_end_at(value_start + n, tag)]
        if len(fitting) != 1:
            return None
        (length,) = fitting
        if vr == "SQ" and not self._begins_with_item(value_start, length, current.layout):
            vr = "UN"
        return tag, vr, length, value_start

    def _element_may_end_at(self, position: int, tag: int) -> bool:
        """Return whether, at this position, a data element after `tag` or the end follows."""
        view, current = self._view, self._current
        if position == current.limit:
            return not current.is_delimited
        if current.limit - position < 8:
            return position < current.limit and self._is_padding(position)
        group, number, length = current.layout.implicit_header.unpack_from(view, position)
        following = group << 16 | number
        if following == ITEM_DELIMITATION:
            return self._may_end_item(position)
        if following <= tag:
            return following == 0 and self._is_padding(position)
        if group == GROUP_OF_ITEMS:
            return False
        if is_vr(bytes(view[position + 4 : position + 6])):
            return True
        # The next data element may lack its VR too.
        fits = position + 8 + length <= current.limit
        return dictionary_vr(following) != "UN" and fits

    def _add_creator(self, tag: int, value_start: int, value_end: int) -> None:
        self._current.creators.add(tag, self._view[value_start:value_end])

    def _private_vr(self, tag: int, length: int, value_start: int) -> str:
        """Return the VR from the creator's dictionary if the value may have it, else UN."""
        vr = self._current.creators.vr(tag)
        if vr == "SQ":
            return vr if self._consists_of_items(tag, length, value_start) else "UN"
        if length > MAX_VERIFIED_BYTES:
            return "UN"
        value = bytes(self._view[value_start : value_start + length])
        return "UN" if contradicts_vr(vr, value) else vr

    def _consists_of_items(self, tag: int, length: int, value_start: int) -> bool:
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
        return self._try(sequence, value_start, [*self._enclosing, self._current]).error is None

    def _sequence(self, tag: int, length: int, value_start: int, has_unknown_vr: bool) -> Step:
        if self._depth == self._limits.max_nested_sequences:
            raise _NestedTooDeeply(
                f"{tag_name(tag)} at byte {self.position} is a Sequence within "
                f"{self._limits.max_nested_sequences} others, which is the limit"
            )
        step = Step(StepKind.SEQUENCE, tag, "SQ", depth=self._depth, start=self.position)
        layout = self._layout_of_unknown_vr
        self._enter(tag, length, value_start, is_sequence=True)
        self._depth += 1
        if has_unknown_vr:
            self._current = self._current._replace(is_explicit=False, layout=layout)
        return step

    @property
    def _layout_of_unknown_vr(self) -> Layout:
        """PS3.5 6.2.2: a Sequence of VR UN in explicit VR is in implicit VR little endian."""
        return LITTLE_ENDIAN if self._current.is_explicit else self._current.layout

    def _begins_with_item(self, value_start: int, length: int, layout: Layout) -> bool:
        """Return whether a value that is not declared to be a Sequence is one, or is empty."""
        if length < 8:
            return length == 0
        group, number, _ = layout.implicit_header.unpack_from(self._view, value_start)
        return bool(group << 16 | number == ITEM)

    def _item_delimitation(self, tag: int) -> Step:
        if tag != ITEM_DELIMITATION or not self._may_end_item(self.position):
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self.position} is out of place: expected a data element"
            )
        if self._current.is_explicit and (
            bytes(self._view[self.position + 4 : self.position + 6]) in VRS_OF_LONG_LENGTH
        ):
            raise NotUnderstood(
                f"{tag_name(tag)} at byte {self.position} has a VR: readers disagree on its length"
            )
        self.position += 8
        return self._leave()

    def _may_end_item(self, position: int) -> bool:
        """Some writers also delimit an Item of defined length."""
        current = self._current
        return current.is_delimited or (bool(self._enclosing) and position + 8 == current.limit)

    def _enter(self, tag: int, length: int, value_start: int, *, is_sequence: bool) -> None:
        """Enter the Sequence or Item whose header begins at the current position."""
        current = self._current
        is_delimited = length == UNDEFINED_LENGTH
        left = current.limit - value_start
        if length > left and not is_delimited:
            raise truncated_value(tag, self.position, length, left, self._enclosing_name())
        self._enclosing.append(current)
        self._current = _Container(
            is_sequence,
            tag,
            self.position,
            current.limit if is_delimited else value_start + length,
            is_delimited,
            current.is_explicit,
            current.layout,
            PrivateCreators(),
        )
        self.position = value_start

    def _leave(self) -> Step:
        is_sequence = self._current.is_sequence
        self._current = self._enclosing.pop()
        if is_sequence:
            self._depth -= 1
            return Step(StepKind.END_OF_SEQUENCE)
        return Step(StepKind.END_OF_ITEM)

    def _detect_encoding(self) -> None:
        """Detect whether the headers of the data set or Item that begins here have a VR."""
        current = self._current
        if current.limit - self.position < 8:
            return
        group, _, vr, _ = current.layout.explicit_header.unpack_from(self._view, self.position)
        if group == GROUP_OF_ITEMS:
            return
        # Any 16-bit length may look like two letters, but few look like a VR of the standard.
        looks_explicit = looks_like_vr(vr) if current.is_explicit else is_vr(vr)
        if looks_explicit == current.is_explicit:
            return
        if not self._is_complete:
            raise NotUnderstood("the encoding can be detected only in the complete data set")
        self._resolve_encoding(current._replace(is_explicit=looks_explicit))

    def _resolve_encoding(self, other: _Container) -> None:
        """Use the encoding of `other` if it is the only one that can be read."""
        as_other = self._try(other, self.position, self._enclosing)
        if as_other.error is None:
            as_declared = self._try(self._current, self.position, self._enclosing, guesses=False)
            if not (as_declared.reached_end or as_declared.has_sop_instance_uid):
                self._current = other
        elif isinstance(as_other.error, _NestedTooDeeply):
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
        guesses: bool = True,
    ) -> "_Trial":
        """Walk from `position` to the end of `container`, and leave this walk where it is."""
        trial = _Trial(self, container, position, around, guesses=guesses)
        trial.run()
        self._retries_left -= _TRIAL_COST + trial.element_count + trial._fragments - self._fragments
        return trial

    def _end_of_fragments(self, tag: int, value_start: int) -> int:
        """Return the offset of the delimitation Item of encapsulated pixel data (PS3.5 A.4)."""
        current, view = self._current, self._view
        limit = current.limit
        unpack_from = current.layout.implicit_header.unpack_from
        position = value_start
        while limit - position >= 8:
            group, number, length = unpack_from(view, position)
            if group != GROUP_OF_ITEMS or number != ITEM & 0xFFFF:
                if group << 16 | number == SEQUENCE_DELIMITATION:
                    return position
                raise NotUnderstood(
                    f"{tag_name(tag)} at byte {self.position} has "
                    f"{tag_name(group << 16 | number)} at byte {position}; expected a fragment or "
                    "the end of the fragments"
                )
            position += 8
            if length > limit - position:
                raise NotUnderstood(
                    f"{tag_name(tag)} at byte {self.position} is truncated: its fragment at byte "
                    f"{position - 8} needs {length} bytes and {self._enclosing_name()} has "
                    f"{limit - position} left"
                )
            position += length
            self._fragments += 1
            if self._fragments > MAX_FRAGMENTS:
                raise CheckLimitExceeded(
                    f"the instance has more than {MAX_FRAGMENTS} fragments of pixel data, which is "
                    "the limit"
                )
        raise self._missing_delimiter(tag, self.position)

    def _too_many(self) -> CheckLimitExceeded:
        return CheckLimitExceeded(
            f"the data set has more than {MAX_CHECKED_ELEMENTS} data elements and Items, which is "
            "the limit"
        )

    def _enclosing_name(self) -> str:
        if self._current.limit < len(self._view):
            return "the enclosing Item or Sequence"
        return self._source

    def _missing_delimiter(self, tag: int, start: int) -> NotUnderstood:
        return NotUnderstood(
            f"{tag_name(tag)} at byte {start} is truncated: {self._enclosing_name()} ends at byte "
            f"{self._current.limit} without its delimitation Item"
        )

    def _truncated(self) -> NotUnderstood:
        current = self._current
        if current.is_delimited:
            return self._missing_delimiter(current.tag, current.start)
        return truncated_header(self.position, current.limit, self._enclosing_name())


class _Trial(Walk):
    """Walk to the end of one container, to test whether it can be read in one encoding.

    A trial starts no further trials, so that time stays linear. If it `guesses`, it reads each
    nested Item in the encoding that it looks like, else as declared. It does not enter possible
    private Sequences.
    """

    def __init__(
        self,
        walk: Walk,
        container: _Container,
        position: int,
        around: list[_Container],
        *,
        guesses: bool,
    ) -> None:
        vars(self).update(vars(walk))
        self._enclosing, self._current = [*around], container
        self.start = self.position = position
        self.element_count = 0
        self._max_elements = walk._retries_left
        self._guesses = guesses
        self._limit, self._levels = container.limit, len(around)
        self.error: NotUnderstood | None = None
        self.has_sop_instance_uid = False

    @property
    def reached_end(self) -> bool:
        """Return whether the trial read to the end, and not only to possible padding."""
        return self.error is None and (self._levels > 0 or self.position == self._limit)

    def run(self) -> None:
        try:
            while True:
                for _ in self.plain_elements(_IDENTITY):
                    self._note_identity()
                step = self.step()
                if step is None or len(self._enclosing) < self._levels:
                    return
                if step.tag == SOP_INSTANCE_UID:
                    self._note_identity()
        except NotUnderstood as error:
            self.error = error

    def _note_identity(self) -> None:
        self.has_sop_instance_uid = self.has_sop_instance_uid or not self._enclosing

    def _resolve_encoding(self, other: _Container) -> None:
        if self._guesses:
            self._current = other

    def _consists_of_items(self, tag: int, length: int, value_start: int) -> bool:  # noqa: ARG002
        return length == 0

    def _too_many(self) -> CheckLimitExceeded:
        return CheckLimitExceeded(
            f"more than {MAX_RETRIED_ELEMENTS} data elements and Items are not encoded as "
            "declared, which is the limit"
        )
