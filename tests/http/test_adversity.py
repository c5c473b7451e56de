"""The answers while the service lacks a dependency or a resource."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import requests
from disks import small_disk
from engines import ObjectStoreEndpoint
from instances import BOUNDARY, multipart, new_instance
from prometheus_client import CollectorRegistry
from service import running, wait_for
from structlog.testing import capture_logs

from api.main import compose
from api.settings import ApiSettings
from shared.runtime.backends import open_backends
from shared.settings.loader import load


def test_a_store_that_fills_up_keeps_stored_instances_and_reports_the_others(
    tmp_path: Path,
) -> None:
    small, large = new_instance(), new_instance("MR_small.dcm", PixelData=bytes(4 << 20))
    settings = {"STOWGATE_SPOOL_MEMORY_BYTES": str(16 << 20)}
    with (
        small_disk(tmp_path / "small", mebibytes=3) as disk,
        running("run", disk, **settings) as service,
    ):
        answer = service.post("/dicomweb/studies", *multipart(small, large, small))

        assert answer.status_code == 202, answer.text
        (failed,) = answer.json()["00081198"]["Value"]
        assert failed["00081197"]["Value"] == [0xA700]
        assert len(answer.json()["00081199"]["Value"]) == 1
        assert service.opened(answer.headers["X-Payload-ID"])["file_count"] == 1

        full = service.post("/dicomweb/studies", *multipart(large))

        assert full.status_code == 507
        assert full.json()["detail"].count("when there is room") == 1
        assert "X-Payload-ID" not in full.headers


def _with_store(url: str) -> dict[str, str]:
    return {
        "STOWGATE_OBJECT_STORE": url,
        "STOWGATE_OBJECT_STORE_ACCESS_KEY": "nobody",
        "STOWGATE_OBJECT_STORE_SECRET_KEY": "nothing-right",
    }


def test_the_service_starts_without_its_object_store_and_answers_503(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with running("run", tmp_path, **_with_store(url)) as service:
            answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")
            ready = service.get("/health/ready")
            live = service.get("/health/live")

    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert "object store" in answer.json()["detail"]
    assert (ready.status_code, ready.json()["status"], live.status_code) == (200, "down", 200)
    assert ready.json()["dependencies"]["object_store"]["status"] == "down"


def test_an_object_store_that_refuses_is_500(
    object_store_endpoint: ObjectStoreEndpoint, tmp_path: Path
) -> None:
    url = object_store_endpoint.url
    with running("run", tmp_path, **_with_store(url)) as service:
        answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")

    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "STOWGATE_OBJECT_STORE_ACCESS_KEY" in answer.json()["detail"]
    assert "nothing-right" not in answer.text
    assert "X-Payload-ID" not in answer.headers


def test_a_damaged_vae_registry_is_reported(tmp_path: Path) -> None:
    with running("run", tmp_path) as service:
        registry = tmp_path / "stowgate" / "vae" / "registry.json"
        wait_for(lambda: service.get("/health/ready").ok)
        registry.parent.mkdir()
        registry.write_text('[{"name": "DOE^JANE"}]')
        listed = service.get("/config/vae")
        posted = service.post("/dicomweb/vae/CT/studies", new_instance(), "application/dicom")

    assert (listed.status_code, posted.status_code) == (500, 500)
    assert listed.json()["detail"].startswith("vae/registry.json is not a valid registry of VAEs")
    assert posted.json()["detail"].startswith("nothing was acknowledged: vae/registry.json")
    assert "DOE" not in service.log.read_text() + listed.text + posted.text


def test_an_unexpected_error_is_logged_with_type_and_place_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("STOWGATE_DATA", str(tmp_path))
    settings = load(ApiSettings)
    app = compose(settings, open_backends(settings, store_threads=4), CollectorRegistry())

    def fails() -> NoReturn:
        raise ValueError("DOE^JANE")

    app.view_functions["openapi"] = fails
    with capture_logs() as logged:
        answer = app.test_client().get("/openapi.json")

    assert answer.status_code == 500
    assert json.loads(answer.data)["detail"] == "internal server error; see the log of this service"
    line, audited = logged
    assert (line["event"], line["error"]) == ("request failed", "ValueError")
    assert line["place"].startswith(__file__)
    assert (audited["outcome"], audited["reason"]) == ("refused", "internal")
    assert "DOE" not in f"{logged} {answer.text} {caplog.text}"


def test_the_service_stores_without_its_broker_and_is_degraded(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        broker = f"amqp://guest:guest@127.0.0.1:{closed.getsockname()[1]}/"
        with running("api", tmp_path, STOWGATE_BROKER=broker) as service:
            answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")
            ready = service.get("/health/ready")
            payload = service.get(f"/payloads/{answer.headers['X-Payload-ID']}").json()
            wait_for(lambda: service.metric("stowgate_announcements_failed_total") == 1)

    assert answer.status_code == 200
    assert payload["state"] == "pending"
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")


def test_the_broker_is_connected_to_before_the_first_upload(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker:
        broker.settimeout(30)
        address = f"amqp://guest:guest@127.0.0.1:{broker.getsockname()[1]}/"
        with running("api", tmp_path, STOWGATE_BROKER=address), broker.accept()[0] as connection:
            assert connection.recv(4) == b"AMQP"


def test_failed_announcements_are_counted(tmp_path: Path) -> None:
    in_the_way = tmp_path / "workflow-requests"
    in_the_way.write_text("where the folder should be")
    with running("run", tmp_path) as service:
        answer = service.post("/dicomweb/studies", new_instance(), "application/dicom")

        wait_for(lambda: service.metric("stowgate_attempts_failed_total", kind="transient"))
        wait_for(lambda: service.metric("stowgate_pending") == 1)
        wait_for(lambda: service.metric("stowgate_oldest_pending_seconds"))

        in_the_way.unlink()
        service.opened(answer.headers["X-Payload-ID"])
        wait_for(lambda: service.metric("stowgate_pending") == 0)
        wait_for(lambda: service.metric("stowgate_oldest_pending_seconds") == 0)
        assert service.metric("stowgate_attempts_failed_total", kind="permanent") == 0


def test_uploads_over_the_maximum_are_429(tmp_path: Path) -> None:
    with running(
        "run", tmp_path, STOWGATE_MAX_UPLOADS="1", STOWGATE_UPLOAD_WAIT_SECONDS="0"
    ) as service:

        def in_progress() -> bool:
            return "stowgate_uploads_in_progress 1.0" in service.get("/metrics").text

        turned_away: list[requests.Response] = []

        def slow_body() -> Iterator[bytes]:
            head, content_type = multipart(new_instance())
            yield head[:1000]
            wait_for(in_progress)
            turned_away.append(service.post("/dicomweb/studies", head, content_type))
            yield head[1000:]

        answer = service.post(
            "/dicomweb/studies", slow_body(), f"multipart/related; boundary={BOUNDARY}"
        )

    assert answer.status_code == 200
    assert turned_away[0].status_code == 429
    assert int(turned_away[0].headers["Retry-After"]) > 0
    assert turned_away[0].headers["Content-Type"] == "application/problem+json"


def test_a_public_url_is_the_base_of_every_link(tmp_path: Path) -> None:
    public = "https://pacs.example/stowgate"
    with running(
        "run", tmp_path, STOWGATE_PUBLIC_URL=f"{public}/", STOWGATE_ALLOW_ANYONE="true"
    ) as service:
        one = new_instance()
        answer = service.post("/dicomweb/studies", one, "application/dicom", Host="evil.example")

    assert public not in answer.text
    payload_id = answer.headers["X-Payload-ID"]
    assert answer.headers["Link"] == f'<{public}/payloads/{payload_id}>; rel="status"'
