"""Inputs of the fuzzer: damaged real files, and made-up data sets and texts.

The `random.Random` argument is the only source of randomness, so each seed gives one input.
"""

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import pydicom
from pydicom._uid_dict import UID_dictionary

from shared.dicom.header import VRS_OF_LONG_LENGTH, VRS_OF_SHORT_LENGTH
from shared.dicom.limits import DEFAULT
from shared.dicom.part10 import open_dataset
from shared.dicom.refusal import InstanceRefused
from shared.dicom.walk import StepKind, Walk

MAX_SEED_BYTES = 40_000
MAX_INFLATED_BYTES = 1 << 20

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
TRANSFER_SYNTAXES = [uid for uid, entry in UID_dictionary.items() if entry[1] == "Transfer Syntax"]
COMMON_SYNTAXES = [EXPLICIT, IMPLICIT, BIG_ENDIAN, "1.2.840.10008.1.2.4.50"]

VRS = sorted([*VRS_OF_SHORT_LENGTH, *VRS_OF_LONG_LENGTH])
ODD_VRS = [b"ZZ", b"??", b"\0\0", b"  ", b"un", b"OX", b"A\0"]
UNDEFINED = 0xFFFFFFFF
LENGTHS = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    10,
    0xFE,
    0xFFFE,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0xFFFFFFFE,
    UNDEFINED,
]
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
IDENTITY = [0x00080016, 0x00080018, 0x0020000D, 0x0020000E]


class Place(NamedTuple):
    """Hold the offsets of a data element in a seed file: header, value, and end."""

    start: int
    value_start: int
    end: int


class Seed(NamedTuple):
    data: bytes
    dataset_start: int
    places: Sequence[Place]


@cache
def seeds() -> list[Seed]:
    """Return the small real files, in the same order on every machine."""
    found = []
    for path in sorted((Path(pydicom.__file__).parent / "data").rglob("*")):
        if path.is_file() and path.suffix in ("", ".dcm"):
            data = path.read_bytes()
            if 132 < len(data) <= MAX_SEED_BYTES:
                found.append(_seed(data))
    return found


def _seed(data: bytes) -> Seed:
    places = []
    try:
        with open_dataset(data, {}, TemporaryFile) as dataset:
            if dataset.is_inflated:
                return Seed(data, 132, [])
            for step in Walk(dataset, DEFAULT).steps():
                if step.kind is StepKind.ELEMENT:
                    places.append(Place(step.start, step.value_start, step.end))
            return Seed(data, dataset.start, places)
    except InstanceRefused:
        return Seed(data, 132, [])


def damaged_file(rng: random.Random) -> bytes:
    """Return a real file with some damage, sometimes with another transfer syntax."""
    seed = rng.choice(seeds())
    data = bytearray(seed.data)
    for _ in range(_few(rng)):
        if seed.places and rng.random() < 0.7:
            _damage_element(rng, data, rng.choice(seed.places))
        else:
            damage_bytes(rng, data, start=128)
    if rng.random() < 0.1:
        return with_transfer_syntax(bytes(data), rng.choice(TRANSFER_SYNTAXES))
    return bytes(data)


def deflated_file(rng: random.Random) -> bytes:
    """Return a damaged or made-up data set, deflated, and sometimes damaged again."""
    if rng.random() < 0.5:
        seed = rng.choice(seeds())
        dataset = bytearray(seed.data[seed.dataset_start :])
        for _ in range(_few(rng) - 1):
            damage_bytes(rng, dataset)
    else:
        dataset = bytearray(made_up_dataset(rng, EXPLICIT))
    if rng.random() < 0.05:
        dataset += bytes(rng.randrange(MAX_INFLATED_BYTES))
    deflater = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
    stream = bytearray(deflater.compress(bytes(dataset)) + deflater.flush())
    if rng.random() < 0.1:
        stream += struct.pack("<LL", zlib.crc32(dataset), len(dataset))
    if rng.random() < 0.4:
        damage_bytes(rng, stream)
    syntax = DEFLATED if rng.random() < 0.9 else rng.choice(TRANSFER_SYNTAXES)
    return part10(syntax, bytes(stream))


