"""All files of the packages pydicom and pydicom-data, and why some of them are refused."""

from importlib.util import find_spec
from pathlib import Path

_NO_DICOM = {".dump", ".gz", ".icc", ".json", ".md", ".py", ".pyc", ".txt"}


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data"


FILES = {
    f"{package}/{path.relative_to(_folder(package)).as_posix()}": path
    for package in ("pydicom", "data_store")  # the second one is pydicom-data
    for path in sorted(_folder(package).rglob("*"))
    if path.is_file() and path.suffix not in _NO_DICOM and path.name != "README"
}

# Each with what pydicom makes of it, and why the check refuses it.
DISAGREEMENTS = {
    # pydicom gives the elements that came before the cut.
    "pydicom/test_files/MR_truncated.dcm": "the file has 8130 left",
    "pydicom/test_files/rtplan_truncated.dcm": "the file has 711 left",
    "pydicom/test_files/dicomdirtests/DICOMDIR-nooffset": "the file has 224 left",
    # pydicom gives no element at all, and says nothing: the end of the fragments is missing.
    "data_store/emri_small_jpeg_2k_lossless_too_short.dcm": "without its delimitation Item",
    # pydicom guesses; a receiver must not (PS3.10 7.1 has it required).
    "pydicom/test_files/meta_missing_tsyntax.dcm": "TransferSyntaxUID (0002,0010) is missing",
    # pydicom gives any text as a UID; this one has hexadecimal digests, which PS3.5 9.1 rules out.
    "data_store/bad_sequence.dcm": "is not a valid UID",
}
