"""The metadata sidecar: a data set in the DICOM JSON Model (PS3.18 F), for the Workflow Manager.

The walk of the structure check reads the data set, so that every accepted instance can be
described. pydicom's reader recurses, raises for some invalid values, and logs others in warnings.
Only its data dictionaries and character set tables are used.
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
from shared.dicom.header import NUMBER_FORMATS
from shared.dicom.left_out import BULK_VRS, NOTHING_LEFT_OUT, LeftOut, Range
from shared.dicom.limits import HIGHEST, MAX_DESCRIBED_SEQUENCES, MAX_VALUE_BYTES, MAX_VALUES
from shared.dicom.part10 import EncodedDataset, open_dataset
from shared.dicom.uids import SPECIFIC_CHARACTER_SET
from shared.dicom.walk import Step, StepKind, Walk

JsonObject: TypeAlias = dict[str, Any]

_PIXEL_REPRESENTATION = 0x00280103

# PS3.5 Table 6.2-1: VRs of words that depend on the byte order, with the type codes of `array`.
_WORDS: Mapping[str, str] = {"OW": "H", "OF": "I", "OL": "I", "OD": "Q", "OV": "Q"}

# PS3.5 Table 6.2-1, DS and IS
_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([Ee][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_MAX_CACHED_ELEMENT_BYTES = 72
_MAX_CACHED_ELEMENTS = 4096
_JSON_INTEGERS = range(-(2**63), 2**64)  # the range of orjson
# IEEE 754 binary32 preserves every decimal of 6 digits; 9 digits distinguish all its numbers.
_MIN_FLOAT32_DIGITS, _MAX_FLOAT32_DIGITS = 6, 9
_FLOAT32_MIN_NORMAL, _FLOAT32_MIN = 2.0**-126, 2.0**-149
_FLOAT32 = struct.Struct("<f")
_MAX_EXACT_INTEGER = 2.0**53  # binary64 represents every smaller integer exactly


def metadata_json(part10: bytes, left_out: LeftOut = NOTHING_LEFT_OUT) -> bytes:
    """Describe the data set of a Part 10 file as one JSON object, compact and ascending by tag.

    The object omits group 0002, group lengths, and top-level data elements of a VR in `BULK_VRS`.
    An invalid value never raises: a number that cannot be parsed stays a string. A data element has
    a VR and no value if its bytes do not fit the VR or exceed `MAX_VALUE_BYTES`, if its values
    exceed the rest of `MAX_VALUES`, or if it is a Sequence within `MAX_DESCRIBED_SEQUENCES` others.

    Args:
        part10: A file that `check_structure` accepted, without the ranges of `left_out`. A deflated
            file is complete.
        left_out: The result of `check_structure`.

    Raises:
        NotUnderstood: `check_structure` would not have accepted the file.
    """
    with open_dataset(part10, {}, tempfile.TemporaryFile) as dataset:
        if left_out.is_inflated:
            dataset = _without(dataset, left_out.ranges)
        top = _described_elements(dataset, left_out.is_explicit)
    for tag, vr in left_out.without_value:
        top.put(tag, {"vr": top.resolved_vr(vr)})
    top.sort()
    return orjson.dumps(top.elements)


def _without(dataset: EncodedDataset, ranges: Sequence[Range]) -> EncodedDataset:
    ends = [dataset.start, *(end for _, end in ranges)]
    starts = [*(start for start, _ in ranges), len(dataset.view)]
    kept = b"".join(dataset.view[e:s] for e, s in zip(ends, starts, strict=True))
    return dataset._replace(view=memoryview(kept), start=0)


def _described_elements(dataset: EncodedDataset, is_explicit: bool | None) -> "_Item":
    walk = Walk(dataset, HIGHEST, is_explicit=is_explicit)
    top = _Item(_ValueBudget(MAX_VALUES), walk.encoding)
    items = [top]
    sequences: list[JsonObject] = []
    while True:
        items[-1].add_cached(walk.cached_elements(items[-1].cache, _MAX_CACHED_ELEMENT_BYTES))
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


class _CachedElement(NamedTuple):
    """Hold a data element of the sidecar: its tag, its JSON, and its `_value_count`."""

    tag: str
    element: JsonObject
    value_count: int


# The instances of a series, and mostly of a site, share most data elements. Entries are never
# modified.
@lru_cache(maxsize=4)
def _element_cache(
    _encoding: tuple[bool, str], _codecs: tuple[str, ...]
) -> dict[bytes, _CachedElement]:
    """Return the cache for one encoding and character set, keyed by encoded data element."""
    return {}


@dataclass
class _ValueBudget:
    """Count the values that the sidecar has room for."""

    count: int

    def spend(self, count: int) -> bool:
        if count > self.count:
            return False
        self.count -= count
        return True


@dataclass
class _Item:
    """Build a data set or an Item, with the context that its values depend on."""

    value_budget: _ValueBudget
    encoding: tuple[bool, str]
    elements: JsonObject = field(default_factory=dict)
    codecs: tuple[str, ...] = DEFAULT_CODECS
    has_signed_pixels: bool = False
    is_top_level: bool = True
    cache: dict[bytes, _CachedElement] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = _element_cache(self.encoding, self.codecs)

    def nested(self, encoding: tuple[bool, str]) -> "_Item":
        """Return a nested Item, which inherits context from this one (PS3.5 7.5.3 and A.1)."""
        return _Item(
            self.value_budget,
            encoding,
            codecs=self.codecs,
            has_signed_pixels=self.has_signed_pixels,
            is_top_level=False,
        )

    def put(self, tag: str, element: JsonObject) -> None:
        self.elements[tag] = element

    def resolved_vr(self, vr: str) -> str:
        """Resolve a VR of which the data dictionary has two (PS3.3 C.7.6.3)."""
        if vr == "US or SS":
            return "SS" if self.has_signed_pixels else "US"
        return vr

    def sort(self) -> None:
        """PS3.5 7.1 requires ascending tags, but not every file has them."""
        in_order = sorted(self.elements)
        if in_order != list(self.elements):
            unsorted = self.elements.copy()
            self.elements.clear()
            self.elements.update((tag, unsorted[tag]) for tag in in_order)

    def add_cached(self, cached: Sequence[_CachedElement]) -> None:
        for tag, element, value_count in cached:
            fits = self.value_budget.spend(value_count)
            self.elements[tag] = element if fits else {"vr": element["vr"]}

    def add(self, step: Step, walk: Walk) -> None:
        """Add a data element, and cache it if it has the same meaning in any data set."""
        tag, vr = step.tag, self.resolved_vr(step.vr)
        if tag & 0xFFFF == 0 or tag >> 16 == 2:  # Group Length, PS3.5 7.2; PS3.10 7.1
            return
        if self.is_top_level and vr in BULK_VRS:
            return
        value = walk.value(step)
        value_count = _value_count(vr, value)
        fits = len(value) <= MAX_VALUE_BYTES and self.value_budget.spend(value_count)
        element = _element(vr, value, step.byte_order, self.codecs) if fits else {"vr": vr}
        self.put(f"{tag:08X}", element)

        if tag == SPECIFIC_CHARACTER_SET:
            self.codecs = codecs_of(value)
            self.cache = _element_cache(self.encoding, self.codecs)
        elif tag == _PIXEL_REPRESENTATION:
            self.has_signed_pixels = element.get("Value") == [1]
        elif (
            fits
            and step.end - step.start <= _MAX_CACHED_ELEMENT_BYTES
            and vr not in BULK_VRS
            and walk.is_cacheable(step)
        ):
            if len(self.cache) >= _MAX_CACHED_ELEMENTS:
                self.cache.clear()
            self.cache[walk.encoded(step)] = _CachedElement(f"{tag:08X}", element, value_count)


def _value_count(vr: str, value: bytes) -> int:
    """Return the maximum number of Python objects for a value: numbers, texts or text runs."""
    if vr in BULK_VRS:
        return 1
    size_bytes = 4 if vr == "AT" else struct.calcsize("=" + NUMBER_FORMATS.get(vr, ""))
    if size_bytes:
        return len(value) // size_bytes
    return 1 + value.count(b"\\") + value.count(b"\x1b")


def _element(vr: str, value: bytes, byte_order: str, codecs: Sequence[str]) -> JsonObject:
    if not value:
        return {"vr": vr}
    if vr in BULK_VRS:
        return {"vr": vr, "InlineBinary": _base64(vr, value, byte_order)}
    values = _values(vr, value, byte_order, codecs)
    # PS3.18 F.2.5: an empty data element has no "Value"; one empty value of several is null.
    return {"vr": vr, "Value": values} if values not in ([], [None]) else {"vr": vr}


def _base64(vr: str, value: bytes, byte_order: str) -> str:
    """PS3.18 F.2.7, always in little endian, because JSON has no transfer syntax."""
    if byte_order == ">" and vr in _WORDS:
        words = array(_WORDS[vr])
        if len(value) % words.itemsize == 0:
            words.frombytes(value)
            words.byteswap()
            value = words.tobytes()
    return base64.b64encode(value).decode("ascii")


def _values(vr: str, value: bytes, byte_order: str, codecs: Sequence[str]) -> list[Any]:
    """Return values by PS3.18 Table F.2.3-1; [] if the bytes do not fit the VR."""
    number_format = NUMBER_FORMATS.get(vr)
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
    """Write integers without a fraction, like other writers of DICOM JSON: the Workflow Manager
    compares numbers as text."""
    if not math.isfinite(number):
        return _not_finite(number)
    return int(number) if number.is_integer() and abs(number) < _MAX_EXACT_INTEGER else number


@lru_cache(maxsize=4096)
def _shortest_float32(number: float) -> int | float | str:
    """Return the shortest decimal that gives the same 32-bit float, such as 0.1."""
    if not math.isfinite(number):
        return _not_finite(number)
    encoded = _FLOAT32.pack(number)
    for digits in range(_min_float32_digits(number), _MAX_FLOAT32_DIGITS):
        shorter = float(f"{number:.{digits}g}")
        if _FLOAT32.pack(shorter) == encoded:
            return _json_number(shorter)
    return _json_number(float(f"{number:.{_MAX_FLOAT32_DIGITS}g}"))


def _min_float32_digits(number: float) -> int:
    """Subnormal numbers have fewer significant digits, the smaller they are."""
    if abs(number) >= _FLOAT32_MIN_NORMAL:
        return _MIN_FLOAT32_DIGITS
    steps = int(abs(number) / _FLOAT32_MIN)
    return max(1, min(_MIN_FLOAT32_DIGITS, len(str(steps)) - 1))


def _not_finite(number: float) -> str:
    """JSON cannot represent these numbers, so they become the names that ECMAScript uses."""
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def _decimal(text: str) -> int | float | str | None:
    if _INTEGER.fullmatch(text):
        # As a float, "10" would become 10.0, which the Workflow Manager compares as text.
        return _integer(text)
    if _DECIMAL.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text or None


def _integer(text: str) -> int | str | None:
    if _INTEGER.fullmatch(text) and (number := int(text)) in _JSON_INTEGERS:
        return number
    return text or None


def _person_name(text: str) -> dict[str, str] | None:
    """Split the component groups of a name, without empty ones (PS3.18 F.2.2)."""
    groups = zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("=", 2), strict=False)
    return {name: group for name, group in groups if group} or None
