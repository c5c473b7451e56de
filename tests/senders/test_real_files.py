"""What real files look like: each kind is stored byte for byte as sent, and described beside it.

The kinds are named with the file that stands for each. Where the packages of pydicom have none, one
is made: an encapsulated PDF, private SOP classes, and transfer syntaxes too new or too rare.
"""

import json
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pydicom
import pytest
from instances import multipart, new_instance
from package_files import DISAGREEMENTS, FILES
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from service import Service

from shared.dicom.uids import is_uid

STUDIES = "/dicomweb/studies"
PDF = b"%PDF-1.4\n%%EOF\n"
SIEMENS_CSA_NON_IMAGE, PHILIPS_PRIVATE_CX = "1.3.12.2.1107.5.9.1", "1.3.46.670589.2.4.1.1"


def _stored(stowgate: Service, payload_id: str) -> dict[bytes, dict[str, Any]]:
    """The sidecar of each object of a payload whose request is opened."""
    stowgate.opened(payload_id, seconds=60)
    folder = stowgate.data / "monaideploy" / payload_id
    return {
        path.read_bytes(): json.loads(path.with_name(f"{path.name}.json").read_bytes())
        for path in folder.rglob("*.dcm")
    }


def _sent(stowgate: Service, instance: bytes) -> dict[str, Any]:
    """The sidecar of an instance that was stored as it was sent."""
    answer = stowgate.post(STUDIES, *multipart(instance))
    assert answer.status_code == 200, answer.text
    stored = _stored(stowgate, answer.headers["X-Payload-ID"])
    assert stored.keys() == {instance}
    return stored[instance]


# Every file of the packages


def _is_storable(name: str) -> bool:
    """As pydicom sees it: a composite instance with all its UIDs."""
    if name in DISAGREEMENTS:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd files
        try:
            ds = pydicom.dcmread(FILES[name], stop_before_pixels=True)
        except pydicom.errors.InvalidDicomError:
            return False
        keywords = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
        return all(is_uid(str(ds.get(keyword, ""))) for keyword in keywords)


def _without_repetition(names: list[str]) -> list[list[str]]:
    """Groups in which no SOP Instance UID comes twice; many files of the packages share theirs."""
    groups: list[dict[str, str]] = []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sop_instance_uid = pydicom.dcmread(FILES[name], stop_before_pixels=True).SOPInstanceUID
        for group in groups:
            if sop_instance_uid not in group:
                break
        else:
            groups.append(group := {})
        group[sop_instance_uid] = name
    return [list(group.values()) for group in groups]


def test_every_file_of_the_packages_is_stored_byte_for_byte_and_has_a_sidecar(
    stowgate: Service,
) -> None:
    names = [name for name in FILES if _is_storable(name)]
    assert len(names) >= 200

    for group in _without_repetition(names):
        files = {FILES[name].read_bytes(): name for name in group}

        answer = stowgate.post(STUDIES, *multipart(*files))

        assert answer.status_code == 200, answer.text
        stored = _stored(stowgate, answer.headers["X-Payload-ID"])
        assert {name for file, name in files.items() if file not in stored} == set()
        assert len(stored) == len(files)


def test_a_file_that_is_not_an_instance_fails_alone_with_a_reason(stowgate: Service) -> None:
    names = [name for name in FILES if not _is_storable(name)]
    good = new_instance()

    answer = stowgate.post(STUDIES, *multipart(good, *(FILES[n].read_bytes() for n in names)))

    assert answer.status_code == 202
    assert len(answer.json()["00081199"]["Value"]) == 1
    failed = [
        item for tag in ("00081198", "0008119A") for item in answer.json().get(tag, {})["Value"]
    ]
    assert len(failed) == len(names)
    assert all(item["00091001"]["Value"][0].startswith("part ") for item in failed)


# The kinds


def _encapsulated_pdf() -> bytes:
    return new_instance(
        SOPClassUID=uid.EncapsulatedPDFStorage,
        Modality="DOC",
        MIMETypeOfEncapsulatedDocument="application/pdf",
        EncapsulatedDocument=PDF,
        EncapsulatedDocumentLength=len(PDF),
        PixelData=None,
    )


def _private(sop_class_uid: str) -> bytes:
    return new_instance(SOPClassUID=sop_class_uid)


def _packaged(name: str) -> Callable[[], bytes]:
    return lambda: FILES[name].read_bytes()


def _syntax(name: str, expected: uid.UID) -> Any:
    return pytest.param(_packaged(f"pydicom/test_files/{name}"), expected, {}, id=expected.name)


def _kind(kind: str, make: Callable[[], bytes], **shown: object) -> Any:
    """`shown`: the first value of elements of the sidecar, by keyword; `...` for any."""
    return pytest.param(make, None, shown, id=kind)


