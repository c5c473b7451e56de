"""Clients written in Python, each as its users use it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient
from instances import BOUNDARY, multipart, new_instance, uid
from pydicom.uid import generate_uid
from service import Service
from snippets import snippet

MULTIPART = f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'


def _pasted(code: str, desk: Path) -> str:
    """What it prints, run as a script of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=desk,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


class _Recorded(requests.Session):
    """A session that keeps what was sent and answered."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[requests.Response] = []
        self.hooks["response"].append(lambda answer, **_: self.answers.append(answer))


def _client(stowgate: Service, base: str = "/dicomweb") -> tuple[DICOMwebClient, _Recorded]:
    session = _Recorded()
    return DICOMwebClient(stowgate.url + base, session=session), session


def _datasets(*instances: bytes) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(BytesIO(instance)) for instance in instances]


def _stored(answer: pydicom.Dataset) -> list[str]:
    return [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence]


# dicomweb-client


@pytest.mark.parametrize("base", ["/dicomweb", "/dicomweb/"])
@pytest.mark.parametrize("count", [1, 5])
def test_dicomweb_client_stores_one_and_many_whether_its_base_url_ends_in_a_slash_or_not(
    stowgate: Service, count: int, base: str
) -> None:
    instances = [new_instance() for _ in range(count)]
    client, session = _client(stowgate, base)

    answer = client.store_instances(_datasets(*instances))

    (sent,) = session.answers
    assert urlsplit(sent.request.url).path == f"{base}/studies"
    assert not sent.history
    assert _stored(answer) == [uid(instance, "SOPInstanceUID") for instance in instances]
    assert stowgate.opened(sent.headers["X-Payload-ID"])["file_count"] == count


def test_dicomweb_client_stores_what_it_sends_in_chunks(stowgate: Service) -> None:
    instances = [new_instance() for _ in range(30)]
    client, session = _client(stowgate)

    answer = client.store_instances(_datasets(*instances))

    (sent,) = session.answers
    assert sent.request.headers["Transfer-Encoding"] == "chunked"
    assert len(_stored(answer)) == 30


def test_dicomweb_client_reads_the_warning_of_another_study(stowgate: Service) -> None:
    client, _ = _client(stowgate)

    answer = client.store_instances(_datasets(new_instance()), study_instance_uid=generate_uid())

    assert [item.WarningReason for item in answer.ReferencedSOPSequence] == [0xB007]


def test_dicomweb_client_reads_what_failed_beside_what_was_stored(stowgate: Service) -> None:
    client, _ = _client(stowgate)
    good, bad = _datasets(new_instance(), new_instance(StudyInstanceUID=""))

    answer = client.store_instances([good, bad])

    assert _stored(answer) == [good.SOPInstanceUID]
    (failed,) = answer.FailedSOPSequence
    assert (failed.ReferencedSOPInstanceUID, failed.FailureReason) == (bad.SOPInstanceUID, 0xA900)


def test_dicomweb_client_raises_a_409_that_carries_the_dataset(stowgate: Service) -> None:
    client, _ = _client(stowgate)

    with pytest.raises(requests.HTTPError) as refused:
        client.store_instances(_datasets(new_instance(StudyInstanceUID="")))

    assert refused.value.response is not None
    assert refused.value.response.status_code == 409
    dataset = pydicom.Dataset.from_json(refused.value.response.json())
    assert dataset.FailedSOPSequence[0].FailureReason == 0xA900


def test_the_snippet_for_dicomweb_client_stores_the_series(stowgate: Service, desk: Path) -> None:
    code = snippet("dicomweb-client (Python)", "python", url=stowgate.url)

    assert _pasted(code, desk) == "stored 3 of 3\n"


# requests, httpx, aiohttp


def _pieces(*instances: bytes) -> Iterator[bytes]:
    body, _ = multipart(*instances)
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


SENT_BY: dict[str, Callable[[str, Any, dict[str, str]], Any]] = {
    "requests": lambda url, body, headers: requests.post(
        url, data=body, headers=headers, timeout=60
    ),
    "httpx": lambda url, body, headers: httpx.post(url, content=body, headers=headers, timeout=60),
}


@pytest.mark.parametrize("library", SENT_BY)
def test_a_body_that_is_streamed_is_stored(stowgate: Service, library: str) -> None:
    instances = [new_instance() for _ in range(3)]

    answer = SENT_BY[library](
        f"{stowgate.url}/dicomweb/studies", _pieces(*instances), {"Content-Type": MULTIPART}
    )

    assert answer.status_code == 200
    assert answer.request.headers["Transfer-Encoding"] == "chunked"
    assert len(answer.json()["00081199"]["Value"]) == 3
    assert stowgate.opened(answer.headers["X-Payload-ID"])["file_count"] == 3


@pytest.mark.parametrize("library", SENT_BY)
def test_a_file_that_is_streamed_is_stored(stowgate: Service, desk: Path, library: str) -> None:
    with (desk / "image.dcm").open("rb") as file:
        answer = SENT_BY[library](
            f"{stowgate.url}/dicomweb/studies", file, {"Content-Type": "application/dicom"}
        )

    assert answer.status_code == 200
    assert answer.request.headers["Content-Length"] == str(os.path.getsize(desk / "image.dcm"))
    (stored,) = (stowgate.data / "monaideploy" / answer.headers["X-Payload-ID"]).rglob("*.dcm")
    assert stored.read_bytes() == (desk / "image.dcm").read_bytes()


def test_a_form_is_refused_with_what_would_be_taken(stowgate: Service, desk: Path) -> None:
    answer = httpx.post(
        f"{stowgate.url}/dicomweb/studies", files={"file": (desk / "image.dcm").read_bytes()}
    )

    assert answer.status_code == 415
    assert (
        answer.headers["Accept-Post"]
        == 'application/dicom, multipart/related; type="application/dicom"'
    )


def test_the_multipart_writer_of_aiohttp_is_taken(stowgate: Service, desk: Path) -> None:
    async def post() -> tuple[int, Any]:
        with aiohttp.MultipartWriter("related") as body:
            for path in (desk / "series").iterdir():
                body.append(path.open("rb"), {"Content-Type": "application/dicom"})
        url = f"{stowgate.url}/dicomweb/studies"
        async with aiohttp.ClientSession() as session, session.post(url, data=body) as answer:
            return answer.status, await answer.json(content_type="application/dicom+json")

    status, dataset = asyncio.run(post())

    assert status == 200
    assert len(dataset["00081199"]["Value"]) == 3


def test_the_snippets_for_requests_store_the_image_and_the_series(
    stowgate: Service, desk: Path
) -> None:
    one = _pasted(snippet("requests", "python", 1, url=stowgate.url), desk)
    many = _pasted(snippet("requests", "python", 2, url=stowgate.url), desk)

    status, payload_id = one.split()
    assert status == "200"
    assert stowgate.opened(payload_id)["file_count"] == 1
    assert many == "stored 3 of 3\n"


def test_the_snippet_for_httpx_stores_the_series(stowgate: Service, desk: Path) -> None:
    assert _pasted(snippet("httpx", "python", url=stowgate.url), desk) == "stored 3 of 3\n"


def test_the_snippet_for_aiohttp_stores_the_series(stowgate: Service, desk: Path) -> None:
    assert _pasted(snippet("aiohttp", "python", url=stowgate.url), desk) == "stored 3 of 3\n"
