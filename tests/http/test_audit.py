"""The audit trail, as an operator finds it in the log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
from instances import BOUNDARY, multipart, new_instance
from service import Service, running, wait_for

from api.auth.basic import user_line
from api.http.routes import Scope

ALL, READER = ("boss", "a-password-of-boss"), ("reader", "a-password-of-reader")
DICOM = "application/dicom"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("audit")
    users: Path = folder / "users"
    lines = [user_line(ALL[0], list(Scope), ALL[1]), user_line(READER[0], [Scope.READ], READER[1])]
    users.write_text("\n".join(lines))
    with running(
        "run", folder, STOWGATE_AUTH="basic", STOWGATE_USERS=str(users), STOWGATE_LOG="json"
    ) as service:
        yield service


def _ask(
    service: Service,
    method: str,
    path: str,
    who: tuple[str, str] | None = ALL,
    **given: Any,
) -> tuple[requests.Response, list[dict[str, Any]]]:
    """Return the response and its lines of the audit trail."""
    before = len(_lines(service))
    answer = requests.request(method, service.url + path, auth=who, timeout=30, **given)
    # The line of this later request shows that all lines before it are written.
    marker = requests.post(f"{service.url}/payloads/{uuid4()}/replay", auth=ALL, timeout=30)
    assert marker.status_code == 404
    lines = wait_for(lambda: _through_marker(_lines(service)[before:]))
    return answer, lines[:-1]


def _through_marker(lines: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    return lines if lines and lines[-1]["event"] == "replay payload" else None


def _lines(service: Service) -> list[dict[str, Any]]:
    written = service.log.read_text().splitlines()
    lines = [json.loads(line) for line in written if line.endswith("}")]
    return [line for line in lines if line["logger"] == "audit"]


def _post(service: Service, body: bytes, content_type: str, **given: Any) -> Any:
    headers = {"Content-Type": content_type}
    return _ask(service, "POST", "/dicomweb/studies", data=body, headers=headers, **given)


def test_the_line_of_an_upload_has_caller_address_payload_and_outcome(
    service: Service,
) -> None:
    body, content_type = multipart(new_instance(), b"no instance")

    answer, (line,) = _post(service, body, content_type)

    assert (answer.status_code, line["status"]) == (202, 202)
    assert (line["event"], line["outcome"]) == ("store", "done")
    assert (line["caller"], line["address"]) == ("boss", "127.0.0.1")
    assert line["payload_id"] == answer.headers["X-Payload-ID"]
    assert line["correlation_id"] == answer.headers["X-Correlation-ID"]
    assert (line["stored"], line["failed"]) == (1, 1)


def test_a_refused_upload_is_recorded(service: Service) -> None:
    answer, (line,) = _post(service, b"no instance", DICOM)

    assert (answer.status_code, line["status"], line["outcome"]) == (409, 409, "refused")
    assert (line["stored"], line["failed"], line["payload_id"]) == (0, 1, None)

    answer, (line,) = _post(service, b"--", f"multipart/related; boundary={BOUNDARY}")

    assert (answer.status_code, line["status"], line["outcome"]) == (400, 400, "refused")


def test_a_replayed_response_is_recorded_with_its_payload(service: Service) -> None:
    headers = {"Content-Type": DICOM, "Idempotency-Key": str(uuid4())}
    instance = new_instance()

    first, (line,) = _ask(service, "POST", "/dicomweb/studies", data=instance, headers=headers)
    _, (again,) = _ask(service, "POST", "/dicomweb/studies", data=instance, headers=headers)

    assert "answered_before" not in line
    assert again["answered_before"] is True
    assert again["payload_id"] == line["payload_id"] == first.headers["X-Payload-ID"]


@pytest.mark.parametrize(
    ("who", "status", "caller"),
    [(None, 401, None), (("boss", "wrong"), 401, None), (READER, 403, "reader")],
)
def test_denied_access_is_recorded(
    service: Service, who: tuple[str, str] | None, status: int, caller: str | None
) -> None:
    answer, (line,) = _post(service, new_instance(), DICOM, who=who)

    assert answer.status_code == line["status"] == status
    assert (line["event"], line["outcome"], line["caller"]) == ("store", "refused", caller)

    answer, (line,) = _ask(service, "GET", "/payloads", who=("boss", "wrong"))

    assert (answer.status_code, line["event"], line["outcome"]) == (401, "read", "refused")


def test_administration_is_recorded_with_the_vae(service: Service) -> None:
    vae = {"virtualAeTitle": "AUDITED", "workflows": ["w"]}
    acts = (
        ("POST", "", vae, 201, "create VAE"),
        ("POST", "", vae, 409, "create VAE"),
        ("PUT", "", {"name": "AUDITED", "workflows": []}, 200, "change VAE"),
        ("DELETE", "/AUDITED", None, 200, "remove VAE"),
        ("DELETE", "/AUDITED", None, 404, "remove VAE"),
    )
    for method, path, body, status, act in acts:
        answer, (line,) = _ask(service, method, f"/config/vae{path}", json=body)

        assert answer.status_code == line["status"] == status
        assert (line["event"], line["caller"]) == (act, "boss")
        assert line["outcome"] == ("done" if status < 400 else "refused")
        assert line["vae"] == "AUDITED"


def test_an_options_request_is_not_recorded(service: Service) -> None:
    _, lines = _ask(service, "OPTIONS", "/dicomweb/studies")

    assert lines == []


def test_read_requests_are_not_recorded(service: Service) -> None:
    for path in ("/payloads", "/config/vae", "/health/ready", "/metrics", "/openapi.json"):
        answer, lines = _ask(service, "GET", path)

        assert (answer.status_code, lines) == (200, [])


def test_invalid_ids_of_a_sender_are_not_recorded(service: Service) -> None:
    for path in ("/dicomweb/vae/%0a%7bFORGED%7d/studies", "/dicomweb/FORGED%20%0d%0a/studies"):
        answer, (line,) = _ask(service, "POST", path, data=b"x", headers={"Content-Type": DICOM})

        assert answer.status_code == 400
        assert "FORGED" not in json.dumps(line)
