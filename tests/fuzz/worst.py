"""The most expensive known files, and the cost of each: python tests/fuzz/worst.py

A separate process checks each file, and describes it if it is accepted. The exit status is 1 if a
file exceeds a limit.
"""

import multiprocessing
import struct
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from mutations import DEFLATED, EXPLICIT, IMPLICIT, ITEM, ITEM_END, SEQUENCE_END, UNDEFINED, part10
from run import peak_bytes
from targets import described

from shared.dicom.left_out import NOTHING_LEFT_OUT
from shared.dicom.limits import (
    MAX_CHECKED_ELEMENTS,
    MAX_ELEMENTS,
    MAX_FRAGMENTS,
    MAX_METADATA_BYTES,
    MAX_NESTED_SEQUENCES,
    MAX_VALUE_BYTES,
    MAX_VALUES,
)
from shared.dicom.refusal import InstanceRefused
from shared.dicom.structure import check_structure

MAX_CHECK_MEMORY_BYTES = 64 << 20
"""The API checks files while other uploads arrive, so a check must take little memory."""

MAX_SIDECAR_MEMORY_BYTES = 512 << 20
"""The worker builds one sidecar at a time in each thread."""

MAX_SECONDS = 60.0


T = TypeVar("T")


class Cost(NamedTuple):
    outcome: str
    check_seconds: float
    check_bytes: int
    sidecar_seconds: float
    sidecar_bytes: int


def long_element(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr.encode(), 0, length) + value


def short_element(tag: int, vr: str, value: bytes = b"") -> bytes:
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), len(value)) + value


def bare(tag: int, length: int) -> bytes:
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, length)


def implicit(tag: int, value: bytes) -> bytes:
    return bare(tag, len(value)) + value


def deflated(dataset: bytes) -> bytes:
    deflater = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS)
    return part10(DEFLATED, deflater.compress(dataset) + deflater.flush())


def nested(depth: int) -> bytes:
    begin = long_element(0x00081140, "SQ", bare(ITEM, UNDEFINED), UNDEFINED)
    return part10(EXPLICIT, begin * depth + (bare(ITEM_END, 0) + bare(SEQUENCE_END, 0)) * depth)


def many_private_elements(count: int) -> bytes:
    tags = (0x00110000 + ((n >> 15) << 17) + (0x1000 | n & 0x7FFF) for n in range(count - 1))
    return part10(EXPLICIT, b"".join(short_element(tag, "LO", b"a\\b\\") for tag in tags))