def made_up_file(rng: random.Random) -> bytes:
    """Return a Part 10 file with a random data set, sometimes damaged."""
    syntax = rng.choice(COMMON_SYNTAXES)
    data = part10(syntax, made_up_dataset(rng, syntax), made_up_meta(rng))
    if rng.random() < 0.3:
        damaged = bytearray(data)
        damage_bytes(rng, damaged, start=128)
        data = bytes(damaged)
    return data


def part10(transfer_syntax_uid: str, dataset: bytes, meta: bytes = b"") -> bytes:
    uid = transfer_syntax_uid.encode()
    uid += b"\0" * (len(uid) % 2)
    return (
        b"\0" * 128 + b"DICM" + meta + b"\2\0\x10\0UI" + struct.pack("<H", len(uid)) + uid + dataset
    )


def with_transfer_syntax(data: bytes, transfer_syntax_uid: str) -> bytes:
    start = data.find(b"\2\0\x10\0UI", 132)
    if start < 0 or start + 8 > len(data):
        return data
    (length,) = struct.unpack_from("<H", data, start + 6)
    uid = transfer_syntax_uid.encode()
    uid += b"\0" * (len(uid) % 2)
    return data[: start + 6] + struct.pack("<H", len(uid)) + uid + data[start + 8 + length :]


def made_up_meta(rng: random.Random) -> bytes:
    elements = [
        b"\2\0\0\0UL\4\0" + struct.pack("<L", rng.choice([0, 30, 200, 0xFFFFFFFF])),
        b"\2\0\1\0OB\0\0\2\0\0\0\0\1",
        b"\2\0\2\0UI\6\0001.2.3\0",
        b"\2\0\3\0UI\6\0001.2.4\0",
        b"\2\0\x16\0AE\4\0TEST",
    ]
    meta = b"".join(element for element in elements if rng.random() < 0.4)
    return meta * 2 if rng.random() < 0.1 else meta


def made_up_dataset(rng: random.Random, syntax: str) -> bytes:
    """Return data elements of any VR, Sequences, fragments, and mostly the UIDs of an instance."""
    order = ">" if syntax == BIG_ENDIAN else "<"
    return _Writer(rng, order, syntax == IMPLICIT).dataset()


