"""The metadata sidecar: a data set in the DICOM JSON Model (PS3.18 F), for the Workflow Manager.

Made by the walk of the structure check and not by pydicom's reader, so that whatever was accepted
can be described: pydicom's recurses, raises for some odd values, and warns of others in words that
hold them. Its data dictionaries and character set tables are used.
"""

import base64
import math
import re
import struct
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import orjson

from shared.dicom.character_sets import DEFAULT_CODECS, codecs_of, texts
from shared.dicom.header import NUMBERS
from shared.dicom.left_out import BULK_VRS, NOTHING_LEFT_OUT, LeftOut, Range
from shared.dicom.limits import HIGHEST, MAX_DESCRIBED_SEQUENCES, MAX_VALUE_BYTES, MAX_VALUES
from shared.dicom.part10 import EncodedDataset, open_dataset
from shared.dicom.uids import SPECIFIC_CHARACTER_SET
from shared.dicom.walk import Step, StepKind, Walk

JsonObject: TypeAlias = dict[str, Any]

_PIXEL_REPRESENTATION = 0x00280103

# PS3.5 Table 6.2-1: words that depend on the byte order, with their type codes of `array`.
_WORDS: Mapping[str, str] = {"OW": "H", "OF": "I", "OL": "I", "OD": "Q", "OV": "Q"}

