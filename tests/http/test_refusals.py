"""Invalid input: a status, an explanation, nothing stored and nothing announced."""

import gzip
import select
import socket
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from instances import BOUNDARY, multipart, new_instance, real_file
from limits import MAX_BODY_BYTES, MAX_PART_BYTES, MAX_PARTS
from service import Service, wait_for

HEAD = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
# PS3.18 10.5 also defines metadata, and the bulk data that they refer to.
METADATA = (
    b"--x\r\nContent-Type: application/dicom+json\r\n\r\n[{}]\r\n"
    b"--x\r\nContent-Type: application/octet-stream\r\nContent-Location: bulk/1\r\n\r\n\0\0\r\n"
    b"--x--\r\n"
)
MULTIPART = f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(stowgate: Service) -> Iterator[None]:
    """No test of this module may leave an object or a record."""

    def all_opened() -> bool:
        """Payloads of earlier tests are opened."""
        pending = (stowgate.data / "stowgate" / "pending").glob("*.json")
        with suppress(FileNotFoundError):
            return not any(path.stat().st_size for path in pending)
        return False

    wait_for(all_opened)
    before = _traces(stowgate)
    yield

    def settled() -> bool:
        return _traces(stowgate) == before

    wait_for(settled, seconds=10)


def _traces(stowgate: Service) -> set[str]:
    return {
        str(path)
        for folder in ("monaideploy", "stowgate", "workflow-requests")
        for path in (stowgate.data / folder).rglob("*")
        if path.is_file()
        and not {".tmp", "sweep"} & set(path.parts)
        and not path.name.startswith(".")
    }


def _problem(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["correlation_id"] == answer.headers["X-Correlation-ID"]
    assert problem["type"]
    assert problem["title"]
    assert "X-Payload-ID" not in answer.headers
    return str(problem["detail"])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/dicomweb/studies/" + "1" * 65, "the Study Instance UID in the URL is not valid"),
        ("/dicomweb/studies/1.2.x", "the Study Instance UID in the URL is not valid"),
        ("/dicomweb/studies/1..2", "the Study Instance UID in the URL is not valid"),
        ("/dicomweb/studies/..%2F..", "the Study Instance UID in the URL is not valid"),
        ("/dicomweb/vae/nobody/studies", "no Virtual Application Entity"),
        ("/dicomweb/vae/sixteen-letters-/studies", "no Virtual Application Entity"),
        ("/dicomweb/vae/studies", "workflow id"),
        ("/dicomweb/-dash/studies", "workflow id"),
        ("/dicomweb/" + "w" * 129 + "/studies", "workflow id"),
        ("/dicomweb/w%20x/studies", "workflow id"),
        ("/dicomweb/w%00x/studies", "workflow id"),
        ("/dicomweb/..%2f..%2fetc/studies", "workflow id"),
        ("/dicomweb/w\u00e9/studies", "workflow id"),
    ],
)
def test_a_path_that_violates_a_rule_is_400_with_the_rule(
    stowgate: Service, path: str, words: str
) -> None:
    detail = _problem(stowgate.post(path, new_instance(), "application/dicom"), 400)

    assert words in detail


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (HEAD + real_file(), MULTIPART, "closing delimiter"),
        (HEAD + real_file() + b"\r\n--" + BOUNDARY.encode(), MULTIPART, "closing delimiter"),
        (real_file(), MULTIPART, "delimiter"),
        (multipart(real_file())[0], "multipart/related; type=application/dicom", "boundary"),
        (multipart(real_file())[0], MULTIPART.replace(BOUNDARY, "other"), "delimiter"),
        (f"--{BOUNDARY}\r\nno header line\r\n\r\nx".encode(), MULTIPART, "header"),
        (HEAD[:-2] + b"X: " + b"x" * 20_000 + b"\r\n\r\nx", MULTIPART, "headers"),
        (b"\n" + multipart(real_file())[0], MULTIPART, "precedes the first delimiter"),
        (multipart(real_file())[0] * 2, MULTIPART, "follows the closing delimiter"),
    ],
    ids=[
        "no closing delimiter",
        "delimiter not closed",
        "boundary never comes",
        "no boundary parameter",
        "another boundary",
        "header without colon",
        "headers too long",
        "LF in front of the first delimiter",
        "two bodies in one",
    ],
)
def test_a_multipart_body_that_is_malformed_is_400(
    stowgate: Service, body: bytes, content_type: str, words: str
) -> None:
    detail = _problem(stowgate.post("/dicomweb/studies", body, content_type), 400)

    assert words in detail