KINDS = [
    _syntax("MR_small_implicit.dcm", uid.ImplicitVRLittleEndian),
    _syntax("CT_small.dcm", uid.ExplicitVRLittleEndian),
    _syntax("MR_small_bigendian.dcm", uid.ExplicitVRBigEndian),
    _syntax("image_dfl.dcm", uid.DeflatedExplicitVRLittleEndian),
    _syntax("SC_rgb_jpeg_dcmtk.dcm", uid.JPEGBaseline8Bit),
    _syntax("JPGExtended.dcm", uid.JPEGExtended12Bit),
    _syntax("SC_rgb_jpeg_gdcm.dcm", uid.JPEGLosslessSV1),
    _syntax("MR_small_jpeg_ls_lossless.dcm", uid.JPEGLSLossless),
    pytest.param(
        lambda: new_instance(
            "JPEGLSNearLossless_16.dcm", StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.4"
        ),
        uid.JPEGLSNearLossless,
        {},
        id=f"{uid.JPEGLSNearLossless.name}, with the UIDs that it lacks",
    ),
    _syntax("MR_small_jp2klossless.dcm", uid.JPEG2000Lossless),
    _syntax("JPEG2000.dcm", uid.JPEG2000),
    _syntax("MR_small_RLE.dcm", uid.RLELossless),
    _kind(
        "multi-frame, compressed",
        _packaged("pydicom/test_files/examples_ybr_color.dcm"),
        NumberOfFrames=30,
    ),
    _kind("multi-frame", _packaged("pydicom/test_files/rtdose.dcm"), NumberOfFrames=15),
    _kind(
        "enhanced multi-frame, big endian",
        _packaged("data_store/emri_small_big_endian.dcm"),
        NumberOfFrames=10,
    ),
    _kind(
        "enhanced multi-frame",
        _packaged("data_store/eCT_Supplemental.dcm"),
        NumberOfFrames=2,
        PerFrameFunctionalGroupsSequence=...,
    ),
    _kind(
        "structured report",
        _packaged("pydicom/test_files/test-SR.dcm"),
        Modality="SR",
        ContentSequence=...,
    ),
    _kind(
        "segmentation",
        _packaged("pydicom/test_files/liver_1frame.dcm"),
        Modality="SEG",
        SegmentSequence=...,
    ),
    _kind(
        "waveform",
        _packaged("pydicom/test_files/waveform_ecg.dcm"),
        Modality="ECG",
        WaveformSequence=...,
    ),
    _kind("RT plan", _packaged("pydicom/test_files/rtplan.dcm"), Modality="RTPLAN"),
    _kind(
        "encapsulated PDF, made",
        _encapsulated_pdf,
        Modality="DOC",
        MIMETypeOfEncapsulatedDocument="application/pdf",
    ),
    _kind(
        "private SOP class of Siemens, made",
        lambda: _private(SIEMENS_CSA_NON_IMAGE),
        SOPClassUID=SIEMENS_CSA_NON_IMAGE,
    ),
    _kind(
        "private SOP class of Philips, made",
        lambda: _private(PHILIPS_PRIVATE_CX),
        SOPClassUID=PHILIPS_PRIVATE_CX,
    ),
]


@pytest.mark.parametrize(("make", "syntax", "shown"), KINDS)
def test_an_instance_of_each_kind_is_stored_byte_for_byte_and_described(
    stowgate: Service, make: Callable[[], bytes], syntax: uid.UID | None, shown: dict[str, object]
) -> None:
    instance = make()
    ds = pydicom.dcmread(BytesIO(instance), stop_before_pixels=True)
    assert syntax in (None, ds.file_meta.TransferSyntaxUID)

    sidecar = _sent(stowgate, instance)

    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        assert _first(sidecar, keyword) == str(ds[keyword].value)
    for keyword, value in shown.items():
        assert value in (..., _first(sidecar, keyword))
    assert "PixelData" not in {pydicom.datadict.keyword_for_tag(tag) for tag in sidecar}


def _first(sidecar: dict[str, Any], keyword: str) -> Any:
    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert tag is not None
    return sidecar[f"{tag:08X}"]["Value"][0]


def _encapsulated(syntax: uid.UID) -> bytes:
    """An instance that says it is of that syntax; nothing here looks into a frame."""
    ds = pydicom.dcmread(BytesIO(new_instance()))
    ds.PixelData = encapsulate([b"\xff\xd8 one frame \r\n--", b"and another \n"])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.NumberOfFrames = 2
    ds.file_meta.TransferSyntaxUID = syntax
    file = BytesIO()
    ds.save_as(file)
    data = file.getvalue()
    if syntax != uid.JPIPHTJ2KReferencedDeflate:
        return data
    start = 144 + int.from_bytes(data[140:144], "little")  # behind the group length, PS3.10 7.1
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return data[:start] + deflater.compress(data[start:]) + deflater.flush()