class _Writer:
    def __init__(self, rng: random.Random, order: str, is_implicit: bool) -> None:
        self._rng = rng
        self._order = order
        self._is_implicit = is_implicit
        self._left = 40

    def dataset(self) -> bytes:
        rng = self._rng
        tags = sorted(rng.choice(_tags()) for _ in range(rng.randrange(12)))
        if rng.random() < 0.9:
            tags += [tag for tag in IDENTITY if rng.random() < 0.98]
        if rng.random() < 0.9:
            tags.sort()
        elements = [self._element(tag, 0) for tag in tags]
        if rng.random() < 0.1:
            bulk = self._header(0x00071001, b"OB", 5000) + bytes(5000)
            elements.insert(rng.choice([0, 0, rng.randrange(len(elements) + 1)]), bulk)
        if rng.random() < 0.1:
            elements.append(bytes(rng.choice([1, 7, 8, 64, 1000])))
        return b"".join(elements)

    def _element(self, tag: int, depth: int) -> bytes:
        rng = self._rng
        if tag in IDENTITY and depth == 0 and rng.random() < 0.97:
            return self._header(tag, b"UI", 6) + b"1.2.%d\0" % rng.randrange(3, 9)
        vr = rng.choice(VRS) if rng.random() < 0.98 else rng.choice(ODD_VRS)
        if depth < 8 and self._left > 0 and (vr == b"SQ" or rng.random() < 0.15):
            return self._sequence(tag, b"SQ" if rng.random() < 0.8 else b"UN", depth)
        if vr in (b"OB", b"OW") and rng.random() < 0.3:
            return self._fragments(tag, vr)
        if tag & 0x10000 and 0x10 <= tag & 0xFFFF <= 0xFF and rng.random() < 0.5:
            creator = rng.choice(_CREATORS)
            return self._header(tag, b"LO", len(creator)) + creator
        value = made_up_value(rng)
        length = len(value) if rng.random() < 0.98 else rng.choice(LENGTHS)
        if rng.random() < 0.02:
            return self._raw(tag, length) + value
        return self._header(tag, vr, length) + value

    def _header(self, tag: int, vr: bytes, length: int) -> bytes:
        group, number = tag >> 16, tag & 0xFFFF
        if self._is_implicit:
            return struct.pack(self._order + "HHL", group, number, length)
        if vr in VRS_OF_SHORT_LENGTH:
            return struct.pack(self._order + "HH2sH", group, number, vr, length & 0xFFFF)
        return struct.pack(self._order + "HH2sHL", group, number, vr, 0, length)

    def _raw(self, tag: int, length: int) -> bytes:
        return struct.pack(self._order + "HHL", tag >> 16, tag & 0xFFFF, length)

    def _sequence(self, tag: int, vr: bytes, depth: int) -> bytes:
        rng = self._rng
        enclosing = self._is_implicit, self._order
        if vr == b"UN" and rng.random() < 0.8:  # PS3.5 6.2.2
            self._is_implicit, self._order = True, "<"
        elif rng.random() < 0.1:
            self._is_implicit = not self._is_implicit
        content = b""
        for _ in range(rng.randrange(4)):
            self._left -= 1
            elements = b"".join(
                self._element(rng.choice(_tags()), depth + 1) for _ in range(rng.randrange(4))
            )
            if rng.random() < 0.5:
                content += self._raw(ITEM, UNDEFINED) + elements + self._raw(ITEM_END, 0)
            else:
                elements += self._raw(ITEM_END, 0) * (rng.random() < 0.1)
                content += self._raw(ITEM, len(elements)) + elements
        end = self._raw(SEQUENCE_END, 0)
        if rng.random() < 0.1:
            content += end
        self._is_implicit, self._order = enclosing
        if rng.random() < 0.5:
            return self._header(tag, vr, UNDEFINED) + content + end
        return self._header(tag, vr, len(content)) + content

    def _fragments(self, tag: int, vr: bytes) -> bytes:
        rng = self._rng
        content = b"".join(
            self._raw(ITEM, len(piece)) + piece
            for piece in (made_up_value(rng) for _ in range(rng.randrange(4)))
        )
        return self._header(tag, vr, UNDEFINED) + content + self._raw(SEQUENCE_END, 0)


@cache
def _tags() -> list[int]:
    known = [0x00080005, 0x00080060, 0x00081140, 0x00100010, 0x00200011, 0x00280103, 0x00280106]
    known += [0x00283006, 0x00321064, 0x0040A730, 0x00420011, 0x54000100, 0x7FE00010, 0xFFFCFFFC]
    private = [0x00090010, 0x00091001, 0x00191008, 0x00290010, 0x00291010]
    private += [0x20010010, 0x2001105F, 0x20011003, 0x01F10010, 0x01F11026]
    return known * 3 + private * 2 + IDENTITY + [0x00000000, 0x00000002, 0x00020010, 0x00080000]


_CREATORS = [
    b"Philips Imaging DD 001",
    b"PHILIPS IMAGING DD 001",
    b"ELSCINT1",
    b"SIEMENS CSA HEADER",
    b"ACME",
]

_TEXTS = [
    b"",
    b" ",
    b"\0",
    b"CT",
    b"1",
    b"1.5",
    b"-1e400",
    b"1_0",
    b"0x1F",
    b"NaN",
    b"1\\2\\",
    b"\\",
]
_TEXTS += [
    b"Doe^Jane=\xe5=x==",
    b"\x1b$B8!::\x1b(B",
    b"\x1b",
    b"\x1b)I\xc0",
    b"\xff\xfe",
    b"ISO 2022 IR 87",
]
_TEXTS += [
    b"ISO_IR 192",
    b"\\ISO 2022 IR 149",
    b"GB18030",
    b"GB2312",
    b"ISO_IR 13",
    b"0.264 ",
    b"0.488281",
    b"20040119",
    b"1.2.840.10008.1.2",
    b"9" * 30,
]


