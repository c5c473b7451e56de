"""The structure check: proof that a Part 10 file is whole, before anything else reads it.

pydicom takes a truncated file for a shorter one and recurses into nested sequences. So every part
that arrives is first walked here: iteratively, within limits, copying no values, following each
length to the end of the file (PS3.10 7.1, PS3.5 7). The metadata sidecar is made by the same walk,
so whatever was accepted can also be described.

One cut no walk can see: exactly between two top-level data elements, which leaves a whole, shorter
data set. The length or the closing delimiter of the request guards against that one.
"""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from shared.dicom.header import dictionary_vr, tag_name
from shared.dicom.left_out import NOTHING_LEFT_OUT, LeftOut, Range, add_range, is_bulk, left_out
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

# What readers look at before all else, and fail on as a whole when it is encoded wrongly.
_READ_FIRST = WANTED_UIDS | {SPECIFIC_CHARACTER_SET}
_TOLD = WANTED_VALUES | _READ_FIRST
# PS3.5 Table 6.2-1: a CS has up to 16 bytes, so this is some sixty character sets.
_CHARACTER_SETS_MAX_BYTES = 1024


@dataclass(frozen=True)
class Structure:
    """What the check learnt on its way through a whole file.

    `values` holds the raw values of the elements that identity and modality are read from, by tag,
    each at most `KEPT_VALUE_BYTES` long. `left_out` is what the metadata sidecar has no use for.
    """

    transfer_syntax_uid: str
    values: Mapping[int, bytes]
    left_out: LeftOut = NOTHING_LEFT_OUT


def check_structure(
    data: Buffer,
    scratch: Scratch = tempfile.TemporaryFile,
    limits: StructureLimits = DEFAULT,
) -> Structure:
    """Walk one Part 10 file from its first byte to its last.

    Time is linear in the number of elements and memory constant: `data` may map a file of any size.
    A deflated data set is inflated into the file that `scratch` opens. That file needs a descriptor
    and is closed again.

    Raises `NotUnderstood` for what is not whole, malformed, or nested too deep, `TooMuchToCheck`
    for what is over another limit of `limits.py`, and `TransferSyntaxNotAccepted`.
    """
    values: dict[int, bytes] = {}
    try:
        with open_dataset(data, values, scratch) as dataset:
            not_described = _collect(dataset, values, limits)
    except InstanceRefused as refused:
        of_dataset = sop_uids(values, SOP_CLASS_UID, SOP_INSTANCE_UID)
        # The walk may have ended before these; PS3.10 7.1 has them ahead of the data set as well.
        refused.sop_class_uid, refused.sop_instance_uid = (
            of_dataset
            if of_dataset[0]
            else sop_uids(values, MEDIA_STORAGE_SOP_CLASS_UID, MEDIA_STORAGE_SOP_INSTANCE_UID)
        )
        raise
    return Structure(dataset.transfer_syntax_uid, values, not_described)


def _no_scratch() -> BinaryIO:
    raise NotUnderstood("what is deflated is looked at once it is whole")


def first_structure(data: Buffer, last_tag: int) -> Structure | None:
    """What `check_structure` will learn of `values`, of a file that begins with this.

    Up to the element `last_tag`, as far as can be told before the rest is there: to be held against
    what the check says then. None where the beginning is too short, malformed, or deflated.
    """
    values: dict[int, bytes] = {}
    with (
        suppress(InstanceRefused),
        open_dataset(data, values, _no_scratch) as dataset,
    ):
        for step in Walk(dataset, DEFAULT, is_whole=False).steps(_TOLD):
            if step.depth or step.kind is not StepKind.ELEMENT:
                continue
            if step.tag in WANTED_VALUES:
                keep_value(values, step.tag, dataset.view, step.value_start, step.value_end)
            if step.tag >= last_tag:
                return Structure(dataset.transfer_syntax_uid, values)
    return None


def _check_read_first(step: Step, view: memoryview) -> None:
    """Refuse what other readers would fail on as a whole, or take for another instance."""
    if step.depth and step.tag != SPECIFIC_CHARACTER_SET:
        return
    vr = dictionary_vr(step.tag)
    if step.vr != vr:
        raise NotUnderstood(f"{tag_name(step.tag)} has the VR {step.vr}, and must have {vr}")
    if step.tag == SPECIFIC_CHARACTER_SET:
        value = bytes(
            view[
                step.value_start : min(step.value_end, step.value_start + _CHARACTER_SETS_MAX_BYTES)
            ]
        )
        if len(value) == _CHARACTER_SETS_MAX_BYTES or b"\0" in value.rstrip(b"\0 "):
            raise NotUnderstood(f"{tag_name(step.tag)} at byte {step.start} names no character set")


def _collect(dataset: EncodedDataset, values: dict[int, bytes], limits: StructureLimits) -> LeftOut:
    """Walk to the end, add the wanted values to `values`, and return what is not described."""
    bulk_ranges: list[Range] = []
    walk = Walk(dataset, limits)
    step = None
    for step in walk.steps(_TOLD):
        if step.tag in _READ_FIRST:
            _check_read_first(step, dataset.view)
        if step.depth or step.kind is not StepKind.ELEMENT:
            continue
        if step.tag in WANTED_VALUES:
            keep_value(values, step.tag, dataset.view, step.value_start, step.value_end)
        elif is_bulk(step.vr, step.end - step.start):
            add_range(bulk_ranges, step.start, step.end)
    if step is None and only_zeros_follow(dataset.view, dataset.start):
        raise NotUnderstood("the file ends with its file meta information: it has no data set")
    return left_out(dataset, walk, bulk_ranges, limits)