def test_a_valid_part_before_the_damage_is_not_kept(stowgate: Service) -> None:
    body, content_type = multipart(*[new_instance() for _ in range(5)])

    _problem(stowgate.post("/dicomweb/studies", body[:-10], content_type), 400)


@pytest.mark.parametrize("content_type", ["application/dicom", MULTIPART])
def test_a_chunked_body_that_is_empty_is_400(stowgate: Service, content_type: str) -> None:
    detail = _problem(stowgate.post("/dicomweb/studies", iter([]), content_type), 400)

    assert "the client repeated the request without it" in detail


@pytest.mark.parametrize(
    ("head", "sent"),
    [
        ("Content-Length: 39206", real_file()[:20_000]),
        ("Transfer-Encoding: chunked", b"4000\r\n" + real_file()[:0x2000]),
        ("Transfer-Encoding: chunked", b"not-hex\r\nabc\r\n0\r\n\r\n"),
    ],
    ids=["Content-Length", "chunked", "chunk size"],
)
def test_an_incomplete_body_is_400(stowgate: Service, head: str, sent: bytes) -> None:
    answer = _exchange(stowgate, head, sent)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"truncated" in answer


def test_a_sender_that_stalls_is_cut_off_with_408(stowgate: Service) -> None:
    answer = _exchange(stowgate, "Content-Length: 39206", real_file()[:1000], finish=False)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"timed out between bytes 0 and 39206" in answer


def test_a_sender_that_continues_after_it_was_cut_off_receives_the_reason(
    stowgate: Service,
) -> None:
    address = urlsplit(stowgate.url)
    with socket.create_connection((address.hostname or "", address.port or 0), 30) as connection:
        connection.sendall(
            f"POST /dicomweb/studies HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Content-Type: application/dicom\r\nContent-Length: {MAX_BODY_BYTES}\r\n\r\n".encode()
        )
        select.select([connection], [], [], 30)
        for _ in range(MAX_BODY_BYTES // 100_000):
            connection.sendall(bytes(100_000))

        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_sender_that_is_too_slow_is_cut_off_with_408(stowgate: Service) -> None:
    address = urlsplit(stowgate.url)
    with socket.create_connection((address.hostname or "", address.port or 0), 30) as connection:
        connection.sendall(
            f"POST /dicomweb/studies HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Content-Type: application/dicom\r\nContent-Length: 39206\r\n\r\n".encode()
        )

        def answer() -> bytes:
            """the sender is cut off"""
            connection.sendall(b"x")
            readable, _, _ = select.select([connection], [], [], 0.2)
            return connection.recv(65536) if readable else b""

        assert wait_for(answer).startswith(b"HTTP/1.1 408 ")


def _exchange(stowgate: Service, head: str, sent: bytes, *, finish: bool = True) -> bytes:
    """Send a POST by hand, end the sending side if asked to, and read the answer."""
    address = urlsplit(stowgate.url)
    with socket.create_connection((address.hostname or "", address.port or 0), 30) as connection:
        connection.sendall(
            f"POST /dicomweb/studies HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Content-Type: application/dicom\r\n{head}\r\n\r\n".encode()
            + sent
        )
        if finish:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (MAX_BODY_BYTES * b"x" + b"x", "application/dicom"),
        (iter([b"x" * 900_000] * 10), MULTIPART),
        (MAX_PART_BYTES * b"x" + b"x", "application/dicom"),
        (multipart(b"x" * (MAX_PART_BYTES + 1))[0], MULTIPART),
        (multipart(*[b"x"] * (MAX_PARTS + 1))[0], MULTIPART),
        (multipart(*[real_file()] * 3, b"x" * (MAX_PART_BYTES + 1))[0], MULTIPART),
    ],
    ids=["body", "chunked body", "only part", "part", "part count", "part after good ones"],
)
def test_a_body_over_a_limit_is_413_with_the_limit(
    stowgate: Service, body: Any, content_type: str
) -> None:
    if content_type == MULTIPART and not isinstance(body, bytes):
        body = iter([HEAD, *body])

    detail = _problem(stowgate.post("/dicomweb/studies", body, content_type), 413)

    assert any(str(limit) in detail for limit in (MAX_BODY_BYTES, MAX_PART_BYTES, MAX_PARTS))


def test_a_sender_of_a_large_body_receives_the_refusal(
    stowgate: Service,
) -> None:
    for _ in range(5):
        body = iter([bytes(1_000_000)] * 50)

        _problem(stowgate.post("/dicomweb/vae/nobody/studies", body, "application/dicom"), 400)


