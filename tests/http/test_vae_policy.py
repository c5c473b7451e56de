"""The policy of a Virtual Application Entity: what it rejects, and with which reason."""

import socket
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import requests
from instances import multipart, new_instance, real_file, uid
from jsonschema import ValidationError, validate
from service import Service

CT = real_file()
MR = real_file("MR_small.dcm")
JPEG_2000 = real_file("JPEG2000.dcm")

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


def _vae(service: Service, **policy: Any) -> str:
    title = f"AE-{uuid4().hex[:8]}"
    created = requests.post(
        f"{service.url}/config/vae", json={"virtualAeTitle": title, **policy}, timeout=30
    )
    assert created.status_code == 201, created.text
    return title


def _change(service: Service, title: str, **policy: Any) -> dict[str, Any]:
    changed = requests.put(f"{service.url}/config/vae", json={"name": title, **policy}, timeout=30)
    assert changed.status_code == 200, changed.text
    vae: dict[str, Any] = changed.json()
    return vae


def _post(service: Service, title: str, *instances: bytes) -> Any:
    return service.post(f"/dicomweb/vae/{title}/studies", *multipart(*instances))


@pytest.mark.parametrize(
    ("policy", "refused", "reason", "words"),
    [
        ({"acceptedSopClasses": [CT_IMAGE]}, MR, 0x0122, "SOP Class 1.2.840.10008.5.1.4.1.1.4"),
        (
            {"acceptedTransferSyntaxes": [EXPLICIT]},
            JPEG_2000,
            0xC122,
            "transfer syntax 1.2.840.10008.1.2.4.91",
        ),
        ({"acceptedModalities": ["CT", "PT"]}, MR, 0xA900, "Modality (0008,0060)"),
        ({"acceptedModalities": ["CT"]}, new_instance(Modality=None), 0xA900, "no valid Modality"),
    ],
    ids=["SOP class", "transfer syntax", "modality", "no modality"],
)
def test_an_instance_outside_the_policy_fails_alone(
    stowgate: Service, policy: dict[str, Any], refused: bytes, reason: int, words: str
) -> None:
    title = _vae(stowgate, **policy)

    some = _post(stowgate, title, refused, CT)

    assert some.status_code == 202, some.text
    (stored,) = some.json()["00081199"]["Value"]
    assert stored["00081155"]["Value"] == [uid(CT, "SOPInstanceUID")]
    (failed,) = some.json()["00081198"]["Value"]
    assert failed["00081155"]["Value"] == [uid(refused, "SOPInstanceUID")]
    assert failed["00081197"]["Value"] == [reason]
    told = failed["00091001"]["Value"][0]
    assert told.startswith("part 1: ")
    assert words in told
    assert title in told
    assert stowgate.opened(some.headers["X-Payload-ID"])["file_count"] == 1

    none = _post(stowgate, title, refused)

    assert none.status_code == 409
    assert "X-Payload-ID" not in none.headers
    assert stowgate.post("/dicomweb/studies", *multipart(refused)).status_code == 200


def test_an_instance_over_the_size_limit_of_a_vae_is_413_while_it_arrives(
    stowgate: Service,
) -> None:
    title = _vae(stowgate, maxInstanceBytes=len(CT))
    assert _post(stowgate, title, CT).status_code == 200

    place = urlsplit(stowgate.url)
    with socket.create_connection((place.hostname, place.port), 30) as sock:
        sock.sendall(
            f"POST /dicomweb/vae/{title}/studies HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/dicom\r\nContent-Length: {4 << 20}\r\n\r\n".encode()
            + bytes(2 << 20)
        )
        answer = b""
        while piece := sock.recv(65536):
            answer += piece

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert str(len(CT)).encode() in answer


def test_the_rate_limit_of_a_vae_does_not_affect_others(
    stowgate: Service,
) -> None:
    title, other = (_vae(stowgate, maxRequestsPerMinute=1) for _ in range(2))
    assert _post(stowgate, title, CT).status_code == 200

    too_often = _post(stowgate, title, CT)

    assert too_often.status_code == 429
    assert 1 <= int(too_often.headers["Retry-After"]) <= 60
    assert (
        f"rate limit exceeded: 1 requests per minute for VAE {title}" in too_often.json()["detail"]
    )
    assert _post(stowgate, other, CT).status_code == 200
    assert stowgate.post("/dicomweb/studies", *multipart(CT)).status_code == 200


def test_a_policy_can_be_changed_and_removed_without_other_changes(stowgate: Service) -> None:
    title = _vae(stowgate, workflows=["w"], acceptedModalities=["MR"], maxInstanceBytes=10**6)
    assert _post(stowgate, title, CT).status_code == 409

    widened = _change(stowgate, title, acceptedModalities=["MR", "CT"])

    assert widened["acceptedModalities"] == ["MR", "CT"]
    assert (widened["workflows"], widened["maxInstanceBytes"]) == (["w"], 10**6)
    assert _post(stowgate, title, CT).status_code == 200

    no_modalities: list[str] = []
    for nothing in (no_modalities, None):
        opened = _change(stowgate, title, acceptedModalities=nothing, maxInstanceBytes=None)
        assert {"acceptedModalities", "maxInstanceBytes"} & set(opened) == set()
        assert _post(stowgate, title, new_instance(Modality="OT")).status_code == 200


def test_a_limit_may_have_a_fraction_of_zero(stowgate: Service) -> None:
    changed = _change(stowgate, _vae(stowgate), maxInstanceBytes=1e6)

    assert changed["maxInstanceBytes"] == 10**6


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"acceptedSopClasses": ["CT Image Storage"]}, "acceptedSopClasses: item 0: a UID"),
        ({"acceptedTransferSyntaxes": ["1.2.840", "1..2"]}, "item 1: a UID"),
        ({"acceptedModalities": ["ct"]}, "a modality is 1 to 16"),
        ({"acceptedModalities": [" CT"]}, "a modality is 1 to 16"),
        ({"acceptedModalities": ["CT "]}, "a modality is 1 to 16"),
        ({"acceptedModalities": "CT"}, "acceptedModalities"),
        ({"maxInstanceBytes": 0}, "maxInstanceBytes"),
        ({"maxInstanceBytes": 1.5}, "maxInstanceBytes"),
        ({"maxRequestsPerMinute": -1}, "maxRequestsPerMinute"),
        ({"maxRequestsPerMinute": 1_000_001}, "maxRequestsPerMinute"),
        ({"maxRequestsPerMinute": "many"}, "maxRequestsPerMinute"),
        ({"source": "sixteen-letters-"}, "a source is 1 to 15"),
        ({"source": ""}, "a source is 1 to 15"),
        ({"source": " CT"}, "a source is 1 to 15"),
        ({"source": "CT:1"}, "a source is 1 to 15"),
        ({"source": 7}, "source"),
    ],
)
def test_an_invalid_policy_is_400_and_violates_the_openapi_schema(
    stowgate: Service, policy: dict[str, Any], words: str
) -> None:
    title = _vae(stowgate)
    document = stowgate.get("/openapi.json").json()

    for method, body in (("POST", {"virtualAeTitle": "x"}), ("PUT", {"name": title})):
        answer = requests.request(
            method, f"{stowgate.url}/config/vae", json=body | policy, timeout=30
        )

        assert answer.status_code == 400
        assert words in answer.json()["detail"]
        published = document["paths"]["/config/vae"][method.lower()]["requestBody"]
        schema = published["content"]["application/json"]["schema"]
        with pytest.raises(ValidationError):
            validate(body | policy, schema | {"components": document["components"]})
