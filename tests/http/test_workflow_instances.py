"""How far a payload is: what the Workflow Manager's API says, asked on demand."""

import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from answering import Answering, serving
from certificates import Certificates, certificates
from instances import new_instance
from service import STOWGATE, Service, environment, running

PAYLOAD_OF_ANOTHER = "01890000-0000-7000-8000-000000000000"
SECRET = "DOE^JANE"


class WorkflowManager(Answering):
    """Answers as the real one does, or as a test wants."""

    status: ClassVar[int] = 200
    body: ClassVar[bytes | None] = None
    hold: ClassVar[threading.Event | None] = None
    asked: ClassVar[list[tuple[str, dict[str, list[str]], str | None]]] = []

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        self.asked.append((url.path, query, self.headers["Authorization"]))
        if self.hold is not None:
            self.hold.wait(30)
        body = self.body
        if body is None:
            body = json.dumps([instance(query["payloadId"][0])]).encode()
        self.answer(self.status, body)


def instance(payload_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": "4d3c2b1a-0000-4000-8000-000000000001",
        "ae_title": "LUNG",
        "workflow_id": "w-1",
        "workflow_name": "Lung nodules",
        "payload_id": payload_id,
        "start_time": "2026-11-29T12:00:00.123Z",
        "status": "Failed",
        "input_metadata": {"patient": SECRET},
        "tasks": [
            {
                "execution_id": "x",
                "task_type": "argo",
                "task_id": "segment",
                "status": "Failed",
                "reason": "ExternalServiceError",
                "result_metadata": {"patient": SECRET},
                "input_parameters": {"patient_name": SECRET},
            }
        ],
    } | changes


SHOWN = {
    "id": "4d3c2b1a-0000-4000-8000-000000000001",
    "workflow_id": "w-1",
    "workflow_name": "Lung nodules",
    "status": "Failed",
    "start_time": "2026-11-29T12:00:00.123Z",
    "tasks": [
        {
            "task_id": "segment",
            "task_type": "argo",
            "status": "Failed",
            "reason": "ExternalServiceError",
        }
    ],
}


@contextmanager
def _site(folder: Path, url: str, **settings: str) -> Iterator[tuple[Service, str]]:
    """A Stowgate, and a payload that it opened."""
    with running("run", folder, STOWGATE_WORKFLOW_MANAGER_URL=url, **settings) as service:
        answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")
        payload_id = answer.headers["X-Payload-ID"]
        service.opened(payload_id)
        yield service, payload_id


def _answering(**how: Any) -> type[WorkflowManager]:
    return type("Answers", (WorkflowManager,), {"asked": [], **how})


def test_a_payload_shows_its_workflow_instances_and_no_other_field_of_them(tmp_path: Path) -> None:
    handler = _answering()
    with serving(handler) as url, _site(tmp_path, f"{url}/base") as (service, payload_id):
        handler.asked.clear()
        shown = service.get(f"/payloads/{payload_id}")
        listed = service.get("/payloads")

    assert shown.json()["workflow_instances"] == [SHOWN]
    assert shown.json()["workflow_instances_error"] is None
    assert SECRET not in shown.text
    assert handler.asked == [
        (
            "/base/workflowinstances",
            {"payloadId": [payload_id], "disablePagination": ["true"]},
            None,
        )
    ]
    assert "workflow_instances" not in listed.json()["payloads"][0]
    assert SECRET not in service.log.read_text()


@pytest.mark.parametrize(
    ("settings", "sent"),
    [
        (
            {
                "STOWGATE_WORKFLOW_MANAGER_USER": "me",
                "STOWGATE_WORKFLOW_MANAGER_PASSWORD": "secret-word",
            },
            "Basic bWU6c2VjcmV0LXdvcmQ=",
        ),
        ({"STOWGATE_WORKFLOW_MANAGER_TOKEN": "secret-word"}, "Bearer secret-word"),
    ],
)
def test_the_workflow_manager_is_given_the_credentials(
    tmp_path: Path, settings: dict[str, str], sent: str
) -> None:
    handler = _answering()
    with serving(handler) as url, _site(tmp_path, url, **settings) as (service, payload_id):
        service.get(f"/payloads/{payload_id}")

    assert {authorization for _, _, authorization in handler.asked} == {sent}
    assert "secret-word" not in service.log.read_text()


