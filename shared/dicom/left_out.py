"""What the metadata sidecar leaves out of a data set: bulk values, and what is too large.

The worker does not even read it. The API finds it out, as it has all of the file at hand.
"""

from dataclasses import dataclass

from shared.dicom.limits import MAX_LEFT_OUT, MAX_WITHOUT_VALUE, StructureLimits
from shared.dicom.part10 import EncodedDataset
from shared.dicom.walk import Step, StepKind, Walk

BULK_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
"""Top-level elements of these VRs are left out of the metadata sidecar."""

SMALLEST_LEFT_OUT_BYTES = 4096
"""An element of no more than this is not worth a range of its own."""

Range = tuple[int, int]


@dataclass(frozen=True)
class LeftOut:
    """`ranges` are (start, end) byte ranges over whole top-level elements, ascending and apart: the
    data set without them gives the same sidecar, but for the elements `without_value`. These are
    given by their VR alone, and are pairs of tag, in eight upper-case hex digits, and VR.

    The ranges are those of the file, or, where `is_inflated`, of the data set once it is inflated.
    `is_explicit` says whether the data set has VRs, where that is not as declared: what is left of
    it may look otherwise.
    """

    ranges: tuple[Range, ...] = ()
    without_value: tuple[tuple[str, str], ...] = ()
    is_inflated: bool = False
    is_explicit: bool | None = None


NOTHING_LEFT_OUT = LeftOut()


def add_range(ranges: list[Range], start: int, end: int) -> None:
    """Ranges beyond what the record has room for are only counted by there being one too many."""
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], end)
    elif len(ranges) <= MAX_LEFT_OUT:
        ranges.append((start, end))


def is_bulk(vr: str, size_bytes: int) -> bool:
    """Whether a top-level element of that size, its header included, is a range to leave out."""
    return vr in BULK_VRS and size_bytes > SMALLEST_LEFT_OUT_BYTES


def left_out(
    dataset: EncodedDataset, walk: Walk, bulk_ranges: list[Range], limits: StructureLimits
) -> LeftOut:
    """Find out what to leave out of a data set, which `walk` has come to the end of."""
    size_bytes = len(dataset.view)
    ranges = [] if walk.has_missing_vr else bulk_ranges
    without_value: tuple[tuple[str, str], ...] = ()
    kept_bytes = size_bytes - sum(end - start for start, end in ranges)
    if (
        kept_bytes > limits.metadata_bytes
        or walk.element_count > limits.elements
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
    """What does not fit into `limits`, and the VRs of that, as far as the record has room.

    Each top-level element is described that fits into what the ones before it have left. A tenth
    is kept for the small elements of the standard, which name patient and study, and say how the
    rest is to be read.
    """
    ranges: list[Range] = []
    without_value: list[tuple[str, str]] = []
    bytes_left = limits.metadata_bytes - (0 if dataset.is_inflated else dataset.start)
    elements_left = limits.elements
    kept_bytes, kept_elements = limits.metadata_bytes // 10, limits.elements // 10
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
            if size_bytes <= bytes_left - (0 if is_small else kept_bytes) and (
                elements <= elements_left - (0 if is_small else kept_elements)
            ):
                bytes_left -= size_bytes
                elements_left -= elements
                continue
            if (
                len(without_value) < MAX_WITHOUT_VALUE
                and step.vr not in BULK_VRS
                and step.tag & 0xFFFF  # a group length is in no sidecar
            ):
                without_value.append((f"{step.tag:08X}", step.vr))
        add_range(ranges, start, walk.position)
    # Padding, or what the record has no room for.
    if len(dataset.view) > walk.position:
        add_range(ranges, walk.position, len(dataset.view))
    return ranges, tuple(without_value)


def _is_small_and_public(step: Step, size_bytes: int) -> bool:
    return (
        step.kind is StepKind.ELEMENT
        and not step.tag & 0x10000
        and size_bytes <= SMALLEST_LEFT_OUT_BYTES
    )
