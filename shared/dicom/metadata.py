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
from pydicom.charset import CODES_TO_ENCODINGS, default_encoding, python_encoding
from pydicom.datadict import private_dictionary_VR

from shared.dicom.limits import MAX_VALUES, MOST
from shared.dicom.part10 import open_dataset
from shared.dicom.structure import BULK_VRS, SMALLEST_BULK_BYTES
from shared.dicom.uids import SPECIFIC_CHARACTER_SET
from shared.dicom.walk import Step, StepKind, Walk

JsonObject: TypeAlias = dict[str, Any]

_PIXEL_REPRESENTATION = 0x00280103

# PS3.5 Table 6.2-1: binary numbers, with their format characters of `struct`.
_NUMBERS: Mapping[str, str] = {
    "FL": "f",
    "FD": "d",
    "SL": "i",
    "SS": "h",
    "SV": "q",
    "UL": "I",
    "US": "H",
    "UV": "Q",
}
# PS3.5 Table 6.2-1: words that depend on the byte order, with their type codes of `array`.
_WORDS: Mapping[str, str] = {"OW": "H", "OF": "I", "OL": "I", "OD": "Q", "OV": "Q"}

# PS3.5 6.1.2.3: Specific Character Set applies to these VRs. Each has the characters behind which
# the first of several character sets is in effect again (PS3.5 6.1.2.5.3).
_RESETS = {
    **dict.fromkeys(("LT", "ST", "UT"), re.compile(rb"[\r\n\f\t]")),
    **dict.fromkeys(("LO", "SH", "UC"), re.compile(rb"[\r\n\f\t\\]")),
    "PN": re.compile(rb"[\r\n\f\t\\^=]"),
}
_VRS_OF_ONE_VALUE = frozenset({"LT", "ST", "UR", "UT"})

