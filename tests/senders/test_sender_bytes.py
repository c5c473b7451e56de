"""What each known sender puts on the wire, byte for byte, in pieces of any size.

The rows are those of docs/senders.md about what goes well, written from the senders' sources or
captured; each gets the answer that it needs. The real programs are in the other files here, where
they can be had.
"""

import json
import socket
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import pydicom
import pytest
from instances import uid
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from service import Service
from wire import read_answer

Framing = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def dataset(self) -> dict[str, Any]:
        """As dicomweb-client reads it, which compares the Content-Type as a whole."""
        assert self.headers["content-type"] in ("application/dicom+json", "application/json")
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found

    def items(self, tag: str) -> list[dict[str, Any]]:
        return list(self.dataset().get(tag, {}).get("Value", []))


def plain(body: bytes) -> bytes:
    return f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def chunks_of(size_bytes: int) -> Framing:
    def chunked(body: bytes) -> bytes:
        pieces = [body[start : start + size_bytes] for start in range(0, len(body), size_bytes)]
        framed = [f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in [*pieces, b""]]
        return b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(framed)

    return chunked


@dataclass(frozen=True)
class Sender:
    """`{study}` in a path is the instances'; `{length}` in a part's headers is its length."""

    content_type: str
    boundary: str
    begins: str = ""
    part_headers: str = "Content-Type: application/dicom\r\n"
    ends: str = "\r\n"
    headers: str = ""
    path: str = "/dicomweb/studies"
    framing: Framing = field(default=plain)

    def body(self, instances: list[bytes]) -> bytes:
        parts = [
            f"--{self.boundary}\r\n{self.part_headers.format(length=len(instance))}\r\n".encode()
            + instance
            + b"\r\n"
            for instance in instances
        ]
        closing = f"--{self.boundary}--{self.ends}"
        return self.begins.encode() + b"".join(parts) + closing.encode()

    def request(self, instances: list[bytes], path: str | None = None) -> bytes:
        place = (path or self.path).format(study=uid(instances[0], "StudyInstanceUID"))
        head = (
            f"POST {place} HTTP/1.1\r\nHost: stowgate.example:8080\r\n{self.headers}"
            f"Content-Type: {self.content_type}\r\n"
        )
        return head.encode() + self.framing(self.body(instances))


TYPE = 'type="application/dicom"'
GUID = "0f3cf5c0-70e0-41ef-baef-c6f9f65ec3e1"
# What java.net.http.HttpClient adds where it was not told to stay with HTTP/1.1.
JAVA_UPGRADE = (
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAABgAGAAA\r\n"
    "User-Agent: Java-http-client/21.0.2\r\n"
)

