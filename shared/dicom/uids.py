"""UIDs: their syntax, and the data elements that identify an instance and its encoding."""

import re
from collections.abc import Mapping

from shared.dicom.header import tag_name
from shared.dicom.limits import MAX_KEPT_VALUE_BYTES
from shared.dicom.refusal import NotUnderstood

# PS3.6 6 and 7
MEDIA_STORAGE_SOP_CLASS_UID = 0x00020002
MEDIA_STORAGE_SOP_INSTANCE_UID = 0x00020003
TRANSFER_SYNTAX_UID = 0x00020010
SPECIFIC_CHARACTER_SET = 0x00080005
SOP_CLASS_UID = 0x00080016
SOP_INSTANCE_UID = 0x00080018
MODALITY = 0x00080060
STUDY_INSTANCE_UID = 0x0020000D
SERIES_INSTANCE_UID = 0x0020000E
WANTED_UIDS = frozenset(
    {
        MEDIA_STORAGE_SOP_CLASS_UID,
        MEDIA_STORAGE_SOP_INSTANCE_UID,
        TRANSFER_SYNTAX_UID,
        SOP_CLASS_UID,
        SOP_INSTANCE_UID,
        STUDY_INSTANCE_UID,
        SERIES_INSTANCE_UID,
    }
)
WANTED_VALUES = WANTED_UIDS | {MODALITY}
"""Tags of the data elements whose raw values the structure check keeps."""

# Patterns for complete strings, in a syntax that JSON Schema shares.
MAX_UID_CHARACTERS = 64
UID = r"[0-9]+(\.[0-9]+)*"
CODE_STRING = "[A-Z0-9_]([A-Z0-9_ ]{0,14}[A-Z0-9_])?"
_UID = re.compile(UID)


def is_uid(text: str) -> bool:
    """Return whether `text` is a UID (PS3.5 9.1). A component may begin with zeros."""
    return len(text) <= MAX_UID_CHARACTERS and _UID.fullmatch(text) is not None


def is_code_string(text: str) -> bool:
    """Return whether `text` is one value of VR CS (PS3.5 6.2), without padding."""
    return re.fullmatch(CODE_STRING, text) is not None


def uid_text(value: bytes) -> str:
    """Return a UID without its padding: NUL by PS3.5 9.1, spaces in practice."""
    return value.rstrip(b"\0 ").decode("latin-1")


def keep_value(values: dict[int, bytes], tag: int, view: memoryview, start: int, end: int) -> None:
    """Add the value of a wanted data element to `values`.

    Raises:
        NotUnderstood: `values` has a different value for this tag.
    """
    value = bytes(view[start : min(end, start + MAX_KEPT_VALUE_BYTES)])
    # PS3.5 7.1: a tag occurs at most once. Some files repeat one of these data elements unchanged.
    # If the value changes, two readers can identify two different instances.
    if values.setdefault(tag, value) != value:
        raise NotUnderstood(f"{tag_name(tag)} occurs twice; its value differs at byte {start}")


def sop_uids(
    values: Mapping[int, bytes], class_tag: int, instance_tag: int
) -> tuple[str, str] | tuple[None, None]:
    """Return SOP Class UID and SOP Instance UID if both are known and valid, else two None."""
    sop_class_uid = uid_text(values.get(class_tag, b""))
    sop_instance_uid = uid_text(values.get(instance_tag, b""))
    if is_uid(sop_class_uid) and is_uid(sop_instance_uid):
        return sop_class_uid, sop_instance_uid
    return None, None
