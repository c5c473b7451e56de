"""The answer of the Store transaction: PS3.18 10.5.3 and Annex I (Store Instances Response)."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from http import HTTPStatus
from typing import Any, Protocol
from xml.etree import ElementTree

import orjson
from pydicom.datadict import keyword_for_tag

JSON_TYPE = "application/dicom+json"
XML_TYPE = "application/dicom+xml"


class FailureReason(IntEnum):
    """Store Instances Response Failure Reason Values (PS3.18 Table I.2-2; PS3.7 C.4.2.1.5 for
    0111H)."""

    PROCESSING_FAILURE = 0x0110
    DUPLICATE_SOP_INSTANCE = 0x0111
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    OUT_OF_RESOURCES = 0xA700
    DATASET_DOES_NOT_MATCH_SOP_CLASS = 0xA900
    CANNOT_UNDERSTAND = 0xC000
    TRANSFER_SYNTAX_NOT_SUPPORTED = 0xC122


class WarningReason(IntEnum):
    """Store Instances Response Warning Reason Values (PS3.18 Table I.2-1)."""

    DATASET_DOES_NOT_MATCH_SOP_CLASS = 0xB007


@dataclass(frozen=True)
class Stored:
    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    warning: WarningReason | None = None


@dataclass(frozen=True)
class Failed:
    """A failed part. `detail` gives cause and remedy; the SOP UIDs are None if unknown."""

    reason: FailureReason
    detail: str
    sop_class_uid: str | None = None
    sop_instance_uid: str | None = None


class Outcome(Protocol):
    """The outcome of the parts of a request, in their order. A call restarts the iteration and ends
    earlier ones."""

    def stored(self) -> Iterator[Stored]: ...
    def failed(self) -> Iterator[Failed]: ...


def status(outcome: Outcome) -> HTTPStatus:
    """PS3.18 Table 10.5.3-1."""
    if next(outcome.stored(), None) is None:
        return HTTPStatus.CONFLICT
    if next(outcome.failed(), None) or any(instance.warning for instance in outcome.stored()):
        return HTTPStatus.ACCEPTED
    return HTTPStatus.OK


# The response module has no element for an explanation. A private block (PS3.5 7.8.1) holds it,
# which other clients must ignore.
_PRIVATE_CREATOR = ("00090010", "LO", "STOWGATE")
_DETAIL = ("00091001", "UT")

_Element = dict[str, Any]
_Dataset = dict[str, _Element]


def _element(vr: str, *values: Any) -> _Element:
    """Return an element; without a value it has no `Value` (PS3.18 F.2.5)."""
    return {"vr": vr, "Value": list(values)} if values else {"vr": vr}


def _detail(words: str) -> _Dataset:
    tag, vr, creator = _PRIVATE_CREATOR
    return {tag: _element(vr, creator), _DETAIL[0]: _element(_DETAIL[1], words)}


def _references(sop_class_uid: str, sop_instance_uid: str) -> _Dataset:
    return {"00081150": _element("UI", sop_class_uid), "00081155": _element("UI", sop_instance_uid)}


def _stored_item(instance: Stored, archive_url: str | None) -> _Dataset:
    item = _references(instance.sop_class_uid, instance.sop_instance_uid)
    item["00081190"] = _element("UR")
    if archive_url is not None:
        series = f"studies/{instance.study_uid}/series/{instance.series_uid}"
        url = f"{archive_url}/{series}/instances/{instance.sop_instance_uid}"
        item["00081190"] = _element("UR", url)
    if instance.warning is not None:
        item["00081196"] = _element("US", int(instance.warning))
        item |= _detail("stored, but its Study Instance UID is not the one in the URL")
    return item


def _failed_item(failure: Failed) -> _Dataset:
    item: _Dataset = {}
    if failure.sop_class_uid and failure.sop_instance_uid:
        item |= _references(failure.sop_class_uid, failure.sop_instance_uid)
    item["00081197"] = _element("US", int(failure.reason))
    return item | _detail(failure.detail)


def _sequences(
    outcome: Outcome, archive_url: str | None
) -> Iterator[tuple[str, Iterator[_Dataset]]]:
    """Yield the sequences of the response with their items, in ascending order of tags."""
    yield "00081198", (_failed_item(f) for f in outcome.failed() if _is_instance(f))
    yield "00081199", (_stored_item(instance, archive_url) for instance in outcome.stored())
    yield "0008119A", (_failed_item(f) for f in outcome.failed() if not _is_instance(f))


def _is_instance(failure: Failed) -> bool:
    return bool(failure.sop_class_uid and failure.sop_instance_uid)


def _studies_url(outcome: Outcome, archive_url: str | None) -> _Element:
    """Return the URL of the study, or of the archive if there are several studies."""
    studies: set[str] = set()
    if archive_url is not None:
        for instance in outcome.stored():
            studies.add(instance.study_uid)
            if len(studies) > 1:
                return _element("UR", archive_url)
    return _element("UR", *(f"{archive_url}/studies/{study}" for study in studies))


def to_json(outcome: Outcome, archive_url: str | None) -> Iterator[bytes]:
    """Yield the response in the DICOM JSON Model (PS3.18 Annex F), in pieces.

    `archive_url` is the base URL of the archive, before /studies.
    """
    yield b'{"00081190":' + orjson.dumps(_studies_url(outcome, archive_url))
    for tag, items in _sequences(outcome, archive_url):
        head, end = f',"{tag}":{{"vr":"SQ","Value":['.encode(), b""
        for item in items:
            yield head + orjson.dumps(item)
            head, end = b",", b"]}"
        yield end
    yield b"}"


def to_xml(outcome: Outcome, archive_url: str | None) -> Iterator[bytes]:
    """Yield the response in the Native DICOM Model (PS3.19 A.1), in pieces."""
    yield (
        b"<?xml version='1.0' encoding='UTF-8'?>\n"
        b'<NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM" '
        b'xml:space="preserve">'
    )
    root = ElementTree.Element("Item")
    _append(root, {"00081190": _studies_url(outcome, archive_url)})
    yield _xml(root[0])
    for tag, items in _sequences(outcome, archive_url):
        keyword = keyword_for_tag(int(tag, 16))
        head, end = f'<DicomAttribute tag="{tag}" vr="SQ" keyword="{keyword}">'.encode(), b""
        for number, item in enumerate(items, start=1):
            root = ElementTree.Element("Item", number=str(number))
            _append(root, item)
            yield head + _xml(root)
            head, end = b"", b"</DicomAttribute>"
        yield end
    yield b"</NativeDicomModel>"


def _xml(element: ElementTree.Element) -> bytes:
    document: bytes = ElementTree.tostring(element, encoding="UTF-8", xml_declaration=False)
    return document


def _append(parent: ElementTree.Element, response: _Dataset) -> None:
    for tag, element in response.items():
        attributes = {"tag": tag, "vr": element["vr"]}
        if tag == _DETAIL[0]:
            # PS3.19 A.1.5: a private element names its creator, and has 00 for its block.
            attributes |= {"tag": f"{tag[:4]}00{tag[6:]}", "privateCreator": _PRIVATE_CREATOR[2]}
        elif tag == _PRIVATE_CREATOR[0]:
            continue
        else:
            attributes["keyword"] = keyword_for_tag(int(tag, 16))
        attribute = ElementTree.SubElement(parent, "DicomAttribute", attributes)
        for number, value in enumerate(element.get("Value", []), start=1):
            ElementTree.SubElement(attribute, "Value", number=str(number)).text = str(value)
