"""The structure check: verifies that a Part 10 file is complete, before anything else reads it.

pydicom reads a truncated file as a shorter one, and recurses into nested Sequences. So this check
reads every part first: iteratively, within limits, without copying values, and following each
length to the end of the file (PS3.10 7.1, PS3.5 7). The metadata sidecar is built by the same walk,
so every accepted instance can be described.

The check cannot detect truncation exactly between two top-level data elements: the rest is a
complete, shorter data set. The Content-Length or the closing delimiter of the request detects it.
"""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from shared.dicom.header import dictionary_vr, tag_name
from shared.dicom.left_out import (
    NOTHING_LEFT_OUT,
    LeftOut,
    Range,
    add_range,
    extends,
    is_bulk,
    left_out,
)
from shared.dicom.limits import DEFAULT, StructureLimits
from shared.dicom.part10 import (
    Buffer,
    EncodedDataset,
    Scratch,
    only_zeros_follow,
    open_dataset,
)
from shared.dicom.refusal import InstanceRefused, NotUnderstood
from shared.dicom.uids import (
    MEDIA_STORAGE_SOP_CLASS_UID,
    MEDIA_STORAGE_SOP_INSTANCE_UID,
    SOP_CLASS_UID,
    SOP_INSTANCE_UID,
    SPECIFIC_CHARACTER_SET,
    WANTED_UIDS,
    WANTED_VALUES,
    keep_value,
    sop_uids,
)
from shared.dicom.walk import Step, StepKind, Walk

# Readers use these data elements first. Wrongly encoded, they make the complete file unreadable.
_READ_FIRST = WANTED_UIDS | {SPECIFIC_CHARACTER_SET}
_NEEDED_TAGS = WANTED_VALUES | _READ_FIRST
# PS3.5 Table 6.2-1: a CS value has up to 16 bytes, so this is room for some sixty character sets.
_MAX_CHARACTER_SET_BYTES = 1024


@dataclass(frozen=True)
class Structure:
    """Hold the result of the check of a complete file.

    `values` maps tags to raw values, cut to `MAX_KEPT_VALUE_BYTES`, for `identify` and `modality`.
    `left_out` lists what the metadata sidecar omits.
    """

    transfer_syntax_uid: str
    values: Mapping[int, bytes]
    left_out: LeftOut = NOTHING_LEFT_OUT


def check_structure(
    data: Buffer,
    scratch: Scratch = tempfile.TemporaryFile,
    limits: StructureLimits = DEFAULT,
) -> Structure:
    """Check one Part 10 file from its first byte to its last.

    Time is linear in the number of data elements, and memory is constant: `data` may map a file of
    any size. A deflated data set is inflated into the file that `scratch` opens, which must have a
    file descriptor. The check closes that file.

    Raises:
        NotUnderstood: the file is truncated, malformed, or nested too deeply.
        CheckLimitExceeded: the file exceeds another limit of `limits.py`.
        TransferSyntaxNotSupported: the transfer syntax is not in the standard.
    """
    values: dict[int, bytes] = {}
    try:
        with open_dataset(data, values, scratch) as dataset:
            not_described = _collect(dataset, values, limits)
    except InstanceRefused as refused:
        of_dataset = sop_uids(values, SOP_CLASS_UID, SOP_INSTANCE_UID)
        # The walk may end before the SOP UIDs; the file meta information has them too (PS3.10 7.1).
        refused.sop_class_uid, refused.sop_instance_uid = (
            of_dataset
            if of_dataset[0]
            else sop_uids(values, MEDIA_STORAGE_SOP_CLASS_UID, MEDIA_STORAGE_SOP_INSTANCE_UID)
        )
        raise
    return Structure(dataset.transfer_syntax_uid, values, not_described)


def _no_scratch() -> BinaryIO:
    raise NotUnderstood("a deflated data set is read only when it is complete")


def first_structure(data: Buffer, last_tag: int) -> Structure | None:
    """Read the wanted values from the beginning of a file, while the rest still arrives.

    The result is provisional: compare it with that of `check_structure` for the complete file.

    Args:
        data: The first bytes of the file.
        last_tag: The tag to stop at.

    Returns:
        The values up to `last_tag`; None if `data` is too short, malformed, or deflated.
    """
    values: dict[int, bytes] = {}
    with (
        suppress(InstanceRefused),
        open_dataset(data, values, _no_scratch) as dataset,
    ):
        for step in Walk(dataset, DEFAULT, is_complete=False).steps(_NEEDED_TAGS):
            if step.depth or step.kind is not StepKind.ELEMENT:
                continue
            if step.tag in WANTED_VALUES:
                keep_value(values, step.tag, dataset.view, step.value_start, step.value_end)
            if step.tag >= last_tag:
                return Structure(dataset.transfer_syntax_uid, values)
    return None


def _check_read_first(step: Step, view: memoryview) -> None:
    """Refuse an encoding that makes other readers fail, or identify another instance."""
    if step.depth and step.tag != SPECIFIC_CHARACTER_SET:
        return
    vr = dictionary_vr(step.tag)
    if step.vr != vr:
        raise NotUnderstood(f"{tag_name(step.tag)} has the VR {step.vr} instead of {vr}")
    if step.tag == SPECIFIC_CHARACTER_SET:
        value = bytes(
            view[
                step.value_start : min(step.value_end, step.value_start + _MAX_CHARACTER_SET_BYTES)
            ]
        )
        if len(value) == _MAX_CHARACTER_SET_BYTES or b"\0" in value.rstrip(b"\0 "):
            raise NotUnderstood(
                f"{tag_name(step.tag)} at byte {step.start} is not a valid Specific Character Set"
            )


def _collect(dataset: EncodedDataset, values: dict[int, bytes], limits: StructureLimits) -> LeftOut:
    """Walk to the end, add the wanted values to `values`, and return what the sidecar omits."""
    bulk_ranges: list[Range] = []
    walk = Walk(dataset, limits)
    step = None
    for step in walk.steps(_NEEDED_TAGS):
        if step.tag in _READ_FIRST:
            _check_read_first(step, dataset.view)
        if step.depth or step.kind is not StepKind.ELEMENT:
            continue
        if step.tag in WANTED_VALUES:
            keep_value(values, step.tag, dataset.view, step.value_start, step.value_end)
        elif is_bulk(step.vr, step.end - step.start) or extends(bulk_ranges, step.vr, step.start):
            add_range(bulk_ranges, step.start, step.end)
    if step is None and only_zeros_follow(dataset.view, dataset.start):
        raise NotUnderstood("the file has no data set after its file meta information")
    return left_out(dataset, walk, bulk_ranges, limits)
