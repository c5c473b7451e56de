"""Which instance a file holds: the UIDs that name it, and that keys are made of (PS3.3 C.12.1)."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.dicom.header import tag_name
from shared.dicom.refusal import AttributesMissing, NotUnderstood
from shared.dicom.structure import Structure
from shared.dicom.uids import (
    MODALITY,
    SERIES_INSTANCE_UID,
    SOP_CLASS_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    UID_MAX_CHARACTERS,
    is_code_string,
    is_uid,
    sop_uids,
    uid_text,
)

_KEYWORDS: Mapping[int, str] = {
    SOP_CLASS_UID: "SOPClassUID",
    SOP_INSTANCE_UID: "SOPInstanceUID",
    STUDY_INSTANCE_UID: "StudyInstanceUID",
    SERIES_INSTANCE_UID: "SeriesInstanceUID",
}


@dataclass(frozen=True)
class Identity:
    """Five legal UIDs: safe as parts of a key, a header or a log line."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    transfer_syntax_uid: str


def identify(structure: Structure) -> Identity:
    """Read the identity that every composite instance has.

    Raises `AttributesMissing` naming all that are missing or empty, and `NotUnderstood` for a value
    that is no UID. The value itself is never told: it could be anything.
    """
    uids = {tag: uid_text(structure.values.get(tag, b"")) for tag in _KEYWORDS}
    sop_class_uid, sop_instance_uid = sop_uids(structure.values, SOP_CLASS_UID, SOP_INSTANCE_UID)

    missing = [_name(tag) for tag, uid in uids.items() if not uid]
    if missing:
        raise AttributesMissing(
            f"missing or empty: {', '.join(missing)}", sop_class_uid, sop_instance_uid
        )
    illegal = [f"{_name(tag)} {_why_illegal(uid)}" for tag, uid in uids.items() if not is_uid(uid)]
    if illegal:
        raise NotUnderstood("; ".join(illegal), sop_class_uid, sop_instance_uid)
    return Identity(
        sop_class_uid=uids[SOP_CLASS_UID],
        sop_instance_uid=uids[SOP_INSTANCE_UID],
        study_uid=uids[STUDY_INSTANCE_UID],
        series_uid=uids[SERIES_INSTANCE_UID],
        transfer_syntax_uid=structure.transfer_syntax_uid,
    )


def modality(structure: Structure) -> str | None:
    """Modality (0008,0060), where it has one value that is legal; that may still be any text."""
    text = structure.values.get(MODALITY, b"").decode("latin-1").strip("\0 ")
    return text if is_code_string(text) else None


def _name(tag: int) -> str:
    return f"{_KEYWORDS[tag]} {tag_name(tag)}"


def _why_illegal(uid: str) -> str:
    if "\\" in uid:
        return "has several values, and may only have one"
    if len(uid) > UID_MAX_CHARACTERS:
        return f"has more than {UID_MAX_CHARACTERS} characters"
    return "is no UID: it must be numbers with dots between them"