SENDERS = {
    "dicomweb-client (Python)": Sender(
        f'multipart/related; {TYPE}; boundary="{GUID}"',
        GUID,
        begins="\r\n",
        ends="",
        headers=(
            "User-Agent: python-requests/2.32.4\r\nAccept-Encoding: gzip, deflate\r\n"
            "Accept: */*\r\nConnection: keep-alive\r\n"
        ),
        path="/dicomweb//studies",
    ),
    "dicomweb-client (Python), chunked": Sender(
        f'multipart/related; {TYPE}; boundary="{GUID}"',
        GUID,
        begins="\r\n",
        ends="",
        headers=(
            "User-Agent: python-requests/2.32.4\r\nAccept-Encoding: gzip, deflate\r\n"
            "Accept: */*\r\nConnection: Keep-Alive\r\nCache-Control: no-cache\r\n"
        ),
        framing=chunks_of(500),
    ),
    "dicomweb-client (npm), OHIF": Sender(
        f'multipart/related; {TYPE}; boundary="{GUID}"',
        GUID,
        begins="\r\n",
        ends="",
        headers=(
            "Connection: keep-alive\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n"
            "Accept: */*\r\nOrigin: https://viewer.example\r\nSec-Fetch-Mode: cors\r\n"
            "Referer: https://viewer.example/\r\nAccept-Encoding: gzip, deflate, br\r\n"
        ),
    ),
    "dicomweb-client (npm) before 0.11": Sender(
        f'multipart/related; {TYPE}; boundary="{GUID}"',
        GUID,
        begins="\r\n",
        # As long as a closing delimiter, for each data set but the last.
        ends="\0" * len(f"\r\n--{GUID}--"),
        headers="Accept: */*\r\nOrigin: https://viewer.example\r\n",
    ),
    "Orthanc": Sender(
        f"multipart/related; {TYPE}; boundary={GUID}",
        GUID,
        part_headers="Content-Type: application/dicom\r\nContent-Length: {length}\r\n",
        headers="Accept: application/json\r\n",
        framing=chunks_of(300),
    ),
    "Orthanc before 2019, OsiriX": Sender(
        f"multipart/related; type=application/dicom; boundary={GUID}",
        GUID,
        part_headers="Content-Type: application/dicom\r\nContent-Length: {length}\r\n",
        headers="Accept: application/json\r\n",
    ),
    "dcm4che stowrs": Sender(
        f"multipart/related; {TYPE}; boundary=myboundary",
        "myboundary",
        begins="\r\n",
        headers=(
            "Accept: application/dicom+xml\r\nUser-Agent: Java/17.0.9\r\nConnection: keep-alive\r\n"
        ),
        framing=chunks_of(1024),
    ),
    "Microsoft C# client": Sender(
        f'multipart/related; boundary="{GUID}"; {TYPE}',
        GUID,
        headers="Accept: application/dicom+json\r\n",
        framing=chunks_of(4096),
    ),
    "Microsoft Python tutorial": Sender(
        "multipart/related; boundary=5f1b6dc6c2c34d4b2f0a0f3b0a6d6e0e",
        "5f1b6dc6c2c34d4b2f0a0f3b0a6d6e0e",
        part_headers=(
            'Content-Disposition: form-data; name="file1"; filename="red-triangle.dcm"\r\n'
            "Content-Type: application/dicom\r\n"
        ),
        headers="Accept: application/dicom+json\r\n",
    ),
    "curl": Sender(
        f"multipart/related; {TYPE}; boundary=------------------------d74496d66958873e",
        "------------------------d74496d66958873e",
        part_headers=(
            'Content-Disposition: attachment; name="file"; filename="image.dcm"\r\n'
            "Content-Type: application/dicom\r\n"
        ),
        headers="User-Agent: curl/7.88.1\r\nAccept: */*\r\nExpect: 100-continue\r\n",
    ),
    "MONAI export client": Sender(
        f'multipart/related; boundary="---DICOM-INSTASNCE---"; {TYPE}',
        "---DICOM-INSTASNCE---",
        headers="Accept: application/dicom+json\r\n",
        path="/dicomweb/studies/",
    ),
    "MONAI export client, with the study": Sender(
        f'multipart/related; boundary="---DICOM-INSTASNCE---"; {TYPE}',
        "---DICOM-INSTASNCE---",
        headers="Accept: application/dicom+json\r\n",
        path="/dicomweb/studies/{study}/",
    ),
    "Weasis": Sender(
        'multipart/related;type="application/dicom";boundary=mimeTypeBoundary',
        "mimeTypeBoundary",
        part_headers=(
            'Content-Disposition: form-data; name="files"\r\nContent-Type: application/dicom\r\n'
        ),
        headers=f"{JAVA_UPGRADE}Accept: application/dicom+xml\r\n",
    ),
    "weasis-dicom-tools, Karnak": Sender(
        'multipart/related;type="application/dicom";boundary=mimeTypeBoundary',
        "mimeTypeBoundary",
        part_headers=("Content-Type: application/dicom\r\nContent-Encoding: gzip, identity\r\n"),
        headers=f"{JAVA_UPGRADE}Accept: application/dicom+xml\r\n",
        framing=chunks_of(700),
    ),
    "RSNA CTP": Sender(
        "multipart/related; type=application/dicom; boundary=-ctp-9a8b7c6d5e",
        "-ctp-9a8b7c6d5e",
        headers="User-Agent: Java/1.8.0_392\r\nAccept: */*\r\nConnection: keep-alive\r\n",
        framing=chunks_of(4096),
    ),
    "Google adapter": Sender(
        f'multipart/related; {TYPE}; boundary="{GUID}"',
        GUID,
        part_headers=("Content-Type: application/dicom\r\nContent-Transfer-Encoding: binary\r\n"),
        headers="Accept-Encoding: gzip\r\nUser-Agent: Google-HTTP-Java-Client/1.43.3 (gzip)\r\n",
        framing=chunks_of(1024),
    ),
}

XML = ["dcm4che stowrs", "Weasis", "weasis-dicom-tools, Karnak"]
PIECES_BYTES = [1, 7, 4096]


def small_instance(**elements: object) -> bytes:
    """A whole instance of a few hundred bytes, ending in what a careless reader takes for text."""
    ds = FileDataset(BytesIO(), {}, file_meta=FileMetaDataset(), preamble=bytes(128))
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    ds.PatientID = "\r\n--b"
    ds.add_new(0x7FE00010, "OB", b"\r\n--\r\n \n")
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    file = BytesIO()
    ds.save_as(file)
    return file.getvalue()