def test_a_part_may_be_as_large_as_the_limit(stowgate: Service) -> None:
    answer = stowgate.post("/dicomweb/studies", MAX_PART_BYTES * b"x", "application/dicom")

    assert answer.status_code == 409


@pytest.mark.parametrize(
    ("body", "content_type", "headers"),
    [
        (b"{}", "application/dicom+json", {}),
        (b"x", "text/plain", {}),
        (b"x", None, {}),
        (b"x", "multipart/form-data; boundary=x", {}),
        (METADATA, 'multipart/related; type="application/dicom+json"; boundary=x', {}),
        (METADATA, "multipart/related; type=application/dicom+json; boundary=x", {}),
        (METADATA, "multipart/related; boundary=x", {}),
        (METADATA, 'multipart/related; type="application/dicom+xml"; boundary="x"', {}),
        (METADATA, "multipart/related;type=application/dicom+xml;boundary=x", {}),
        (METADATA, 'multipart/related; type="application/octet-stream"; boundary=x', {}),
        (b"<NativeDicomModel/>", "application/dicom+xml", {}),
        (bytes(100), "application/octet-stream", {}),
        (gzip.compress(real_file()), "application/dicom", {"Content-Encoding": "gzip"}),
        (real_file(), "application/dicom", {"Content-Encoding": "identity, gzip"}),
        (
            multipart(b"{}")[0].replace(b"application/dicom", b"application/json"),
            MULTIPART,
            {},
        ),
    ],
    ids=[
        "json",
        "text",
        "none",
        "form",
        "metadata",
        "metadata unquoted",
        "metadata without type",
        "metadata in xml",
        "metadata in xml unquoted",
        "bulk data",
        "xml",
        "octets",
        "gzip",
        "coded twice",
        "only foreign parts",
    ],
)
def test_another_media_type_or_coding_is_415_without_a_body(
    stowgate: Service, body: bytes, content_type: str | None, headers: dict[str, str]
) -> None:
    answer = stowgate.post("/dicomweb/studies", body, content_type, **headers)

    assert answer.status_code == 415
    assert answer.content == b""
    assert "Content-Type" not in answer.headers
    coded = "Content-Encoding" in headers
    assert answer.headers.get("Accept-Encoding") == ("identity" if coded else None)
    assert answer.headers["X-Correlation-ID"]
    assert answer.headers["Accept-Post"] == (
        'application/dicom, multipart/related; type="application/dicom"'
    )


@pytest.mark.parametrize(
    ("instance", "reason", "words"),
    [
        (b"no DICOM at all", 0xC000, "preamble"),
        (b"", 0xC000, "empty"),
        (real_file()[132:], 0xC000, "preamble"),
        (real_file()[:-1000], 0xC000, "(7FE0,0010)"),
        (new_instance(SOPInstanceUID=None), 0xA900, "SOPInstanceUID"),
        (new_instance(SOPClassUID=None), 0xA900, "SOPClassUID"),
        (new_instance(StudyInstanceUID=None), 0xA900, "StudyInstanceUID"),
        (new_instance(StudyInstanceUID=""), 0xA900, "StudyInstanceUID"),
        (new_instance(SeriesInstanceUID=None), 0xA900, "SeriesInstanceUID"),
        (
            real_file().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"),
            0xC122,
            "ransfer",
        ),
    ],
    ids=[
        "no DICOM",
        "empty",
        "no preamble",
        "truncated",
        "no SOP Instance UID",
        "no SOP Class UID",
        "no Study UID",
        "empty Study UID",
        "no Series UID",
        "transfer syntax",
    ],
)
def test_an_instance_that_cannot_be_stored_is_409_with_its_reason(
    stowgate: Service, instance: bytes, reason: int, words: str
) -> None:
    requests = [multipart(instance)]
    if instance:
        requests.append((instance, "application/dicom"))
    for body, content_type in requests:
        answer = stowgate.post("/dicomweb/studies", body, content_type)

        assert answer.status_code == 409
        assert answer.headers["Content-Type"] == "application/dicom+json"
        assert "X-Payload-ID" not in answer.headers
        dataset = answer.json()
        assert "00081199" not in dataset
        (item,) = (dataset.get("00081198") or dataset["0008119A"])["Value"]
        assert item["00081197"]["Value"] == [reason]
        assert "part 1" in item["00091001"]["Value"][0]
        assert words in item["00091001"]["Value"][0]


