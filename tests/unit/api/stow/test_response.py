"""The pieces of an answer are, byte for byte, the complete document."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from xml.etree import ElementTree

import orjson
import pytest
from pydicom.datadict import keyword_for_tag

from api.stow.response import (
    Failed,
    FailureReason,
    Stored,
    WarningReason,
    status,
    to_json,
    to_xml,
)

ARCHIVE = "https://archive.example/dicom-web?a=1&b=<2>"

PLAIN = [Stored("1.2.1", f"1.2.2.{number}", "1.2.3", "1.2.4") for number in range(3)]
WARNED = Stored("1.2.1", "1.2.9", "1.2.8", "1.2.4", WarningReason.DATASET_DOES_NOT_MATCH_SOP_CLASS)
KNOWN = [
    Failed(FailureReason.OUT_OF_RESOURCES, "full <&> \"voll\" — 'plein'", "1.2.1", f"1.2.7.{n}")
    for n in range(2)
]
OTHER = [Failed(FailureReason.CANNOT_UNDERSTAND, f"part {number}: ü") for number in range(2)]


@dataclass
class Parts:
    of_stored: list[Stored]
    of_failed: list[Failed]

    def stored(self) -> Iterator[Stored]:
        return iter(self.of_stored)

    def failed(self) -> Iterator[Failed]:
        return iter(self.of_failed)


MIXTURES = [
    Parts([*plain, *warned], [*other[:1], *known, *other[1:]])
    for plain, warned, known, other in itertools.product(
        ([], PLAIN[:1], PLAIN), ([], [WARNED]), ([], KNOWN), ([], OTHER)
    )
]


def _element(vr: str, *values: Any) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)} if values else {"vr": vr}


def _words(words: str) -> dict[str, Any]:
    return {"00090010": _element("LO", "STOWGATE"), "00091001": _element("UT", words)}


def _document(parts: Parts, archive_url: str | None) -> dict[str, Any]:
    """The complete answer in the DICOM JSON Model."""

    def stored(one: Stored) -> dict[str, Any]:
        url = f"{archive_url}/studies/{one.study_uid}/series/{one.series_uid}/instances/"
        item = {
            "00081150": _element("UI", one.sop_class_uid),
            "00081155": _element("UI", one.sop_instance_uid),
            "00081190": _element("UR", *([url + one.sop_instance_uid] if archive_url else [])),
        }
        if one.warning:
            item["00081196"] = _element("US", int(one.warning))
            item |= _words("stored, but its Study Instance UID is not the one in the URL")
        return item

    def failed(one: Failed) -> dict[str, Any]:
        item: dict[str, Any] = {}
        if one.sop_class_uid:
            item["00081150"] = _element("UI", one.sop_class_uid)
            item["00081155"] = _element("UI", one.sop_instance_uid)
        return item | {"00081197": _element("US", int(one.reason))} | _words(one.detail)

    studies = {one.study_uid for one in parts.of_stored}
    path = "".join(f"/studies/{study}" for study in studies) if len(studies) == 1 else ""
    urls = [f"{archive_url}{path}"] if archive_url and studies else []
    sequences = {
        "00081198": [failed(one) for one in parts.of_failed if one.sop_class_uid],
        "00081199": [stored(one) for one in parts.of_stored],
        "0008119A": [failed(one) for one in parts.of_failed if not one.sop_class_uid],
    }
    return {"00081190": _element("UR", *urls)} | {
        tag: _element("SQ", *items) for tag, items in sequences.items() if items
    }


def _native(document: dict[str, Any]) -> bytes:
    """The complete answer in the Native DICOM Model."""

    def append(parent: ElementTree.Element, dataset: dict[str, Any]) -> None:
        for tag, element in dataset.items():
            attributes = {"tag": tag, "vr": element["vr"], "keyword": keyword_for_tag(int(tag, 16))}
            if tag == "00090010":
                continue
            if tag == "00091001":
                attributes = {"tag": "00090001", "vr": "UT", "privateCreator": "STOWGATE"}
            attribute = ElementTree.SubElement(parent, "DicomAttribute", attributes)
            for number, value in enumerate(element.get("Value", []), start=1):
                if element["vr"] == "SQ":
                    append(ElementTree.SubElement(attribute, "Item", number=str(number)), value)
                else:
                    child = ElementTree.SubElement(attribute, "Value", number=str(number))
                    child.text = str(value)

    root = ElementTree.Element(
        "NativeDicomModel",
        {"xmlns": "http://dicom.nema.org/PS3.19/models/NativeDICOM", "xml:space": "preserve"},
    )
    append(root, document)
    whole: bytes = ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)
    return whole


@pytest.mark.parametrize("archive_url", [None, ARCHIVE])
@pytest.mark.parametrize("parts", MIXTURES)
def test_the_pieces_of_an_answer_are_the_complete_document(
    parts: Parts, archive_url: str | None
) -> None:
    document = _document(parts, archive_url)

    assert b"".join(to_json(parts, archive_url)) == orjson.dumps(document)
    assert b"".join(to_xml(parts, archive_url)) == _native(document)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (Parts(PLAIN, []), HTTPStatus.OK),
        (Parts([*PLAIN, WARNED], []), HTTPStatus.ACCEPTED),
        (Parts(PLAIN, OTHER), HTTPStatus.ACCEPTED),
        (Parts([], KNOWN), HTTPStatus.CONFLICT),
    ],
)
def test_the_status_depends_on_whether_all_some_or_none_were_stored(
    parts: Parts, expected: HTTPStatus
) -> None:
    assert status(parts) == expected
