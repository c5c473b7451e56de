"""Comparison of the structure check with pydicom, on every file of its test data packages."""

import contextlib
import warnings
from pathlib import Path

import pydicom
import pytest
from package_files import DISAGREEMENTS, FILES
from pydicom.errors import InvalidDicomError

from shared.dicom.identity import identify
from shared.dicom.refusal import AttributesMissing, InstanceRefused, NotUnderstood
from shared.dicom.structure import check_structure

_KEYWORDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


def _by_pydicom(path: Path) -> tuple[str, ...] | None:
    """Return the four UIDs that pydicom reads, "" if missing; None if it refuses the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns about invalid files
        try:
            ds = pydicom.dcmread(path)
        except InvalidDicomError:
            return None
        with contextlib.suppress(ValueError):  # an invalid value does not matter here
            for _ in ds.iterall():
                pass
        return tuple(str(ds.get(keyword, "")) for keyword in _KEYWORDS)


def _by_us(path: Path) -> tuple[str, ...]:
    identity = identify(check_structure(path.read_bytes()))
    return (
        identity.sop_class_uid,
        identity.sop_instance_uid,
        identity.study_uid,
        identity.series_uid,
    )


@pytest.mark.parametrize("name", FILES)
def test_the_check_and_pydicom_agree_unless_the_file_is_listed_with_a_reason(
    name: str,
) -> None:
    theirs = _by_pydicom(FILES[name])
    if name in DISAGREEMENTS:
        assert theirs is not None
        with pytest.raises(NotUnderstood) as refused:
            _by_us(FILES[name])
        assert DISAGREEMENTS[name] in str(refused.value)
    elif theirs is None:
        with pytest.raises(InstanceRefused):
            _by_us(FILES[name])
    elif "" in theirs:  # a DICOMDIR or a palette: valid, but not a composite instance
        check_structure(FILES[name].read_bytes())
        missing = [keyword for keyword, uid in zip(_KEYWORDS, theirs, strict=True) if not uid]
        with pytest.raises(AttributesMissing) as unnamed:
            _by_us(FILES[name])
        assert all(keyword in str(unnamed.value) for keyword in missing)
    else:
        assert _by_us(FILES[name]) == theirs


def test_all_package_files_are_checked_and_every_listed_one_exists() -> None:
    assert len(FILES) >= 250
    assert DISAGREEMENTS.keys() <= FILES.keys()
