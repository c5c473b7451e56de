from pathlib import Path

import pydicom
import pytest

from shared.dicom.identity import Identity, identify
from shared.dicom.refusal import AttributesMissing, NotUnderstood
from shared.dicom.structure import Structure, check_structure
from shared.dicom.uids import (
    SERIES_INSTANCE_UID,
    SOP_CLASS_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    is_uid,
)

TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
KEYWORDS = {
    SOP_CLASS_UID: "SOPClassUID (0008,0016)",
    SOP_INSTANCE_UID: "SOPInstanceUID (0008,0018)",
    STUDY_INSTANCE_UID: "StudyInstanceUID (0020,000D)",
    SERIES_INSTANCE_UID: "SeriesInstanceUID (0020,000E)",
}
VALID = {
    SOP_CLASS_UID: b"1.2.3\0",
    SOP_INSTANCE_UID: b"1.2.4\0",
    STUDY_INSTANCE_UID: b"1.2.5\0",
    SERIES_INSTANCE_UID: b"1.2.6\0",
}


def structure_with(values: dict[int, bytes]) -> Structure:
    return Structure("1.2.840.10008.1.2", values)


@pytest.mark.parametrize("text", ["0", "1.2.840.10008.1.2", "1.02.003", "9" * 64])
def test_digits_separated_by_dots_are_a_uid(text: str) -> None:
    assert is_uid(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "1.", ".1", "1..2", "..", "1.a", "-1.2", "1/2", "1.2\\1.3"),
        *("1.2 ", " 1.2", "1.2\n", "1.2\0", "\u0661.2", "9" * 65),
    ],
)
def test_any_other_text_is_not_a_uid(text: str) -> None:
    assert not is_uid(text)


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm"]
)
def test_a_real_file_has_the_identity_that_pydicom_reads(name: str) -> None:
    ds = pydicom.dcmread(TEST_FILES / name)
    identity = identify(check_structure((TEST_FILES / name).read_bytes()))
    assert identity == Identity(
        sop_class_uid=ds.SOPClassUID,
        sop_instance_uid=ds.SOPInstanceUID,
        study_uid=ds.StudyInstanceUID,
        series_uid=ds.SeriesInstanceUID,
        transfer_syntax_uid=ds.file_meta.TransferSyntaxUID,
    )


@pytest.mark.parametrize("padding", [b"", b"\0", b" ", b"\0 \0 "])
def test_padding_is_not_part_of_a_uid(padding: bytes) -> None:
    identity = identify(structure_with(VALID | {STUDY_INSTANCE_UID: b"1.002.5" + padding}))
    assert identity.study_uid == "1.002.5"


@pytest.mark.parametrize("tag", KEYWORDS)
@pytest.mark.parametrize("value", [None, b"", b"\0", b"  "])
def test_a_missing_or_empty_uid_is_named(tag: int, value: bytes | None) -> None:
    values = {other: uid for other, uid in VALID.items() if other != tag}
    if value is not None:
        values[tag] = value
    with pytest.raises(AttributesMissing) as refused:
        identify(structure_with(values))
    assert str(refused.value) == f"missing or empty: {KEYWORDS[tag]}"


def test_all_missing_uids_are_named() -> None:
    with pytest.raises(AttributesMissing) as refused:
        identify(structure_with({}))
    assert all(keyword in str(refused.value) for keyword in KEYWORDS.values())
    assert (refused.value.sop_class_uid, refused.value.sop_instance_uid) == (None, None)


@pytest.mark.parametrize("tag", KEYWORDS)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"1." * 40 + b"1", "has more than 64 characters"),
        (b"1" * 1024, "has more than 64 characters"),
        (b"../../etc/passwd", "is not a valid UID: it must be numbers separated by dots"),
        (b"1.2.\xff", "is not a valid UID: it must be numbers separated by dots"),
        (b" 1.2", "is not a valid UID: it must be numbers separated by dots"),
        (b"1.2\\1.3", "has several values; only one is allowed"),
    ],
)
def test_an_error_names_an_invalid_uid_but_no_value(tag: int, value: bytes, reason: str) -> None:
    with pytest.raises(NotUnderstood) as refused:
        identify(structure_with(VALID | {tag: value}))
    assert str(refused.value) == f"{KEYWORDS[tag]} {reason}"


def test_a_refusal_has_the_sop_uids_if_both_are_valid() -> None:
    with pytest.raises(AttributesMissing) as missing:
        identify(structure_with(VALID | {STUDY_INSTANCE_UID: b""}))
    assert (missing.value.sop_class_uid, missing.value.sop_instance_uid) == ("1.2.3", "1.2.4")

    with pytest.raises(NotUnderstood) as invalid:
        identify(structure_with(VALID | {SERIES_INSTANCE_UID: b"x"}))
    assert (invalid.value.sop_class_uid, invalid.value.sop_instance_uid) == ("1.2.3", "1.2.4")

    with pytest.raises(NotUnderstood) as half:
        identify(structure_with(VALID | {SOP_INSTANCE_UID: b"x"}))
    assert (half.value.sop_class_uid, half.value.sop_instance_uid) == (None, None)