# PS3.5 Table 6.2-1, DS and IS
_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([Ee][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_SEEN_ELEMENT_BYTES = 72
_MOST_SEEN_ELEMENTS = 4096
_JSON_INTEGERS = range(-(2**63), 2**64)  # as far as orjson goes

_ESCAPED_RUN = re.compile(rb"^[^\x1b]+|\x1b[^\x1b]*")
# Python's codecs of these read the escape sequence themselves.
_CODECS_WITH_ESCAPES = frozenset({"iso2022_jp", "iso2022_jp_2"})


def metadata_json(part10: bytes) -> bytes:
    """One Part 10 file's data set as one JSON object, not indented, elements ascending by tag.

    `part10` is a file that `check_structure` accepted, with or without its bulk ranges. Left out
    are group 0002, group lengths, and top-level elements of a VR in `BULK_VRS`. An odd value never
    raises: a number that does not parse stays the string it is, and an element whose bytes do not
    fit its VR is given by its VR alone; so is one with more values than are left of `MAX_VALUES`.

    Raises `NotUnderstood` for what `check_structure` would not have accepted.
    """
    with open_dataset(part10, {}, tempfile.TemporaryFile) as dataset:
        walk = Walk(dataset, MOST)
        items = [_Item(_ValuesLeft(MAX_VALUES), walk.encoding)]
        sequences: list[JsonObject] = []
        while True:
            items[-1].add_seen(walk.known_elements(items[-1].seen, _SEEN_ELEMENT_BYTES))
            step = walk.step()
            if step is None:
                break
            if step.kind is StepKind.ELEMENT:
                items[-1].add(step, dataset.view)
            elif step.kind is StepKind.SEQUENCE:
                sequence = {"vr": "SQ"}
                items[-1].put(step.tag, sequence)
                sequences.append(sequence)
            elif step.kind is StepKind.ITEM:
                items.append(items[-1].nested(walk.encoding))
                sequences[-1].setdefault("Value", []).append(items[-1].elements)
            elif step.kind is StepKind.END_OF_ITEM:
                items.pop().sort()
            else:
                sequences.pop()
        items[0].sort()
    return orjson.dumps(items[0].elements)


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


def _can_be_seen_again(step: Step) -> bool:
    """Whether it is small, and its bytes alone tell what it is."""
    return (
        step.end - step.start <= _SEEN_ELEMENT_BYTES
        and step.vr not in BULK_VRS
        and step.vr != "US or SS"
    )


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
    codecs: tuple[str, ...] = (default_encoding,)
    has_signed_pixels: bool = False
    is_top_level: bool = True
    private_creators: dict[int, str] = field(default_factory=dict)
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

    def put(self, tag: int, element: JsonObject) -> None:
        self.elements[f"{tag:08X}"] = element

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

    def add(self, step: Step, view: memoryview) -> None:
        """Add an element, and to `seen` if it would be the same wherever it stands."""
        tag = step.tag
        if tag & 0xFFFF == 0:  # Group Length, PS3.5 7.2
            return
        vr = step.vr
        if vr == "US or SS":
            vr = "SS" if self.has_signed_pixels else "US"
        elif vr == "UN" and tag & 0x10000:
            vr = self._private_vr(step)
        if self.is_top_level and vr in BULK_VRS:
            return

        value = bytes(view[step.value_start : step.value_end])
        value_count = _value_count(vr, value)
        fits = self.values_left.take(value_count)
        element = _element(vr, value, step.byte_order, self.codecs) if fits else {"vr": vr}
        self.put(tag, element)

        if tag == SPECIFIC_CHARACTER_SET:
            self.codecs = _codecs(value)
            self.seen = _seen_elements(self.encoding, self.codecs)
        elif tag == _PIXEL_REPRESENTATION:
            self.has_signed_pixels = element.get("Value") == [1]
        elif tag & 0x1FF00 == 0x10000 and "Value" in element:
            # PS3.5 7.8.1: (gggg,00bb) reserves (gggg,bb00-bbFF)
            self.private_creators[tag >> 16 << 8 | tag & 0xFF] = str(element["Value"][0])
        elif fits and _can_be_seen_again(step):
            if len(self.seen) >= _MOST_SEEN_ELEMENTS:
                self.seen.clear()
            encoded = bytes(view[step.start : step.end])
            self.seen[encoded] = _SeenElement(f"{tag:08X}", element, value_count)

    def _private_vr(self, step: Step) -> str:
        """The VR that the owner of a private element is known to give it, else UN."""
        creator = self.private_creators.get(step.tag >> 8)
        # A larger one may have been cut out of the file as UN; it has to be left out in both cases.
        if creator is None or step.end - step.start > SMALLEST_BULK_BYTES:
            return "UN"
        try:
            vr = private_dictionary_VR(step.tag, creator)
        except KeyError:
            return "UN"
        # The walk has not proved its value a sequence, and no dictionary settles "US or SS".
        return vr if len(vr) == 2 and vr != "SQ" else "UN"


def _value_count(vr: str, value: bytes) -> int:
    """At most how many objects the value becomes: numbers, texts, or runs of a character set."""
    if vr in BULK_VRS:
        return 1
    size_bytes = 4 if vr == "AT" else struct.calcsize("=" + _NUMBERS[vr]) if vr in _NUMBERS else 0
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
    number_format = _NUMBERS.get(vr)
    if number_format is not None:
        return _numbers(number_format, value, byte_order)
    if vr == "AT":
        parts = _numbers("H", value, byte_order)
        if len(parts) % 2:
            return []
        return [f"{parts[i]:04X}{parts[i + 1]:04X}" for i in range(0, len(parts), 2)]

    text = _decoded(value, codecs, _RESETS[vr]) if vr in _RESETS else value.decode("latin-1")
    if vr in _VRS_OF_ONE_VALUE:
        return [text.rstrip("\0 ") or None]
    texts = [part.rstrip("\0 ") for part in text.split("\\")]
    if vr == "PN":
        return [_person_name(part) for part in texts]
    if vr == "DS":
        return [_decimal(part.strip(" ")) for part in texts]
    if vr == "IS":
        return [_integer(part.strip(" ")) for part in texts]
    if vr == "AE":
        return [part.strip(" ") or None for part in texts]
    return [part or None for part in texts]


def _numbers(number_format: str, value: bytes, byte_order: str) -> list[Any]:
    count, odd_bytes = divmod(len(value), struct.calcsize("=" + number_format))
    if odd_bytes:
        return []
    numbers = list(struct.unpack(f"{byte_order}{count}{number_format}", value))
    if number_format in "fd":
        return [number if math.isfinite(number) else _not_finite(number) for number in numbers]
    return numbers


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


def _normal_term(term: str) -> str:
    return re.sub("[ _-]", " ", term.upper())


_CODECS = {_normal_term(term): codec for term, codec in python_encoding.items()}


def _codecs(value: bytes) -> tuple[str, ...]:
    """Python's codecs for the values of Specific Character Set (PS3.3 C.12.1.1.2).

    Terms that are misspelt as often seen ("ISO IR 100") are known; for any other, the default.
    """
    terms = value.decode("latin-1").split("\\")
    return tuple(_CODECS.get(_normal_term(term.strip("\0 ")), default_encoding) for term in terms)


def _decoded(value: bytes, codecs: Sequence[str], reset: re.Pattern[bytes]) -> str:
    """Text in its character sets, with U+FFFD for bytes that are in none of them."""
    if b"\x1b" not in value:
        return value.decode(codecs[0], "replace")
    # PS3.5 6.1.2.5: an escape sequence begins a run in another one of the character sets.
    return "".join(
        _decoded_run(match.group(), codecs, reset) for match in _ESCAPED_RUN.finditer(value)
    )


def _decoded_run(run: bytes, codecs: Sequence[str], reset: re.Pattern[bytes]) -> str:
    escape = run[: 4 if run.startswith((b"\x1b$(", b"\x1b$)")) else 3]
    codec = CODES_TO_ENCODINGS.get(escape)
    if codec is None or (codec not in codecs and codec != default_encoding):
        return run.decode(codecs[0], "replace")
    if codec in _CODECS_WITH_ESCAPES:
        return run.decode(codec, "replace")
    text = run[len(escape) :]
    end = match.start() if (match := reset.search(text)) else len(text)
    return text[:end].decode(codec, "replace") + text[end:].decode(codecs[0], "replace")
