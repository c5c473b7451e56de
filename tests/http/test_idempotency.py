"""Idempotency-Key: a repeated POST gets the first answer and opens nothing new."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import requests
from instances import BOUNDARY, multipart, new_instance
from limits import MAX_PART_BYTES, MAX_PARTS
from pydicom.uid import generate_uid
from service import Service, running, wait_for

STUDIES = "/dicomweb/studies"


def _post(
    service: Service, key: str, *instances: bytes, path: str = STUDIES, **headers: str
) -> requests.Response:
    body, content_type = multipart(*instances)
    answer: requests.Response = service.post(
        path, body, content_type, **{"Idempotency-Key": key}, **headers
    )
    return answer


def _payloads(service: Service) -> int:
    return len(service.get("/payloads?limit=200").json()["payloads"])


def test_a_repeated_key_gets_the_first_answer_and_opens_nothing(
    stowgate: Service,
) -> None:
    key, other_study = str(uuid4()), generate_uid()
    instances = [new_instance(), new_instance(StudyInstanceUID=other_study), b"no DICOM"]
    first = _post(stowgate, key, *instances)
    stowgate.opened(first.headers["X-Payload-ID"])
    before = _payloads(stowgate)

    body, content_type = multipart(*instances)
    other_boundary = (
        body.replace(BOUNDARY.encode(), b"anew"),
        content_type.replace(BOUNDARY, "anew"),
    )
    again = stowgate.post(STUDIES, *other_boundary, **{"Idempotency-Key": key})

    assert first.status_code == again.status_code == 202
    assert again.content == first.content
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    for header in ("X-Payload-ID", "Link", "Content-Type"):
        assert again.headers[header] == first.headers[header]
    assert _payloads(stowgate) == before


def test_a_repeated_xml_answer_is_xml_again(stowgate: Service) -> None:
    key, instance = str(uuid4()), new_instance()

    first = _post(stowgate, key, instance, Accept="application/dicom+xml")
    again = _post(stowgate, key, instance)

    assert first.headers["Content-Type"] == again.headers["Content-Type"] == "application/dicom+xml"
    assert first.content == again.content


def test_another_body_with_the_same_key_is_422(stowgate: Service) -> None:
    key = str(uuid4())
    assert _post(stowgate, key, new_instance()).status_code == 200

    answer = _post(stowgate, key, new_instance())

    assert answer.status_code == 422
    assert "Idempotency-Key" in answer.json()["detail"]
    assert "X-Payload-ID" not in answer.headers


@pytest.mark.parametrize(
    ("instances", "words"),
    [
        ([bytes(MAX_PART_BYTES + 1)], f"part 1 is over the limit of {MAX_PART_BYTES} bytes"),
        ([b"."] * (MAX_PARTS + 1), f"the request has more parts than the limit of {MAX_PARTS}"),
    ],
)
def test_a_used_key_does_not_bypass_the_limits(
    stowgate: Service, instances: list[bytes], words: str
) -> None:
    key = str(uuid4())
    assert _post(stowgate, key, new_instance()).status_code == 200

    answer = _post(stowgate, key, *instances)

    assert (answer.status_code, answer.json()["detail"]) == (413, words)


def test_the_same_key_for_another_path_is_another_key(stowgate: Service) -> None:
    key, instance = str(uuid4()), new_instance()

    one = _post(stowgate, key, instance)
    two = _post(stowgate, key, instance, path="/dicomweb/w-1/studies")

    assert (one.status_code, two.status_code) == (200, 200)
    assert one.headers["X-Payload-ID"] != two.headers["X-Payload-ID"]


@pytest.mark.parametrize("key", ["", "k" * 256, "with space", "tab\tbed"])
def test_an_invalid_key_is_400(stowgate: Service, key: str) -> None:
    answer = _post(stowgate, key, new_instance())

    assert answer.status_code == 400
    assert "Idempotency-Key" in answer.json()["detail"]


def test_an_invalid_key_is_400_without_a_body_too(stowgate: Service) -> None:
    answer = stowgate.post(STUDIES, b"", "application/dicom", **{"Idempotency-Key": "with space"})

    assert answer.status_code == 400


def test_a_refused_post_releases_its_key(stowgate: Service) -> None:
    key, instance = str(uuid4()), new_instance()
    body, content_type = multipart(instance)
    cut = stowgate.post(STUDIES, body[:-10], content_type, **{"Idempotency-Key": key})
    nothing_stored = _post(stowgate, key, b"no DICOM")

    answer = _post(stowgate, key, instance)

    assert (cut.status_code, nothing_stored.status_code, answer.status_code) == (400, 409, 200)


def test_one_of_many_concurrent_posts_runs_and_the_others_get_409_or_its_answer(
    stowgate: Service,
) -> None:
    key, instances = str(uuid4()), [new_instance() for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: _post(stowgate, key, *instances), range(8)))

    stored = [answer for answer in answers if answer.status_code == 200]
    assert stored
    assert len({answer.headers["X-Payload-ID"] for answer in stored}) == 1
    assert len({answer.content for answer in stored}) == 1
    for answer in answers:
        if answer not in stored:
            assert answer.status_code == 409
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert int(answer.headers["Retry-After"]) > 0


@contextmanager
def _replicas(data: Path, lease_seconds: int) -> Iterator[tuple[Service, Service]]:
    settings = {"STOWGATE_LEASE_SECONDS": str(lease_seconds)}
    with running("api", data, **settings) as one, running("api", data, **settings) as two:
        yield one, two


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[tuple[Service, Service]]:
    with _replicas(tmp_path, 2) as both:
        yield both


def test_a_key_is_valid_at_every_replica(replicas: tuple[Service, Service]) -> None:
    key, instance = str(uuid4()), new_instance()

    first, again = (_post(replica, key, instance) for replica in replicas)

    assert first.status_code == again.status_code == 200
    assert first.headers["X-Payload-ID"] == again.headers["X-Payload-ID"]


@pytest.fixture
def replicas_of_long_leases(tmp_path: Path) -> Iterator[tuple[Service, Service]]:
    """The lease outlives whatever a busy machine does between two requests."""
    with _replicas(tmp_path, 10) as both:
        yield both


def test_a_key_whose_api_was_killed_is_taken_over_when_its_lease_ends(
    replicas_of_long_leases: tuple[Service, Service],
) -> None:
    doomed, survivor = replicas_of_long_leases
    key, instance = str(uuid4()), new_instance()
    seen: list[int] = []

    def body() -> Iterator[bytes]:
        whole, _ = multipart(instance)
        yield whole[:1000]
        wait_for(lambda: "in_progress 1.0" in doomed.get("/metrics").text)
        answer = _post(survivor, key, instance)
        seen.append(answer.status_code)
        doomed.kill()
        yield whole[1000:]

    with pytest.raises(requests.ConnectionError):
        doomed.post(
            STUDIES,
            body(),
            f"multipart/related; boundary={BOUNDARY}",
            **{"Idempotency-Key": key},
        )

    def taken_over() -> requests.Response | None:
        answer = _post(survivor, key, instance)
        return answer if answer.status_code != 409 else None

    answer = wait_for(taken_over, seconds=40)
    assert seen == [409]
    assert answer.status_code == 200
    assert _post(survivor, key, instance).headers["X-Payload-ID"] == answer.headers["X-Payload-ID"]


def test_a_long_upload_keeps_its_key(replicas: tuple[Service, Service]) -> None:
    one, two = replicas
    key = str(uuid4())
    instances = [new_instance(PixelData=bytes(3 << 20), Rows=1024, Columns=1536) for _ in range(3)]
    small = new_instance()
    seen: list[int] = []

    def body() -> Iterator[bytes]:
        whole, _ = multipart(*instances)
        for start in range(0, len(whole), 1 << 20):
            yield whole[start : start + (1 << 20)]
            seen.append(_post(two, key, small).status_code)
            # In total longer than the lease, with shorter pauses between the pieces.
            time.sleep(0.5)

    answer = one.post(
        STUDIES, body(), f"multipart/related; boundary={BOUNDARY}", **{"Idempotency-Key": key}
    )

    assert answer.status_code == 200
    assert set(seen[1:]) == {409}