# PS3.5 Table 6.2-1, DS and IS
_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([Ee][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_SEEN_ELEMENT_BYTES = 72
_MOST_SEEN_ELEMENTS = 4096
_JSON_INTEGERS = range(-(2**63), 2**64)  # as far as orjson goes
# IEEE 754 binary32: any decimal of 6 digits survives it, and 9 digits tell all apart.
_FLOAT32_DIGITS, _FLOAT32_MAX_DIGITS = 6, 9
_FLOAT32_MIN_NORMAL, _FLOAT32_MIN = 2.0**-126, 2.0**-149
_FLOAT32 = struct.Struct("<f")
_EXACT_INTEGERS = 2.0**53  # up to which each is a floating-point number of its own


def metadata_json(part10: bytes, left_out: LeftOut = NOTHING_LEFT_OUT) -> bytes:
    """One Part 10 file's data set as one JSON object, not indented, elements ascending by tag.

    `part10` is a file that `check_structure` accepted, without the ranges that are left out of it;
    a deflated one is whole. Left out are also group 0002, group lengths, and top-level elements of
    a VR in `BULK_VRS`. An odd value never raises: a number that does not parse stays the string it
    is. An element is given by its VR alone where its bytes do not fit the VR or are more than
    `MAX_VALUE_BYTES`, or where it has more values than are left of `MAX_VALUES`; so is a sequence
    within more than `MAX_DESCRIBED_SEQUENCES`.

    Raises `NotUnderstood` for what `check_structure` would not have accepted.
    """
    with open_dataset(part10, {}, tempfile.TemporaryFile) as dataset:
        if left_out.is_inflated:
            dataset = _without(dataset, left_out.ranges)
        top = _described_elements(dataset, left_out.is_explicit)
    for tag, vr in left_out.without_value:
        top.put(tag, {"vr": top.settled(vr)})
    top.sort()
    return orjson.dumps(top.elements)


def _without(dataset: EncodedDataset, ranges: Sequence[Range]) -> EncodedDataset:
    ends = [dataset.start, *(end for _, end in ranges)]
    starts = [*(start for start, _ in ranges), len(dataset.view)]
    kept = b"".join(dataset.view[e:s] for e, s in zip(ends, starts, strict=True))
    return dataset._replace(view=memoryview(kept), start=0)


def _described_elements(dataset: EncodedDataset, is_explicit: bool | None) -> "_Item":
    walk = Walk(dataset, HIGHEST, is_explicit=is_explicit)
    top = _Item(_ValuesLeft(MAX_VALUES), walk.encoding)
    items = [top]
    sequences: list[JsonObject] = []
    while True:
        items[-1].add_seen(walk.known_elements(items[-1].seen, _SEEN_ELEMENT_BYTES))
        step = walk.step()
        if step is None:
            return top
        if step.kind is StepKind.ELEMENT:
            items[-1].add(step, walk)
        elif step.kind is StepKind.SEQUENCE:
            sequence = {"vr": "SQ"}
            items[-1].put(f"{step.tag:08X}", sequence)
            if step.depth >= MAX_DESCRIBED_SEQUENCES:
                walk.skip_sequence()
            else:
                sequences.append(sequence)
        elif step.kind is StepKind.ITEM:
            items.append(items[-1].nested(walk.encoding))
            sequences[-1].setdefault("Value", []).append(items[-1].elements)
        elif step.kind is StepKind.END_OF_ITEM:
            items.pop().sort()
        else:
            sequences.pop()


class _SeenElement(NamedTuple):
    """A key of an item in the sidecar, what is there, and what `_value_count` says of it."""

    tag: str
    element: JsonObject
    value_count: int


# Of the instances of a series, and mostly of a site, most elements are alike. Nobody changes one.
@lru_cache(maxsize=4)
def _seen_elements(
    _encoding: tuple[bool, str], _codecs: tuple[str, ...]
) -> dict[bytes, _SeenElement]:
    """Those of earlier instances in the same encoding and character sets, as they are encoded."""
    return {}


@dataclass
class _ValuesLeft:
    """How many more values the sidecar may have; an element that has more of them gets none."""

    count: int

    def take(self, count: int) -> bool:
        if count > self.count:
            return False
        self.count -= count
        return True


@dataclass
class _Item:
    """A data set or an item while it is built, with what its elements' values depend on."""

    values_left: _ValuesLeft
    encoding: tuple[bool, str]
    elements: JsonObject = field(default_factory=dict)
    codecs: tuple[str, ...] = DEFAULT_CODECS
    has_signed_pixels: bool = False
    is_top_level: bool = True
    seen: dict[bytes, _SeenElement] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = _seen_elements(self.encoding, self.codecs)

    def nested(self, encoding: tuple[bool, str]) -> "_Item":
        """An item of a sequence in this one; PS3.5 7.5.3 and A.1 say what it inherits."""
        return _Item(
            self.values_left,
            encoding,
            codecs=self.codecs,
            has_signed_pixels=self.has_signed_pixels,
            is_top_level=False,
        )

    def put(self, tag: str, element: JsonObject) -> None:
        self.elements[tag] = element

    def settled(self, vr: str) -> str:
        """The VR where the data dictionary gives a choice (PS3.3 C.7.6.3)."""
        if vr == "US or SS":
            return "SS" if self.has_signed_pixels else "US"
        return vr

    def sort(self) -> None:
        """PS3.5 7.1 has elements ascending, but not every file."""
        in_order = sorted(self.elements)
        if in_order != list(self.elements):
            unsorted = self.elements.copy()
            self.elements.clear()
            self.elements.update((tag, unsorted[tag]) for tag in in_order)

    def add_seen(self, seen: Sequence[_SeenElement]) -> None:
        for tag, element, value_count in seen:
            fits = self.values_left.take(value_count)
            self.elements[tag] = element if fits else {"vr": element["vr"]}

    def add(self, step: Step, walk: Walk) -> None:
        """Add an element, and to `seen` if it would be the same wherever it stands."""
        tag, vr = step.tag, self.settled(step.vr)
        if tag & 0xFFFF == 0 or tag >> 16 == 2:  # Group Length, PS3.5 7.2; PS3.10 7.1
            return
        if self.is_top_level and vr in BULK_VRS:
            return
        value = walk.value(step)
        value_count = _value_count(vr, value)
        fits = len(value) <= MAX_VALUE_BYTES and self.values_left.take(value_count)
        element = _element(vr, value, step.byte_order, self.codecs) if fits else {"vr": vr}
        self.put(f"{tag:08X}", element)

        if tag == SPECIFIC_CHARACTER_SET:
            self.codecs = codecs_of(value)
            self.seen = _seen_elements(self.encoding, self.codecs)
        elif tag == _PIXEL_REPRESENTATION:
            self.has_signed_pixels = element.get("Value") == [1]
        elif (
            fits
            and step.end - step.start <= _SEEN_ELEMENT_BYTES
            and vr not in BULK_VRS
            and walk.is_the_same_elsewhere(step)
        ):
            if len(self.seen) >= _MOST_SEEN_ELEMENTS:
                self.seen.clear()
            self.seen[walk.encoded(step)] = _SeenElement(f"{tag:08X}", element, value_count)


def _value_count(vr: str, value: bytes) -> int:
    """At most how many objects the value becomes: numbers, texts, or runs of a character set."""
    if vr in BULK_VRS:
        return 1
    size_bytes = 4 if vr == "AT" else struct.calcsize("=" + NUMBERS[vr]) if vr in NUMBERS else 0
    if size_bytes:
        return len(value) // size_bytes
    return 1 + value.count(b"\\") + value.count(b"\x1b")


def _element(vr: str, value: bytes, byte_order: str, codecs: Sequence[str]) -> JsonObject:
    if not value:
        return {"vr": vr}
    if vr in BULK_VRS:
        return {"vr": vr, "InlineBinary": _base64(vr, value, byte_order)}
    values = _values(vr, value, byte_order, codecs)
    # PS3.18 F.2.5: no value is no "Value", and one of several that is empty is null.
    return {"vr": vr, "Value": values} if values not in ([], [None]) else {"vr": vr}


def _base64(vr: str, value: bytes, byte_order: str) -> str:
    """PS3.18 F.2.7, in little endian, as JSON names no transfer syntax."""
    if byte_order == ">" and vr in _WORDS:
        words = array(_WORDS[vr])
        if len(value) % words.itemsize == 0:
            words.frombytes(value)
            words.byteswap()
            value = words.tobytes()
    return base64.b64encode(value).decode("ascii")


def _values(vr: str, value: bytes, byte_order: str, codecs: Sequence[str]) -> list[Any]:
    """PS3.18 Table F.2.3-1; [] where the bytes do not fit the VR."""
    number_format = NUMBERS.get(vr)
    if number_format is not None:
        return _numbers(number_format, value, byte_order)
    if vr == "AT":
        words = _numbers("H", value, byte_order)
        if len(words) % 2:
            return []
        return [f"{words[i]:04X}{words[i + 1]:04X}" for i in range(0, len(words), 2)]

    parts = texts(vr, value, codecs)
    if vr == "PN":
        return [_person_name(part) for part in parts]
    if vr == "DS":
        return [_decimal(part.strip(" ")) for part in parts]
    if vr == "IS":
        return [_integer(part.strip(" ")) for part in parts]
    if vr == "AE":
        return [part.strip(" ") or None for part in parts]
    return [part or None for part in parts]


def _numbers(number_format: str, value: bytes, byte_order: str) -> list[Any]:
    count, odd_bytes = divmod(len(value), struct.calcsize("=" + number_format))
    if odd_bytes:
        return []
    numbers = list(struct.unpack(f"{byte_order}{count}{number_format}", value))
    if number_format == "f":
        return [_shortest_float32(number) for number in numbers]
    if number_format == "d":
        return [_json_number(number) for number in numbers]
    return numbers


def _json_number(number: float) -> int | float | str:
    """A whole number without a fraction, as other writers of DICOM JSON have it: the Workflow
    Manager compares texts."""
    if not math.isfinite(number):
        return _not_finite(number)
    return int(number) if number.is_integer() and abs(number) < _EXACT_INTEGERS else number


@lru_cache(maxsize=4096)
def _shortest_float32(number: float) -> int | float | str:
    """The shortest decimal that gives the same 32-bit float, such as 0.1."""
    if not math.isfinite(number):
        return _not_finite(number)
    encoded = _FLOAT32.pack(number)
    for digits in range(_fewest_digits(number), _FLOAT32_MAX_DIGITS):
        shorter = float(f"{number:.{digits}g}")
        if _FLOAT32.pack(shorter) == encoded:
            return _json_number(shorter)
    return _json_number(float(f"{number:.{_FLOAT32_MAX_DIGITS}g}"))


def _fewest_digits(number: float) -> int:
    """Below the smallest normal number each has as many digits less as it is smaller."""
    if abs(number) >= _FLOAT32_MIN_NORMAL:
        return _FLOAT32_DIGITS
    steps = int(abs(number) / _FLOAT32_MIN)
    return max(1, min(_FLOAT32_DIGITS, len(str(steps)) - 1))


def _not_finite(number: float) -> str:
    """JSON has no such numbers, so the words that ECMAScript has for them."""
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def _decimal(text: str) -> int | float | str | None:
    if _INTEGER.fullmatch(text):
        # Not as a float: "10" is to stay 10 for whoever compares texts, not 10.0.
        return _integer(text)
    if _DECIMAL.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text or None


def _integer(text: str) -> int | str | None:
    if _INTEGER.fullmatch(text) and (number := int(text)) in _JSON_INTEGERS:
        return number
    return text or None


def _person_name(text: str) -> dict[str, str] | None:
    """PS3.18 F.2.2; a group that is empty is left out."""
    groups = zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("=", 2), strict=False)
    return {name: group for name, group in groups if group} or None
