"""The UIDs that a file is encoded and identified by: what is one, and which elements hold them."""

import re
from collections.abc import Mapping

from shared.dicom.header import tag_name
from shared.dicom.limits import KEPT_VALUE_BYTES
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
"""The tags of the elements whose raw values the structure check keeps."""

# For whole texts, in a syntax that JSON Schema has too.
UID_MAX_CHARACTERS = 64
UID = r"[0-9]+(\.[0-9]+)*"
CODE_STRING = "[A-Z0-9_]([A-Z0-9_ ]{0,14}[A-Z0-9_])?"
_UID = re.compile(UID)


def is_uid(text: str) -> bool:
    """Whether `text` is a UID as we take it: PS3.5 9.1, but a component may begin with zeros."""
    return len(text) <= UID_MAX_CHARACTERS and _UID.fullmatch(text) is not None


def is_code_string(text: str) -> bool:
    """Whether `text` is one value of VR CS (PS3.5 6.2), without the spaces around it."""
    return re.fullmatch(CODE_STRING, text) is not None


def uid_text(value: bytes) -> str:
    """A UID without its padding: NUL by PS3.5 9.1, spaces by custom."""
    return value.rstrip(b"\0 ").decode("latin-1")


def keep_value(values: dict[int, bytes], tag: int, view: memoryview, start: int, end: int) -> None:
    """Add a wanted value to `values`. Raises `NotUnderstood` where another one is there."""
    value = bytes(view[start : min(end, start + KEPT_VALUE_BYTES)])
    # PS3.5 7.1: a tag occurs at most once. Files exist that repeat one of these unchanged; where it
    # changes, two readers would take the file for two different instances.
    if values.setdefault(tag, value) != value:
        raise NotUnderstood(f"{tag_name(tag)} occurs twice, and differs at byte {start}")


def sop_uids(
    values: Mapping[int, bytes], class_tag: int, instance_tag: int
) -> tuple[str, str] | tuple[None, None]:
    """The two UIDs that name an instance to its sender, when both are known and legal."""
    sop_class_uid = uid_text(values.get(class_tag, b""))
    sop_instance_uid = uid_text(values.get(instance_tag, b""))
    if is_uid(sop_class_uid) and is_uid(sop_instance_uid):
        return sop_class_uid, sop_instance_uid
    return None, None
