"""Clients that hang up, give a wrong length, or send a request again: by the clients that do it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import aiohttp
import httpx
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient
from instances import BOUNDARY, multipart, new_instance
from requests.adapters import HTTPAdapter
from service import Service, running, wait_for
from urllib3 import Retry
from wire import connect, head

STUDIES = "/dicomweb/studies"
DICOM = {"Content-Type": "application/dicom"}
MULTIPART = {"Content-Type": f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'}


def _payloads(service: Service) -> set[str]:
    """Those that have an object; one without has no record either."""
    objects = service.data / "monaideploy"
    return {
        Path(folder).relative_to(objects).parts[0]
        for folder, _, files in os.walk(objects)  # which minds no folder that is just removed
        if any(name.endswith(".dcm") for name in files)
    }


def _count(service: Service, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", service.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


# Sent again after 429


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """It takes one upload at a time."""
    with running(
        "run",
        tmp_path_factory.mktemp("narrow"),
        STOWGATE_MAX_UPLOADS="1",
        STOWGATE_UPLOAD_WAIT_SECONDS="0",
        STOWGATE_IDLE_SECONDS="4",
    ) as service:
        yield service


@contextmanager
def busy_until_one_is_turned_away(service: Service) -> Iterator[None]:
    """The only slot is occupied by an upload that is refused once another got its 429."""
    before = _count(service, 'stowgate_posts_total{status="429"}')

    def turned_away() -> bool:
        return _count(service, 'stowgate_posts_total{status="429"}') > before

    def uploads(number: float) -> bool:
        return _count(service, "stowgate_uploads_in_progress") == number

    with connect(service) as sock:
        sock.sendall(
            head(f"POST {STUDIES} HTTP/1.1", "Content-Type: application/dicom", "Content-Length: 9")
        )
        wait_for(lambda: uploads(1))

        def free() -> None:
            wait_for(turned_away)
            sock.sendall(b"no DICOM.")

        freeing = threading.Thread(target=free)
        freeing.start()
        yield
        freeing.join()
        wait_for(lambda: uploads(0))


def _dicomweb_client(service: Service) -> tuple[DICOMwebClient, list[requests.Response]]:
    session, answers = requests.Session(), []
    session.hooks["response"].append(lambda answer, **_: answers.append(answer))
    client = DICOMwebClient(f"{service.url}/dicomweb", session=session)
    client.set_http_retry_params(max_attempts=8, wait_exponential_multiplier=50)
    return client, answers


def _large() -> list[pydicom.Dataset]:
    """More than dicomweb-client's chunk size."""
    return [pydicom.dcmread(BytesIO(new_instance(PixelData=bytes(1_100_000))))]


def test_what_dicomweb_client_sends_again_after_429_is_stored_once(narrow: Service) -> None:
    client, answers = _dicomweb_client(narrow)
    before, datasets = _payloads(narrow), [pydicom.dcmread(BytesIO(new_instance()))]

    with busy_until_one_is_turned_away(narrow):
        stored = client.store_instances(datasets)

    assert len(stored.ReferencedSOPSequence) == 1
    assert [answer.status_code for answer in (answers[0], answers[-1])] == [429, 200]
    assert _payloads(narrow) - before == {answers[-1].headers["X-Payload-ID"]}


def test_the_empty_chunked_body_that_dicomweb_client_sends_again_is_400(narrow: Service) -> None:
    client, answers = _dicomweb_client(narrow)
    before, datasets = _payloads(narrow), _large()

    with busy_until_one_is_turned_away(narrow), pytest.raises(requests.HTTPError) as refused:
        client.store_instances(datasets)

    assert answers[0].status_code == 429
    assert answers[-1].request.headers["Transfer-Encoding"] == "chunked"
    assert refused.value.response is not None
    assert refused.value.response.status_code == 400
    assert "repeated the request without it" in refused.value.response.json()["detail"]
    assert _payloads(narrow) == before