def many_items(count: int) -> bytes:
    items = bare(ITEM, 8) + short_element(0x00080060, "CS")
    return part10(EXPLICIT, long_element(0x00081140, "SQ", items * (count // 2 - 1)))


def many_items_without_end() -> bytes:
    items = bare(ITEM, 0) * MAX_CHECKED_ELEMENTS
    return part10(EXPLICIT, long_element(0x00081140, "SQ", items, UNDEFINED))


def many_sequences() -> bytes:
    """Top-level Sequences, each of which may get a left-out range of its own."""
    sequence = long_element(0x00091001, "SQ", bare(ITEM, 0))
    return part10(EXPLICIT, sequence * (MAX_CHECKED_ELEMENTS // 2 - 1))


def small_ambiguous_items() -> bytes:
    """Items that need a trial in each of two encodings."""
    items = (bare(ITEM, 8) + bare(0x00080060, 0)) * (MAX_CHECKED_ELEMENTS // 2 - 1)
    return part10(EXPLICIT, long_element(0x00081140, "SQ", items))


def private_sequences() -> bytes:
    """Private Sequences, which a trial and then the walk read."""
    creator = short_element(0x20010010, "LO", b"Philips Imaging DD 001")
    sequence = long_element(0x2001105F, "UN", bare(ITEM, 0))
    return part10(EXPLICIT, creator + sequence * (MAX_CHECKED_ELEMENTS // 3))


def private_creators() -> bytes:
    name = b"Philips Imaging DD 001"
    tags = ((0x2001 + 2 * (n // 240)) << 16 | 0x10 + n % 240 for n in range(MAX_ELEMENTS))
    return part10(EXPLICIT, b"".join(short_element(tag, "LO", name) for tag in tags))


def fragments_in_ambiguous_items() -> bytes:
    begin = long_element(0x00091001, "UN", bare(ITEM, UNDEFINED), UNDEFINED)
    end = bare(ITEM_END, 0) + bare(SEQUENCE_END, 0)
    depth = MAX_NESTED_SEQUENCES - 1
    pixels = bare(ITEM, 0) * (MAX_FRAGMENTS - 1) + bare(SEQUENCE_END, 0)
    content = short_element(0x00080060, "CS") + long_element(0x7FE00010, "OB", pixels, UNDEFINED)
    return part10(EXPLICIT, begin * depth + content + end * depth)


def ranges_to_leave_out() -> bytes:
    bulk = long_element(0x00091001, "OB", bytes(4090)) + short_element(0x00091002, "LO")
    return part10(EXPLICIT, bulk * 20_000)


def different_floats(first: int) -> Callable[[], bytes]:
    """Return a maker of the maximum number of 32-bit floats, all different."""

    def make() -> bytes:
        numbers = array("I", range(first, first + MAX_VALUES - 10)).tobytes()
        nested = bare(ITEM, len(numbers) + 8) + bare(0x00700022, len(numbers)) + numbers
        return part10(IMPLICIT, bare(0x00081140, len(nested)) + nested)

    return make


def wide_text() -> bytes:
    """Text whose one wide character makes every character take four bytes in memory."""
    character_set = short_element(0x00080005, "CS", b"ISO_IR 192")
    text = "\N{GRINNING FACE}".encode() + b"\xff" * (MAX_VALUE_BYTES - 4)
    return part10(EXPLICIT, character_set + long_element(0x00104000, "UT", text) * 3)


def ambiguous_items() -> bytes:
    """Explicit Items in UN at each level, so that the content is read again for each level."""
    begin = long_element(0x00091001, "UN", bare(ITEM, UNDEFINED), UNDEFINED)
    end = bare(ITEM_END, 0) + bare(SEQUENCE_END, 0)
    depth = MAX_NESTED_SEQUENCES
    content = short_element(0x00080060, "CS") * (MAX_CHECKED_ELEMENTS // depth)
    return part10(EXPLICIT, begin * depth + content + end * depth)


def fragments() -> bytes:
    content = bare(ITEM, 0) * MAX_FRAGMENTS + bare(SEQUENCE_END, 0)
    return part10(EXPLICIT, long_element(0x7FE00010, "OB", content, UNDEFINED))


def one_text() -> bytes:
    return part10(EXPLICIT, long_element(0x00104000, "UT", b"\xff" * (MAX_METADATA_BYTES - 12)))


def texts_of_escapes() -> bytes:
    character_set = short_element(0x00080005, "CS", b"\\ISO 2022 IR 87\\ISO 2022 IR 159 ")
    text = b"\x1b$B!!\x1b(B!" * (MAX_VALUES // 2 - 10)
    return part10(EXPLICIT, character_set + long_element(0x00104000, "UT", text))


def many_values(tag: int, value: bytes) -> Callable[[], bytes]:
    """Return a maker of the maximum number of data elements with the maximum number of values.

    Implicit VR gives each data element a 32-bit length, and the data dictionary gives the VR of
    `tag`. Each data element is in an Item of its own, because a tag occurs once in a data set.
    """

    def make() -> bytes:
        element = implicit(tag, value * (MAX_VALUES // 2 - 1))
        items = implicit(ITEM, element) * (MAX_METADATA_BYTES // (len(element) + 8))
        return part10(IMPLICIT, implicit(0x00081140, items))

    return make


def deflate_bomb() -> bytes:
    dataset = long_element(0x7FE00010, "OW", bytes(255 << 20))
    return deflated(dataset)


def deflate_bomb_over_the_limit() -> bytes:
    return deflated(bytes(300 << 20))


def deflated_values() -> bytes:
    room = MAX_METADATA_BYTES - 100
    values = b"1\\" * (MAX_VALUES // 2 - 1)
    element = bare(ITEM, len(values) + 12) + long_element(0x00091001, "UC", values)
    return deflated(long_element(0x00081140, "SQ", element * (room // len(element))))


WORST: dict[str, Callable[[], bytes]] = {
    "deflate bomb under the limit": deflate_bomb,
    "deflate bomb over the limit": deflate_bomb_over_the_limit,
    "maximum nesting": lambda: nested(MAX_NESTED_SEQUENCES),
    "nesting of 100,000 sequences": lambda: nested(100_000),
    "maximum elements described": lambda: many_private_elements(MAX_ELEMENTS),
    "maximum elements checked": lambda: many_private_elements(MAX_CHECKED_ELEMENTS),
    "maximum items described": lambda: many_items(MAX_ELEMENTS),
    "maximum items checked": lambda: many_items(MAX_CHECKED_ELEMENTS),
    "maximum sequences checked": many_sequences,
    "ambiguous nested items": ambiguous_items,
    "ambiguous small items": small_ambiguous_items,
    "private sequences": private_sequences,
    "private creators": private_creators,
    "fragments in ambiguous items": fragments_in_ambiguous_items,
    "ranges to leave out": ranges_to_leave_out,
    "items without a delimiter": many_items_without_end,
    "maximum fragments": fragments,
    "one text of the maximum size": one_text,
    "a text of escape sequences": texts_of_escapes,
    "millions of texts, LO": many_values(0x00081030, b"a\\"),
    "millions of empty texts, LO": many_values(0x00081030, b"\\"),
    "millions of names, PN": many_values(0x00101001, b"a\\"),
    "millions of numbers, US": many_values(0x00280010, b"\1\2"),
    "millions of numbers, FD": many_values(0x00189073, b"\1\2\3\4\5\6\7\x38"),
    "millions of different floats, FL": different_floats(0x3F800000),
    "millions of the smallest floats": different_floats(1),
    "text with one wide character": wide_text,
    "millions of decimals, DS": many_values(0x00280030, b"1.5\\"),
    "millions of integers, IS": many_values(0x00200013, b"1\\"),
    "millions of tags, AT": many_values(0x00280009, b"\1\2\3\4"),
    "deflated values": deflated_values,
}


def write(name: str, path: str) -> int:
    return Path(path).write_bytes(WORST[name]())


def _in_own_process(work: Callable[..., T], *arguments: str) -> T:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def cost(path: str) -> Cost:
    data = Path(path).read_bytes()
    before = peak_bytes()
    started = time.process_time()
    try:
        left_out = check_structure(data).left_out
        outcome = "accepted"
    except InstanceRefused:
        left_out, outcome = NOTHING_LEFT_OUT, "refused"
    checked = time.process_time()
    check_bytes = peak_bytes() - before
    if outcome == "accepted":
        described(data, left_out)
    sidecar_bytes = peak_bytes() - before
    return Cost(
        outcome, checked - started, check_bytes, time.process_time() - checked, sidecar_bytes
    )


def main() -> int:
    is_over = False
    print(f"{'file':<35}{'MiB':>7}{'':>10}{'check s':>9}{'MiB':>6}{'sidecar s':>11}{'MiB':>6}")
    for name in WORST:
        with tempfile.NamedTemporaryFile() as file:
            # Two processes, because a child process inherits the peak memory of its parent.
            size_bytes = _in_own_process(write, name, file.name)
            found = _in_own_process(cost, file.name)
        over = (
            found.check_bytes > MAX_CHECK_MEMORY_BYTES
            or found.sidecar_bytes > MAX_SIDECAR_MEMORY_BYTES
            or found.check_seconds + found.sidecar_seconds > MAX_SECONDS
        )
        is_over = is_over or over
        print(
            f"{name:<35}{size_bytes / 2**20:>7.1f}{found.outcome:>10}{found.check_seconds:>9.2f}"
            f"{found.check_bytes >> 20:>6}{found.sidecar_seconds:>11.2f}"
            f"{found.sidecar_bytes >> 20:>6}{'  OVER THE LIMIT' if over else ''}",
            flush=True,
        )
    return 1 if is_over else 0


if __name__ == "__main__":
    sys.exit(main())