def made_up_value(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(_TEXTS)
    if kind < 0.95:
        return rng.randbytes(rng.choice([1, 2, 4, 6, 8, 12, 16, 40]))
    if kind < 0.96:  # the length looks like a VR
        return bytes(int.from_bytes(rng.choice(VRS), "little"))
    return b"\\".join([rng.choice(_TEXTS)] * rng.randrange(500)) + bytes(rng.randrange(5000))


def _few(rng: random.Random) -> int:
    return min(1 + int(rng.expovariate(0.7)), 12)


def damage_bytes(rng: random.Random, data: bytearray, start: int = 0) -> None:
    """Apply one change, regardless of what the bytes mean."""
    if len(data) > start:
        rng.choice(_BLIND)(rng, data, rng.randrange(start, len(data)))


def _flip(rng: random.Random, data: bytearray, at: int) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, at: int) -> None:
    data[at] = rng.choice([0, 1, 0x20, 0x2F, 0x5C, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)])


def _cut_out(rng: random.Random, data: bytearray, at: int) -> None:
    del data[at : at + rng.choice([1, 2, 4, 8, rng.randrange(1, 1000)])]


def _cut_off(rng: random.Random, data: bytearray, at: int) -> None:  # noqa: ARG001
    del data[at:]


def _splice(rng: random.Random, data: bytearray, at: int) -> None:
    other = rng.randrange(len(data))
    data[at:at] = data[other : other + rng.choice([1, 2, 8, 12, rng.randrange(1, 200)])]


def _insert(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8]))


_Change = Callable[[random.Random, bytearray, int], None]
_BLIND: list[_Change] = [_flip, _flip, _set, _set, _cut_out, _cut_off, _splice, _insert]


def _damage_element(rng: random.Random, data: bytearray, place: Place) -> None:
    """Change one data element, or other bytes if earlier changes have moved it."""
    if place.end <= len(data):
        rng.choice(_AIMED)(rng, data, place)


def _falsify_length(rng: random.Random, data: bytearray, place: Place) -> None:
    true = place.end - place.value_start
    length = rng.choice([*LENGTHS, true + 1, true + 2, max(true - 2, 0), true + 8])
    if bytes(data[place.start + 4 : place.start + 6]) in VRS_OF_SHORT_LENGTH:
        struct.pack_into("<H", data, place.start + 6, length & 0xFFFF)
    else:
        struct.pack_into("<L", data, place.value_start - 4, length & 0xFFFFFFFF)


def _swap_vr(rng: random.Random, data: bytearray, place: Place) -> None:
    data[place.start + 4 : place.start + 6] = rng.choice(VRS if rng.random() < 0.8 else ODD_VRS)


def _swap_tag(rng: random.Random, data: bytearray, place: Place) -> None:
    tag = rng.choice([*_tags(), ITEM, ITEM_END, SEQUENCE_END])
    struct.pack_into("<HH", data, place.start, tag >> 16, tag & 0xFFFF)


def _double(rng: random.Random, data: bytearray, place: Place) -> None:
    element = data[place.start : place.end]
    data[place.end : place.end] = element * rng.choice([1, 1, 1, 2, 100])


def _drop(rng: random.Random, data: bytearray, place: Place) -> None:  # noqa: ARG001
    del data[place.start : place.end]


def _put_in(rng: random.Random, data: bytearray, place: Place) -> None:
    writer = _Writer(rng, rng.choice("<<<>"), rng.random() < 0.3)
    data[place.start : place.start] = writer._element(rng.choice(_tags()), 0)


def _nest(rng: random.Random, data: bytearray, place: Place) -> None:
    depth = rng.choice([1, 2, 60, 64, 65, 300])
    begin = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
    end = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    element = data[place.start : place.end]
    data[place.start : place.end] = begin * depth + element + end * depth


def _fill_value(rng: random.Random, data: bytearray, place: Place) -> None:
    size = place.end - place.value_start
    filler = rng.choice([b"\0", b" ", b"\\", b"\xff", b"\x1b", b"1\\", b"=", rng.randbytes(3)])
    data[place.value_start : place.end] = (filler * size)[:size]


_AIMED: list[Callable[[random.Random, bytearray, Place], None]] = [
    *(_falsify_length, _swap_vr, _swap_tag, _double, _drop, _put_in, _nest, _fill_value)
]
