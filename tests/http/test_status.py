"""Progress, health, metrics and the OpenAPI document."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import requests
from instances import multipart, new_instance, uid
from jsonschema import validate as validate_instance
from marshmallow import Schema
from openapi_spec_validator import validate
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from service import Service, running, wait_for

from api.main import compose
from api.payloads.views import PayloadSchema
from api.settings import ApiSettings
from api.vae.registry import VaeSchema
from api.vae.views import CHANGE_SCHEMA
from shared.dicom.uids import CODE_STRING, MAX_UID_CHARACTERS, UID
from shared.ids import AE_TITLE, SOURCE, WORKFLOW_ID
from shared.runtime.backends import open_backends
from shared.settings.loader import load

POSTS = "stowgate_posts_total"
INSTANCES = "stowgate_instances_total"
RECEIVED_BYTES = "stowgate_received_bytes_total"
OPENED = "stowgate_workflow_requests_opened_total"
POST_SECONDS = "stowgate_post_seconds_count"

FIELDS = {
    "payload_id",
    "correlation_id",
    "state",
    "received_at",
    "opened_at",
    "refused_at",
    "refusals",
    "source",
    "caller",
    "destination",
    "workflows",
    "route",
    "file_count",
    "attempts",
    "last_error",
    "trace_id",
    "workflow_request",
}


def _post(stowgate: Service) -> str:
    answer = stowgate.post("/dicomweb/w-1/studies", new_instance(), "application/dicom")
    assert answer.status_code == 200
    return str(answer.headers["X-Payload-ID"])


def test_a_payload_shows_its_progress_and_its_request(stowgate: Service) -> None:
    payload_id = _post(stowgate)

    payload = stowgate.opened(payload_id)

    assert set(payload) == FIELDS
    assert payload["payload_id"] == payload_id
    assert payload["source"] == "127.0.0.1"
    assert payload["caller"] is None
    assert payload["destination"] == "default"
    assert payload["workflows"] == ["w-1"]
    assert payload["file_count"] == payload["attempts"] == 1
    assert payload["last_error"] is None
    assert payload["received_at"] <= payload["opened_at"]
    assert payload["received_at"].endswith("Z")


def test_the_status_link_leads_to_the_payload(stowgate: Service) -> None:
    answer = stowgate.post("/dicomweb/studies", new_instance(), "application/dicom")

    link = requests.utils.parse_header_links(answer.headers["Link"])[0]

    assert link["rel"] == "status"
    assert stowgate.get(link["url"]).json()["payload_id"] == answer.headers["X-Payload-ID"]


@pytest.mark.parametrize(
    "payload_id", ["e2f2bf35-2cf9-4ae5-9ec9-4b0d83ce1a4d", "no-guid", "%2e%2e%2f"]
)
def test_an_unknown_payload_is_404(stowgate: Service, payload_id: str) -> None:
    assert stowgate.get(f"/payloads/{payload_id}").status_code == 404


def test_the_list_is_newest_first_and_continues_at_its_cursor(stowgate: Service) -> None:
    sent = [_post(stowgate) for _ in range(6)]
    for payload_id in sent:
        stowgate.opened(payload_id)

    pages, cursor = [], ""
    for _ in range(3):
        page = stowgate.get(f"/payloads?limit=2{cursor}").json()
        pages.append([payload["payload_id"] for payload in page["payloads"]])
        cursor = f"&cursor={page['next']}"

    listed = [payload_id for page in pages for payload_id in page]
    assert [len(page) for page in pages] == [2, 2, 2]
    # Ids of the same millisecond have no defined order.
    assert set(listed) == set(sent)
    received = [stowgate.get(f"/payloads/{i}").json()["received_at"] for i in listed]
    assert [r[:23] for r in received] == sorted((r[:23] for r in received), reverse=True)


def test_the_list_can_be_filtered_by_state(stowgate: Service) -> None:
    payload_id = _post(stowgate)
    stowgate.opened(payload_id)

    def listed() -> list[dict[str, object]] | None:
        # A record is marked as opened before it is moved to opened/.
        page = stowgate.get("/payloads?state=opened&limit=200").json()["payloads"]
        return page if payload_id in {payload["payload_id"] for payload in page} else None

    opened = wait_for(listed)
    failed = stowgate.get("/payloads?state=failed").json()

    assert {payload["state"] for payload in opened} == {"opened"}
    assert set(opened[0]) == FIELDS - {"workflow_request"}
    assert failed == {"payloads": [], "next": None}


@pytest.mark.parametrize(
    "query",
    [
        "state=lost",
        "limit=0",
        "limit=201",
        "limit=x",
        "limit=%D9%A3",
        f"limit={'1' * 3000}",
        "cursor=x",
    ],
)
def test_a_list_with_invalid_parameters_is_400(stowgate: Service, query: str) -> None:
    answer = stowgate.get(f"/payloads?{query}")

    assert answer.status_code == 400
    assert query.partition("=")[0] in answer.json()["detail"]


def test_health_is_live_and_ready_with_every_dependency(stowgate: Service) -> None:
    live, ready = stowgate.get("/health/live"), stowgate.get("/health/ready")

    assert (live.status_code, ready.status_code) == (200, 200)
    assert ready.json() == {
        "status": "ready",
        "dependencies": {
            "object_store": {"status": "ready"},
            "free_space": {"status": "ready"},
            "broker": {"status": "ready"},
            "workflow_manager_queue": {"status": "ready"},
            "workflow_manager_refusals": {"status": "ready"},
        },
    }


def test_metrics_have_no_identifiers(tmp_path: Path) -> None:
    good, of_another_study = new_instance(), new_instance(StudyInstanceUID="2.25.4711")
    study = uid(good, "StudyInstanceUID")
    with running("run", tmp_path) as service:
        answer = service.post(
            f"/dicomweb/w-1/studies/{study}", *multipart(good, of_another_study, b"no DICOM")
        )
        refused = service.post("/dicomweb/studies", b"{}", "application/json")
        payload_id = answer.headers["X-Payload-ID"]
        wait_for(lambda: service.metric(OPENED, route="workflow-in-url"))
        text = service.get("/metrics").text

    assert (answer.status_code, refused.status_code) == (202, 415)
    counted = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in {POSTS, INSTANCES, RECEIVED_BYTES, OPENED, POST_SECONDS} and sample.value
    }
    assert counted == {
        (POSTS, "202"): 1,
        (POSTS, "415"): 1,
        (INSTANCES, "stored"): 1,
        (INSTANCES, "B007"): 1,
        (INSTANCES, "C000"): 1,
        (RECEIVED_BYTES,): len(good) + len(of_another_study),
        (OPENED, "workflow-in-url"): 1,
        (POST_SECONDS,): 2,
    }
    for identifier in (payload_id, study, "2.25.4711"):
        assert identifier not in text


def test_the_openapi_document_is_valid_and_describes_exactly_what_is_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STOWGATE_DATA", str(tmp_path))
    settings = load(ApiSettings)
    app = compose(settings, open_backends(settings, store_threads=4), CollectorRegistry())

    document = json.loads(app.test_client().get("/openapi.json").data)

    validate(document)
    described = {
        (path, method)
        for path, operations in document["paths"].items()
        for method in operations
        if method != "parameters"
    }
    served = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        # The operator's page is for people.
        if not rule.endpoint.startswith("page.")
        for method in (rule.methods or set()) - {"HEAD"}
        # Flask answers OPTIONS by itself wherever nobody else does.
        if method != "OPTIONS" or not getattr(rule, "provide_automatic_options", False)
    }
    assert described == served


@pytest.mark.parametrize(
    ("name", "schema"),
    [("Vae", VaeSchema()), ("VaeChange", CHANGE_SCHEMA), ("Payload", PayloadSchema())],
)
def test_the_openapi_document_has_the_fields_that_are_accepted_and_answered(
    stowgate: Service, name: str, schema: Schema
) -> None:
    described = stowgate.get("/openapi.json").json()["components"]["schemas"][name]["properties"]

    fields = {field.data_key or field.name for field in schema.fields.values()}
    if name == "VaeChange":
        fields.add("virtualAeTitle")  # ignored, as by the Informatics Gateway
    if name == "Payload":
        fields |= {"workflow_request", "workflow_instances", "workflow_instances_error"}
    assert set(described) == fields


def test_the_openapi_document_has_the_grammars_that_are_checked(stowgate: Service) -> None:
    components = stowgate.get("/openapi.json").json()["components"]
    parameters = {name: found["schema"] for name, found in components["parameters"].items()}
    vae = components["schemas"]["Vae"]["properties"]

    uid = {"type": "string", "pattern": f"^{UID}$", "maxLength": MAX_UID_CHARACTERS}
    aet = {"type": "string", "pattern": f"^{AE_TITLE}$"}
    workflow = {"type": "string", "pattern": f"^{WORKFLOW_ID}$"}
    assert parameters["study"] == uid
    assert parameters["workflow"] == vae["workflows"]["items"] == workflow
    assert parameters["aet"] == parameters["name"] == vae["name"] == vae["virtualAeTitle"] == aet
    assert vae["acceptedSopClasses"]["items"] == vae["acceptedTransferSyntaxes"]["items"] == uid
    assert vae["acceptedModalities"]["items"]["pattern"] == f"^{CODE_STRING}$"
    assert vae["source"]["pattern"] == f"^{SOURCE}$"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("OPTIONS", "/dicomweb/studies", None, "204"),
        ("OPTIONS", "/dicomweb", None, "200"),
        ("POST", "/config/vae", {"virtualAeTitle": "described"}, "201"),
        ("POST", "/dicomweb/studies", {}, "415"),
    ],
)
def test_the_headers_and_media_types_of_an_answer_are_in_the_openapi_document(
    stowgate: Service, method: str, path: str, body: dict[str, Any] | None, status: str
) -> None:
    document = stowgate.get("/openapi.json").json()

    answer = requests.request(method, stowgate.url + path, json=body, timeout=30)

    assert str(answer.status_code) == status
    described = document["paths"][path][method.lower()]["responses"][status]
    told = {"Allow", "Accept-Post", "Location", "X-Correlation-ID"} & set(answer.headers)
    assert told == set(described.get("headers", {}))
    assert [answer.headers.get("Content-Type")] == list(described.get("content", [None]))


def test_a_listed_payload_matches_its_published_schema(stowgate: Service) -> None:
    stowgate.opened(_post(stowgate))
    document = json.loads(stowgate.get("/openapi.json").content)
    schema = {"$ref": "#/components/schemas/PayloadPage", "components": document["components"]}

    validate_instance(stowgate.get("/payloads").json(), schema)
