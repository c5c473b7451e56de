"""Data that the metadata sidecar omits: bulk values, and data elements that are too large.

The API determines it, as it has the complete file at hand. The worker does not read it at all.
"""

from dataclasses import dataclass

from shared.dicom.limits import MAX_LEFT_OUT, MAX_WITHOUT_VALUE, StructureLimits
from shared.dicom.part10 import EncodedDataset
from shared.dicom.walk import Step, StepKind, Walk

BULK_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
"""The metadata sidecar omits top-level data elements of these VRs."""

MAX_SMALL_ELEMENT_BYTES = 4096
"""A small data element, header included, does not get a byte range of its own."""

Range = tuple[int, int]


@dataclass(frozen=True)
class LeftOut:
    """List what the sidecar of one instance omits.

    `ranges` are (start, end) byte ranges of complete top-level data elements, ascending and
    disjoint. They count from the start of the file or, if `is_inflated`, of the inflated data set.
    `without_value` are pairs of tag (eight upper-case hex digits) and VR: data elements within the
    ranges that the sidecar lists without a value. `is_explicit` is the detected encoding if it is
    not the declared one: the remaining data elements alone may look different.
    """

    ranges: tuple[Range, ...] = ()
    without_value: tuple[tuple[str, str], ...] = ()
    is_inflated: bool = False
    is_explicit: bool | None = None


NOTHING_LEFT_OUT = LeftOut()


def add_range(ranges: list[Range], start: int, end: int) -> None:
    """Append a byte range. `ranges` grows to one more than `MAX_LEFT_OUT`, which marks overflow."""
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], end)
    elif len(ranges) <= MAX_LEFT_OUT:
        ranges.append((start, end))


def is_bulk(vr: str, size_bytes: int) -> bool:
    """Return whether to omit a top-level data element of `size_bytes`, header included."""
    return vr in BULK_VRS and size_bytes > MAX_SMALL_ELEMENT_BYTES


def extends(ranges: list[Range], vr: str, start: int) -> bool:
    """Return whether a small top-level data element at `start` continues the last range.

    The sidecar has no value of it anyway. In a range of its own, or between two, it would cost the
    worker another request to the object store.
    """
    return vr in BULK_VRS and bool(ranges) and ranges[-1][1] == start


def left_out(
    dataset: EncodedDataset, walk: Walk, bulk_ranges: list[Range], limits: StructureLimits
) -> LeftOut:
    """Determine what the sidecar omits of a data set that `walk` has read to its end."""
    size_bytes = len(dataset.view)
    ranges = [] if walk.has_missing_vr else bulk_ranges
    if ranges and ranges[-1][1] == walk.position < size_bytes:
        ranges[-1] = (ranges[-1][0], size_bytes)  # zeros behind the data set
    without_value: tuple[tuple[str, str], ...] = ()
    kept_bytes = size_bytes - sum(end - start for start, end in ranges)
    if (
        kept_bytes > limits.max_metadata_bytes
        or walk.element_count > limits.max_elements
        or len(ranges) > MAX_LEFT_OUT
    ):
        if walk.has_missing_vr:
            ranges = [(dataset.start, size_bytes)]
        else:
            ranges, without_value = _too_large(dataset, walk.is_explicit, limits)
    return LeftOut(tuple(ranges), without_value, dataset.is_inflated, walk.is_explicit)


def _too_large(
    dataset: EncodedDataset, is_explicit: bool | None, limits: StructureLimits
) -> tuple[list[Range], tuple[tuple[str, str], ...]]:
    """Return the ranges that exceed `limits`, and the tags and VRs that the record has room for.

    Each top-level data element is described if it fits into what the earlier ones left. A tenth is
    reserved for small public data elements: they name the patient and the study, and determine how
    to read the others.
    """
    ranges: list[Range] = []
    without_value: list[tuple[str, str]] = []
    bytes_left = limits.max_metadata_bytes - (0 if dataset.is_inflated else dataset.start)
    elements_left = limits.max_elements
    reserved_bytes, reserved_elements = limits.max_metadata_bytes // 10, limits.max_elements // 10
    walk = Walk(dataset, limits, is_explicit=is_explicit)
    while len(ranges) < MAX_LEFT_OUT:
        start, count = walk.position, walk.element_count
        step = walk.step()
        if step is None:
            break
        if step.kind is StepKind.SEQUENCE:
            walk.skip_sequence()
        size_bytes, elements = walk.position - start, walk.element_count - count
        if not is_bulk(step.vr, size_bytes):
            is_small = _is_small_and_public(step, size_bytes)
            if size_bytes <= bytes_left - (0 if is_small else reserved_bytes) and (
                elements <= elements_left - (0 if is_small else reserved_elements)
            ):
                bytes_left -= size_bytes
                elements_left -= elements
                continue
            if (
                len(without_value) < MAX_WITHOUT_VALUE
                and step.vr not in BULK_VRS
                and step.tag & 0xFFFF  # the sidecar never contains a Group Length
            ):
                without_value.append((f"{step.tag:08X}", step.vr))
        add_range(ranges, start, walk.position)
    # The rest is padding, or the record has no room for it.
    if len(dataset.view) > walk.position:
        add_range(ranges, walk.position, len(dataset.view))
    return ranges, tuple(without_value)


def _is_small_and_public(step: Step, size_bytes: int) -> bool:
    return (
        step.kind is StepKind.ELEMENT
        and not step.tag & 0x10000
        and size_bytes <= MAX_SMALL_ELEMENT_BYTES
    )