def test_every_encapsulated_transfer_syntax_is_stored_byte_for_byte(stowgate: Service) -> None:
    instances = {
        _encapsulated(syntax): syntax.name
        for syntax in uid.AllTransferSyntaxes
        if syntax.is_encapsulated
    }
    assert len(instances) > 30

    answer = stowgate.post(STUDIES, *multipart(*instances))

    assert answer.status_code == 200, answer.text
    assert _stored(stowgate, answer.headers["X-Payload-ID"]).keys() == instances.keys()


# Character sets


def _made(character_set: str | list[str], name: str) -> Callable[[], bytes]:
    return lambda: new_instance(SpecificCharacterSet=character_set, PatientName=name)


@pytest.mark.parametrize(
    ("make", "keyword", "expected"),
    [
        (
            _packaged("pydicom/charset_files/chrArab.dcm"),
            "PatientName",
            {"Alphabetic": "قباني^لنزار"},
        ),
        (
            _packaged("pydicom/charset_files/chrGreek.dcm"),
            "PatientName",
            {"Alphabetic": "Διονυσιος"},
        ),
        (
            _packaged("pydicom/charset_files/chrHbrw.dcm"),
            "PatientName",
            {"Alphabetic": "שרון^דבורה"},
        ),
        (
            _packaged("pydicom/charset_files/chrRuss.dcm"),
            "PatientName",
            {"Alphabetic": "Люкceмбypг"},
        ),
        (
            _packaged("pydicom/charset_files/chrH31.dcm"),
            "PatientName",
            {
                "Alphabetic": "Yamada^Tarou",
                "Ideographic": "山田^太郎",
                "Phonetic": "やまだ^たろう",
            },
        ),
        (
            _packaged("pydicom/charset_files/chrH32.dcm"),
            "PatientName",
            {"Alphabetic": "ﾔﾏﾀﾞ^ﾀﾛｳ", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"},
        ),
        (
            _packaged("pydicom/charset_files/chrJapMulti.dcm"),
            "PatientName",
            {"Alphabetic": "やまだ^たろう"},
        ),
        (
            _packaged("pydicom/charset_files/chrI2.dcm"),
            "PatientName",
            {"Alphabetic": "Hong^Gildong", "Ideographic": "洪^吉洞", "Phonetic": "홍^길동"},
        ),
        (
            _packaged("pydicom/charset_files/chrKoreanMulti.dcm"),
            "OperatorsName",
            {"Alphabetic": "김희중"},
        ),
        (
            _packaged("pydicom/charset_files/chrX1.dcm"),
            "PatientName",
            {"Alphabetic": "Wang^XiaoDong", "Ideographic": "王^小東"},
        ),
        (
            _packaged("pydicom/charset_files/chrX2.dcm"),
            "PatientName",
            {"Alphabetic": "Wang^XiaoDong", "Ideographic": "王^小东"},
        ),
        (_made("GBK", "王^小东"), "PatientName", {"Alphabetic": "王^小东"}),
        (_made("ISO_IR 166", "สมชาย^ใจดี"), "PatientName", {"Alphabetic": "สมชาย^ใจดี"}),
        (_made("ISO_IR 148", "Güneş^Ayşe"), "PatientName", {"Alphabetic": "Güneş^Ayşe"}),
    ],
    ids=[
        "Arabic",
        "Greek",
        "Hebrew",
        "Russian",
        "Japanese",
        "Japanese with katakana",
        "Japanese, one group",
        "Korean",
        "Korean, one group",
        "Chinese in UTF-8",
        "Chinese in GB18030",
        "Chinese in GBK, made",
        "Thai, made",
        "Turkish, made",
    ],
)
def test_a_name_in_other_letters_is_in_the_sidecar_as_it_is_written(
    stowgate: Service, make: Callable[[], bytes], keyword: str, expected: dict[str, str]
) -> None:
    assert _first(_sent(stowgate, make()), keyword) == expected


def test_an_item_with_a_character_set_of_its_own_is_read_by_that(stowgate: Service) -> None:
    item = Dataset()
    item.SpecificCharacterSet = "ISO_IR 144"
    item.RequestedProcedureDescription = "Голова"
    instance = new_instance(
        SpecificCharacterSet="ISO_IR 126",
        StudyDescription="Κεφαλή",
        RequestAttributesSequence=[item],
    )

    sidecar = _sent(stowgate, instance)

    assert _first(sidecar, "StudyDescription") == "Κεφαλή"
    inner = _first(sidecar, "RequestAttributesSequence")
    assert _first(inner, "RequestedProcedureDescription") == "Голова"
