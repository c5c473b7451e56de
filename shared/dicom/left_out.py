"""What the metadata sidecar leaves out of a data set: bulk values, and what is too large.

The worker does not even read it. The API finds it out, as it has all of the file at hand.
"""

from typing import NamedTuple

from shared.dicom.limits import MAX_LEFT_OUT, MAX_WITHOUT_VALUE, StructureLimits
from shared.dicom.part10 import EncodedDataset
from shared.dicom.walk import StepKind, Walk

BULK_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
"""Top-level elements of these VRs are left out of the metadata sidecar."""

SMALLEST_LEFT_OUT_BYTES = 4096
"""An element of no more than this is not worth a range of its own."""

Range = tuple[int, int]


class LeftOut(NamedTuple):
    """`ranges` are (start, end) byte ranges over whole top-level elements, ascending and apart: the
    data set without them gives the same sidecar, but for the elements `without_value`. These are
    given by their VR alone, and are pairs of tag, in eight upper-case hex digits, and VR."""

    ranges: tuple[Range, ...] = ()
    without_value: tuple[tuple[str, str], ...] = ()


NOTHING_LEFT_OUT = LeftOut()


def add_range(ranges: list[Range], start: int, end: int) -> None:
    if ranges and ranges[-1][1] == start:
        start, _ = ranges.pop()
    ranges.append((start, end))


def is_bulk(vr: str, size_bytes: int) -> bool:
    """Whether a top-level element of that size, its header included, is a range to leave out."""
    return vr in BULK_VRS and size_bytes > SMALLEST_LEFT_OUT_BYTES


def left_out(dataset: EncodedDataset, limits: StructureLimits) -> LeftOut:
    """Find out what to leave out of a data set that the walk accepts as a whole.

    Each top-level element is described that fits into what the ones before it have left of
    `limits`. Of one that does not fit the VR is given, as far as the record has room for that.
    """
    ranges: list[Range] = []
    without_value: list[tuple[str, str]] = []
    bytes_left = limits.metadata_bytes - (0 if dataset.is_inflated else dataset.start)
    elements_left = limits.elements
    walk = Walk(dataset, limits)
    while len(ranges) < MAX_LEFT_OUT and bytes_left > 0 and elements_left > 0:
        start, count = walk.position, walk.element_count
        step = walk.step()
        if step is None:
            break
        if step.kind is StepKind.SEQUENCE:
            walk.skip_sequence()
        size_bytes, elements = walk.position - start, walk.element_count - count
        if not is_bulk(step.vr, size_bytes):
            if size_bytes <= bytes_left and elements <= elements_left:
                bytes_left -= size_bytes
                elements_left -= elements
                continue
            if len(without_value) < MAX_WITHOUT_VALUE and step.vr not in BULK_VRS:
                without_value.append((f"{step.tag:08X}", step.vr))
                elements_left -= 1
        add_range(ranges, start, walk.position)
    # Padding, or what there is no room for.
    if len(dataset.view) > walk.position:
        add_range(ranges, walk.position, len(dataset.view))
    return LeftOut(tuple(ranges), tuple(without_value))
