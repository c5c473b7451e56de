"""The identity of an instance: the UIDs in its storage key (PS3.3 C.12.1)."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.dicom.header import tag_name
from shared.dicom.refusal import AttributesMissing, NotUnderstood
from shared.dicom.structure import Structure
from shared.dicom.uids import (
    MAX_UID_CHARACTERS,
    MODALITY,
    SERIES_INSTANCE_UID,
    SOP_CLASS_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
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
    """Identify an instance by five valid UIDs, safe in a key, a header or a log line."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    transfer_syntax_uid: str


def identify(structure: Structure) -> Identity:
    """Read the UIDs that every composite instance has.

    Raises:
        AttributesMissing: names every attribute that is missing or empty.
        NotUnderstood: names every value that is not a valid UID, but never contains the value,
            which could be any text.
    """
    uids = {tag: uid_text(structure.values.get(tag, b"")) for tag in _KEYWORDS}
    sop_class_uid, sop_instance_uid = sop_uids(structure.values, SOP_CLASS_UID, SOP_INSTANCE_UID)

    missing = [_name(tag) for tag, uid in uids.items() if not uid]
    if missing:
        raise AttributesMissing(
            f"missing or empty: {', '.join(missing)}", sop_class_uid, sop_instance_uid
        )
    invalid = [f"{_name(tag)} {_why_invalid(uid)}" for tag, uid in uids.items() if not is_uid(uid)]
    if invalid:
        raise NotUnderstood("; ".join(invalid), sop_class_uid, sop_instance_uid)
    return Identity(
        sop_class_uid=uids[SOP_CLASS_UID],
        sop_instance_uid=uids[SOP_INSTANCE_UID],
        study_uid=uids[STUDY_INSTANCE_UID],
        series_uid=uids[SERIES_INSTANCE_UID],
        transfer_syntax_uid=structure.transfer_syntax_uid,
    )


def modality(structure: Structure) -> str | None:
    """Return Modality (0008,0060) if it is one valid CS value, else None.

    The value need not be a Defined Term.
    """
    text = structure.values.get(MODALITY, b"").decode("latin-1").strip("\0 ")
    return text if is_code_string(text) else None


def _name(tag: int) -> str:
    return f"{_KEYWORDS[tag]} {tag_name(tag)}"


def _why_invalid(uid: str) -> str:
    if "\\" in uid:
        return "has several values; only one is allowed"
    if len(uid) > MAX_UID_CHARACTERS:
        return f"has more than {MAX_UID_CHARACTERS} characters"
    return "is not a valid UID: it must be numbers separated by dots"