@pytest.mark.parametrize("illegal", ["1.2." + "3" * 63, "1.2.letters", "../../../etc", "1.2\\1.3"])
@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_an_invalid_uid_in_an_instance_never_becomes_an_object_name(
    stowgate: Service, keyword: str, illegal: str
) -> None:
    ds_bytes = new_instance(**{keyword: "9" * 60}).replace(
        b"9" * 60, illegal.encode().ljust(60, b"\0")[:60]
    )
    if len(illegal) > 60:
        ds_bytes = _with_long_uid(keyword)

    answer = stowgate.post("/dicomweb/studies", ds_bytes, "application/dicom")

    assert answer.status_code == 409
    assert illegal not in answer.text
    (item,) = [
        item
        for tag in ("00081198", "0008119A")
        for item in answer.json().get(tag, {}).get("Value", [])
    ]
    assert item["00081197"]["Value"] == [0xC000]
    assert keyword in item["00091001"]["Value"][0]


def _with_long_uid(keyword: str) -> bytes:
    import pydicom

    with pydicom.config.disable_value_validation():
        return new_instance(**{keyword: "1.2." + "3" * 63})


def test_a_foreign_part_fails_alone(stowgate: Service) -> None:
    foreign = HEAD.replace(b"application/dicom", b"application/json") + b"{}\r\n"
    answer = stowgate.post("/dicomweb/studies", foreign + multipart(b"no DICOM")[0], MULTIPART)

    assert answer.status_code == 409
    words = [item["00091001"]["Value"][0] for item in answer.json()["0008119A"]["Value"]]
    assert "Content-Type" in words[0]
    assert "preamble" in words[1]


FORMS = [
    f"/dicomweb{form}{study}"
    for form in ("/studies", "/w/studies", "/vae/AE/studies", "/vae/AE/w/studies")
    for study in ("", "/1.2.3", "/")
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", [*FORMS, "/dicomweb/studies/1.2/series/1.3/instances"])
def test_another_method_is_405_with_the_allowed_methods(
    stowgate: Service, method: str, path: str
) -> None:
    answer = requests.request(method, stowgate.url + path, timeout=30)

    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == {"OPTIONS", "POST"}
    assert answer.headers["Content-Type"] == "application/problem+json"
    if method != "HEAD":
        assert "only stores" in answer.json()["detail"]
        assert "WADO-RS" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/dicomweb", 405), ("/dicomweb/", 405), ("/dicomweb/series", 404), ("/dicomweb/a/b", 404)],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_404_with_the_paths_for_storing(
    stowgate: Service, method: str, path: str, status: int
) -> None:
    answer = requests.request(method, stowgate.url + path, timeout=30)

    assert answer.status_code == status
    assert "POST instances to /dicomweb/studies" in answer.json()["detail"]


def test_a_missing_resource_is_404_with_an_explanation(stowgate: Service) -> None:
    answer = stowgate.get("/nowhere")

    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "STOW-RS" not in answer.json()["detail"]


@pytest.mark.parametrize("path", FORMS)
def test_options_lists_the_methods_and_the_media_types(stowgate: Service, path: str) -> None:
    answer = requests.options(stowgate.url + path, timeout=30)

    assert answer.status_code == 204
    assert set(answer.headers["Allow"].split(", ")) == {"OPTIONS", "POST"}
    assert "application/dicom, multipart/related" in answer.headers["Accept-Post"]


def test_options_of_the_service_returns_its_capabilities(stowgate: Service) -> None:
    """PS3.18 8.9 and Annex H."""
    answer = requests.options(f"{stowgate.url}/dicomweb/", timeout=30)

    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/vnd.sun.wadl+xml"
    wadl = "{http://wadl.dev.java.net/2009/02}"
    (resources,) = ET.fromstring(answer.content)
    assert resources.attrib["base"] == "/dicomweb"
    resource = {found.attrib["path"]: found for found in resources}
    assert len(resource) == 8
    study = resource["vae/{aet}/studies/{study}"]
    assert [param.attrib["name"] for param in study.iter(f"{wadl}param")] == ["aet", "study"]
    method = study.find(f"{wadl}method")
    assert method is not None
    assert method.attrib["name"] == "POST"
    taken = [found.attrib["mediaType"] for found in method.findall(f"{wadl}request/*")]
    assert taken[0] == "application/dicom"
    ids = [found.attrib["id"] for found in resources.iter(f"{wadl}method")]
    assert len(set(ids)) == 8


def test_options_are_not_counted_as_uploads(stowgate: Service) -> None:
    def counted() -> list[str]:
        lines = stowgate.get("/metrics").text.splitlines()
        return [line for line in lines if line.startswith("stowgate_posts_total")]

    before = counted()
    requests.options(f"{stowgate.url}/dicomweb/studies", timeout=30)

    assert counted() == before