@contextmanager
def _serving_tls(handler: type[Answering], made: Certificates) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def test_the_workflow_manager_is_asked_only_where_its_certificate_is_vouched_for(
    tmp_path: Path,
) -> None:
    made = certificates(tmp_path / "certificates")
    ca = {"STOWGATE_WORKFLOW_MANAGER_CA": str(made.authority)}
    with _serving_tls(_answering(), made) as url:
        with _site(tmp_path / "with", url, **ca) as (service, payload_id):
            trusted = service.get(f"/payloads/{payload_id}").json()
        with _site(tmp_path / "without", url) as (service, payload_id):
            unknown = service.get(f"/payloads/{payload_id}").json()

    assert trusted["workflow_instances"] == [SHOWN]
    assert unknown["workflow_instances"] is None
    assert "cannot be reached (SSLError)" in unknown["workflow_instances_error"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"status": 401, "body": b"{}"}, "answered 401"),
        ({"status": 302, "body": b""}, "answered 302"),
        ({"body": SECRET.encode()}, "something other than JSON"),
        ({"body": b'{"data": []}'}, "something other than a list"),
        ({"body": b"[" + b" " * (8 << 20) + b"]"}, "more than 8388608 bytes"),
    ],
)
def test_an_answer_that_cannot_be_used_is_reported_and_the_payload_is_shown_all_the_same(
    tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    with serving(_answering(**how)) as url, _site(tmp_path, url) as (service, payload_id):
        shown = service.get(f"/payloads/{payload_id}")

    assert (shown.status_code, shown.json()["state"]) == (200, "opened")
    assert shown.json()["workflow_instances"] is None
    assert words in shown.json()["workflow_instances_error"]
    assert "STOWGATE_WORKFLOW_MANAGER_URL" in shown.json()["workflow_instances_error"]
    assert SECRET not in shown.text


def test_a_workflow_manager_that_is_silent_or_away_costs_a_short_wait(tmp_path: Path) -> None:
    hold = threading.Event()
    with serving(_answering(hold=hold)) as url, _site(tmp_path, url) as (service, payload_id):
        hold.clear()
        silent = service.get(f"/payloads/{payload_id}").json()
        hold.set()
    assert "cannot be reached (ReadTimeoutError)" in silent["workflow_instances_error"]

    with _site(tmp_path / "away", "http://127.0.0.1:1") as (service, payload_id):
        away = service.get(f"/payloads/{payload_id}").json()
    assert "cannot be reached" in away["workflow_instances_error"]
    assert away["state"] == "opened"


def test_many_looks_at_once_while_it_is_silent_keep_nobody_else_waiting(tmp_path: Path) -> None:
    hold = threading.Event()
    with (
        serving(_answering(hold=hold)) as url,
        _site(tmp_path, url, STOWGATE_API_THREADS="4") as (service, payload_id),
    ):
        answers: list[dict[str, Any]] = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(service.get(f"/payloads/{payload_id}").json())
            )
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        assert service.get("/health/live").status_code == 200
        for thread in threads:
            thread.join(60)
        hold.set()
    words = [answer["workflow_instances_error"] for answer in answers]
    assert len(words) == 12
    assert any("is being asked about other payloads" in text for text in words)


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ([], []),
        ([instance(PAYLOAD_OF_ANOTHER)], []),
        (["text", 7, None], []),
        (
            [{"status": f"Failed {SECRET} " * 20, "id": 7, "workflow_name": "a\nb", "tasks": "x"}],
            [dict.fromkeys(SHOWN) | {"tasks": []}],
        ),
        (
            [{"tasks": [{"reason": f"patient {SECRET}", "task_id": "a b\r\n"}, 7]}],
            [
                dict.fromkeys(SHOWN)
                | {"tasks": [dict.fromkeys(("task_id", "task_type", "status", "reason"))]}
            ],
        ),
    ],
)
def test_only_values_in_the_expected_form_are_passed_on(
    tmp_path: Path, found: list[Any], shown: list[Any]
) -> None:
    handler = _answering(body=json.dumps(found).encode())
    with serving(handler) as url, _site(tmp_path, url) as (service, payload_id):
        payload = service.get(f"/payloads/{payload_id}").json()

    assert payload["workflow_instances"] == shown


def test_check_asks_the_workflow_managers_api(tmp_path: Path) -> None:
    def check(url: str) -> str:
        settings = {"STOWGATE_WORKFLOW_MANAGER_URL": url}
        return subprocess.run(
            [STOWGATE, "check"],
            env=environment(tmp_path, settings),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout

    with serving(_answering()) as url:
        assert "ok        API of the Workflow Manager" in check(url)
    assert "wrong     API of the Workflow Manager: " in check("http://127.0.0.1:1")
