"""The structure check held against pydicom, over every file of its test data packages."""

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
    """The four UIDs as it reads them, "" for each that is missing; None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd files
        try:
            ds = pydicom.dcmread(path)
        except InvalidDicomError:
            return None
        with contextlib.suppress(ValueError):  # of a value, which is not what is asked here
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
def test_the_check_and_pydicom_agree_on_a_file_unless_it_is_listed_with_the_reason(
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
    elif "" in theirs:  # a DICOMDIR, a palette: whole, but no composite instance
        check_structure(FILES[name].read_bytes())
        missing = [keyword for keyword, uid in zip(_KEYWORDS, theirs, strict=True) if not uid]
        with pytest.raises(AttributesMissing) as unnamed:
            _by_us(FILES[name])
        assert all(keyword in str(unnamed.value) for keyword in missing)
    else:
        assert _by_us(FILES[name]) == theirs


def test_every_file_of_the_packages_is_looked_at_and_every_listed_one_exists() -> None:
    assert len(FILES) >= 250
    assert DISAGREEMENTS.keys() <= FILES.keys()