def test_a_larger_chunk_size_has_dicomweb_client_send_all_of_it_again(narrow: Service) -> None:
    client, answers = _dicomweb_client(narrow)
    client.set_chunk_size(1 << 30)
    datasets = _large()

    with busy_until_one_is_turned_away(narrow):
        stored = client.store_instances(datasets)

    assert answers[0].status_code == 429
    assert len(stored.ReferencedSOPSequence) == 1


def _retrying() -> requests.Session:
    session = requests.Session()
    retry = Retry(
        8,
        status_forcelist=[429],
        allowed_methods=None,
        backoff_factor=0.05,
        respect_retry_after_header=False,  # which would cost the test some seconds
    )
    session.mount("http://", HTTPAdapter(max_retries=retry))
    return session


@pytest.mark.parametrize("streamed", [False, True], ids=["bytes", "generator"])
def test_what_requests_sends_again_is_stored_and_what_it_has_lost_is_400(
    narrow: Service, streamed: bool
) -> None:
    body, _ = multipart(new_instance(), new_instance())
    before = _payloads(narrow)

    with busy_until_one_is_turned_away(narrow):
        answer = _retrying().post(
            narrow.url + STUDIES, data=iter([body]) if streamed else body, headers=MULTIPART
        )

    assert answer.raw.retries.history[0].status == 429
    if streamed:
        assert answer.status_code == 400
        assert "empty" in answer.json()["detail"]
        assert _payloads(narrow) == before
    else:
        assert answer.status_code == 200
        assert _payloads(narrow) - before == {answer.headers["X-Payload-ID"]}


# A wrong length


def _curl(curl: Path, service: Service, body: bytes, *arguments: str) -> tuple[int, bytes]:
    done = subprocess.run(
        [
            curl,
            *["-sS", "--data-binary", "@-", "-w"],
            "\n%{http_code}",
            *arguments,
            service.url + STUDIES,
        ],
        input=body,
        capture_output=True,
        timeout=60,
        check=True,
    )
    told, _, status = done.stdout.rpartition(b"\n")
    return int(status), told


def _header(headers: dict[str, str]) -> list[str]:
    return [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]


def test_a_length_that_is_too_small_cuts_the_instance_and_is_told_so(
    curl: Path, stowgate: Service
) -> None:
    before, instance = _payloads(stowgate), new_instance()
    length = _header({"Content-Length": str(len(instance) - 100)})

    one = _curl(curl, stowgate, instance, *_header(DICOM), *length)
    many = _curl(curl, stowgate, multipart(instance)[0], *_header(MULTIPART), *length)

    assert (one[0], many[0]) == (409, 400)
    assert "part 1" in json.loads(one[1])["00081198"]["Value"][0]["00091001"]["Value"][0]
    assert "closing delimiter" in json.loads(many[1])["detail"]
    assert _payloads(stowgate) == before


def test_a_length_that_is_too_large_is_408_when_no_more_comes(curl: Path, narrow: Service) -> None:
    before, instance = _payloads(narrow), new_instance()
    length = _header({"Content-Length": str(len(instance) + 100)})

    status, told = _curl(curl, narrow, instance, *_header(DICOM), *length)

    assert status == 408
    assert json.loads(told)["status"] == 408
    assert _payloads(narrow) == before


def test_both_lengths_which_requests_sends_for_a_generator_with_one_are_400(
    stowgate: Service,
) -> None:
    before, instance = _payloads(stowgate), new_instance()

    answer = requests.post(
        stowgate.url + STUDIES,
        data=iter([instance]),
        headers=DICOM | {"Content-Length": str(len(instance))},
        timeout=60,
    )

    assert "Transfer-Encoding" in answer.request.headers
    assert answer.status_code == 400
    assert _payloads(stowgate) == before


# Hung up


class _Enough(Exception):
    """What a client's body raises in its middle."""


