"""The Capabilities Description: what is served below `/dicomweb`, as WADL (PS3.18 8.9, Annex H)."""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from http import HTTPStatus

from api.stow.response import JSON_TYPE, XML_TYPE

CONTENT_TYPE = "application/vnd.sun.wadl+xml"

_NAMESPACE = "http://wadl.dev.java.net/2009/02"
_WITH_DATASET = (HTTPStatus.OK, HTTPStatus.ACCEPTED, HTTPStatus.CONFLICT)


def capabilities(base: str, paths: Iterable[str], taken: Sequence[str]) -> bytes:
    """`paths` are relative to `base`, with the names of their variables in braces, and each takes a
    POST of one of the media types `taken`."""
    application = ET.Element("application", xmlns=_NAMESPACE)
    resources = ET.SubElement(application, "resources", base=base)
    for path in paths:
        resource = ET.SubElement(resources, "resource", path=path)
        for step in path.split("/"):
            if step.startswith("{"):
                ET.SubElement(
                    resource, "param", name=step.strip("{}"), style="template", required="true"
                )
        method = ET.SubElement(resource, "method", name="POST", id=_transaction(path))
        request = ET.SubElement(method, "request")
        for media_type in taken:
            ET.SubElement(request, "representation", mediaType=media_type)
        statuses = " ".join(str(status.value) for status in _WITH_DATASET)
        response = ET.SubElement(method, "response", status=statuses)
        for media_type in (JSON_TYPE, XML_TYPE):
            ET.SubElement(response, "representation", mediaType=media_type)
    return bytes(ET.tostring(application, encoding="utf-8", xml_declaration=True))


def _transaction(path: str) -> str:
    """An id that is the path's own, as XML wants ids to be."""
    words = [step.strip("{}").capitalize() for step in path.split("/")]
    return "StoreInstances-" + "-".join(words)
