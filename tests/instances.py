"""DICOM instances for tests: real files, and new ones made of them."""

from collections.abc import Iterator
from io import BytesIO

import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

BOUNDARY = "b1d4c0de"


def real_file(name: str = "CT_small.dcm") -> bytes:
    """A file of the pydicom package, byte for byte."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    with open(path, "rb") as file:
        return file.read()


def new_instance(name: str = "CT_small.dcm", /, **elements: object) -> bytes:
    """That file with a new SOP Instance UID, and these elements by keyword; None removes one."""
    ds = pydicom.dcmread(BytesIO(real_file(name)))
    for keyword, value in {"SOPInstanceUID": generate_uid(), **elements}.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    if "SOPInstanceUID" in ds:
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    file = BytesIO()
    ds.save_as(file)
    return file.getvalue()


def one_series(count: int, **elements: object) -> Iterator[bytes]:
    """So many of one series, made faster than by `new_instance`: their SOP Instance UIDs are
    2.25.10…0 and the following."""
    mark = "2.25." + "9" * 30
    template = new_instance(SOPInstanceUID=mark, **elements)
    for number in range(count):
        yield template.replace(mark.encode(), f"2.25.{10**29 + number}".encode())


def uid(instance: bytes, keyword: str) -> str:
    return str(pydicom.dcmread(BytesIO(instance), stop_before_pixels=True)[keyword].value)


def multipart(*instances: bytes) -> tuple[bytes, str]:
    """A body and its Content-Type."""
    parts = [
        f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode() + instance + b"\r\n"
        for instance in instances
    ]
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return body, f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'