def _hanging_up(service: Service) -> Iterator[bytes]:
    """A body that breaks off when its first instance is in the store."""
    before = _payloads(service)
    body, _ = multipart(*[new_instance(PixelData=bytes(1 << 20)) for _ in range(4)])
    yield body[: len(body) // 2]
    wait_for(lambda: _payloads(service) > before)
    raise _Enough


def _by_requests(url: str, body: Iterator[bytes]) -> None:
    requests.post(url, data=body, headers=MULTIPART, timeout=60)


def _by_httpx(url: str, body: Iterator[bytes]) -> None:
    httpx.post(url, content=body, headers=MULTIPART, timeout=60)


def _by_aiohttp(url: str, body: Iterator[bytes]) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in body:
            yield piece

    async def post() -> None:
        async with aiohttp.ClientSession() as session:
            await session.post(url, data=pieces(), headers=MULTIPART)

    try:
        asyncio.run(post())
    except aiohttp.ClientError as error:
        raise (error.__cause__ or error) from error


@pytest.mark.parametrize(
    "send", [_by_requests, _by_httpx, _by_aiohttp], ids=["requests", "httpx", "aiohttp"]
)
def test_of_a_client_that_hangs_up_nothing_is_left(
    stowgate: Service, send: Callable[[str, Iterator[bytes]], None]
) -> None:
    before = _payloads(stowgate)

    with pytest.raises(_Enough):
        send(stowgate.url + STUDIES, _hanging_up(stowgate))

    wait_for(lambda: _payloads(stowgate) == before)


def test_of_curl_that_gives_up_in_the_middle_nothing_is_left(curl: Path, stowgate: Service) -> None:
    before = _payloads(stowgate)
    body, _ = multipart(*[new_instance() for _ in range(20)])

    done = subprocess.run(
        [
            *(curl, "-sS", "--limit-rate", "100k", "--max-time", "2", "--data-binary", "@-"),
            *_header(MULTIPART),
            stowgate.url + STUDIES,
        ],
        input=body,
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 28, done.stderr
    wait_for(lambda: _payloads(stowgate) == before)


# Sent again after a time-out


@contextmanager
def _standing_still(service: Service) -> Iterator[Callable[[], None]]:
    """Connections are accepted and nothing is answered, until what this yields is called."""
    process_ids = service.process_ids()

    def go_on() -> None:
        for process_id in process_ids:
            os.kill(process_id, signal.SIGCONT)

    for process_id in process_ids:
        os.kill(process_id, signal.SIGSTOP)
    try:
        yield go_on
    finally:
        go_on()


def test_a_whole_request_that_curl_sends_again_after_a_time_out_is_a_request_of_its_own(
    curl: Path, stowgate: Service, desk: Path
) -> None:
    before = _payloads(stowgate)

    with _standing_still(stowgate) as go_on:
        sending = subprocess.Popen(
            [
                *(curl, "-sS", "--retry", "3", "--max-time", "2"),
                *("--data-binary", "@image.dcm", "-o", "answer", "-w", "%{http_code}"),
                *_header(DICOM),
                stowgate.url + STUDIES,
            ],
            cwd=desk,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with sending:
            assert sending.stderr
            assert "timed out" in sending.stderr.readline()
            go_on()
            told, errors = sending.communicate(timeout=60)

    assert told.endswith("200")
    attempts = 2 + errors.count("timed out")
    wait_for(lambda: len(_payloads(stowgate) - before) == attempts)
    assert all(stowgate.opened(new)["file_count"] == 1 for new in _payloads(stowgate) - before)


def test_with_an_idempotency_key_it_is_the_same_request(stowgate: Service) -> None:
    before, body = _payloads(stowgate), new_instance()
    headers = DICOM | {"Idempotency-Key": str(uuid4())}

    with _standing_still(stowgate) as go_on:
        with pytest.raises(requests.ReadTimeout):
            requests.post(stowgate.url + STUDIES, data=body, headers=headers, timeout=(10, 0.5))
        go_on()

        def settled() -> requests.Response | None:
            """another answer than that the first one is still running"""
            again = requests.post(stowgate.url + STUDIES, data=body, headers=headers, timeout=60)
            return again if again.status_code != 409 else None

        answer = wait_for(settled)

    assert answer.status_code == 200
    assert _payloads(stowgate) - before == {answer.headers["X-Payload-ID"]}
    assert stowgate.opened(answer.headers["X-Payload-ID"])["file_count"] == 1