def send(stowgate: Service, request: bytes, piece_bytes: int) -> Answer:
    """Each piece in a segment of its own, as far as that is ours to say."""
    url = urlsplit(stowgate.url)
    with socket.create_connection((url.hostname, url.port), timeout=60) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head_end = request.index(b"\r\n\r\n") + 4
        _send_pieces(sock, request[:head_end], piece_bytes)
        if b"Expect: 100-continue" in request[:head_end]:
            assert sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        _send_pieces(sock, request[head_end:], piece_bytes)
        status, head, body = read_answer(sock)
    lines = [line.partition(": ") for line in head.decode().split("\r\n")[1:]]
    return Answer(status, {name.lower(): value for name, _, value in lines}, body)


def _send_pieces(sock: socket.socket, data: bytes, piece_bytes: int) -> None:
    for start in range(0, len(data), piece_bytes):
        sock.sendall(data[start : start + piece_bytes])


def stored(stowgate: Service, payload_id: str) -> set[bytes]:
    folder = stowgate.data / "monaideploy" / payload_id
    return {path.read_bytes() for path in folder.rglob("*.dcm")}


@pytest.mark.parametrize("piece_bytes", PIECES_BYTES)
@pytest.mark.parametrize("name", SENDERS)
def test_what_a_sender_puts_on_the_wire_is_stored_as_it_is_and_answered_200(
    stowgate: Service, name: str, piece_bytes: int
) -> None:
    instances = [small_instance(), small_instance()]

    answer = send(stowgate, SENDERS[name].request(instances), piece_bytes)

    assert answer.status == 200, answer.body
    assert stored(stowgate, answer.headers["x-payload-id"]) == set(instances)
    if name in XML:
        assert answer.headers["content-type"] == "application/dicom+xml"
        assert ET.fromstring(answer.body).tag.endswith("NativeDicomModel")
        return
    assert len(answer.items("00081199")) == len(instances)
    assert "00081198" not in answer.dataset()
    assert "0008119A" not in answer.dataset()
    pydicom.Dataset.from_json(answer.dataset())


@pytest.mark.parametrize("name", [name for name in SENDERS if name not in XML])
def test_a_sender_is_told_of_what_was_stored_and_what_was_not_in_one_202(
    stowgate: Service, name: str
) -> None:
    instances = [small_instance(), small_instance()[:-4]]

    answer = send(stowgate, SENDERS[name].request(instances), piece_bytes=7)

    assert answer.status == 202
    assert len(answer.items("00081199")) == 1
    assert len(answer.items("00081198") + answer.items("0008119A")) == 1


@pytest.mark.parametrize("name", XML)
def test_a_sender_that_asks_for_xml_gets_it_with_a_warning_too(
    stowgate: Service, name: str
) -> None:
    request = SENDERS[name].request([small_instance()], path="/dicomweb/studies/1.2.999")

    answer = send(stowgate, request, piece_bytes=7)

    assert answer.status == 202
    assert answer.headers["content-type"] == "application/dicom+xml"
    assert b'keyword="WarningReason"' in answer.body


@pytest.mark.parametrize("piece_bytes", PIECES_BYTES)
@pytest.mark.parametrize("single", [False, True], ids=["multipart", "single"])
def test_a_409_is_a_dataset_too_for_the_microsoft_client(
    stowgate: Service, single: bool, piece_bytes: int
) -> None:
    refused = small_instance(StudyInstanceUID="")
    request = SENDERS["Microsoft C# client"].request([refused])
    if single:
        request = _single(refused)

    answer = send(stowgate, request, piece_bytes)

    assert answer.status == 409
    assert [item["00081197"]["Value"] for item in answer.items("00081198")] == [[0xA900]]


def _single(instance: bytes) -> bytes:
    head = (
        "POST /dicomweb/studies HTTP/1.1\r\nHost: stowgate.example:8080\r\n"
        "Accept: application/dicom+json\r\nContent-Type: application/dicom\r\n"
    )
    return head.encode() + plain(instance)


@pytest.mark.parametrize("piece_bytes", PIECES_BYTES)
def test_the_microsoft_clients_single_instance_is_stored_as_it_is(
    stowgate: Service, piece_bytes: int
) -> None:
    instance = small_instance()

    answer = send(stowgate, _single(instance), piece_bytes)

    assert answer.status == 200
    assert len(answer.items("00081199")) == 1
    assert stored(stowgate, answer.headers["x-payload-id"]) == {instance}
