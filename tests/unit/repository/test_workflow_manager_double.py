"""The double that judges our workflow requests has to be a strict judge."""

import json
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

import pytest
from instances import real_file, uid
from workflow_manager_double import (
    APP_ID,
    Intake,
    Verdict,
    Workflow,
    violations,
    violations_in_store,
    workflows_in,
)

from shared.dicom.metadata import metadata_json
from shared.instances import StoredInstance
from shared.records import IngestRecord
from worker.routing import Route
from worker.workflow_manager import WorkflowManager

PAYLOAD_ID = "0198c0de-0000-7000-8000-00000000abcd"
CORRELATION_ID = "5f1d1a52-7c13-4f0c-9d4e-6a7c8b9d0e1f"
PATH = "dcm/1.2.840.1/1.2.840.1.2/1.2.840.1.2.3.dcm"
OTHER_PATH = "dcm/1.2.840.1/1.2.840.1.2/1.2.840.1.2.4.dcm"

PROPERTIES = {
    "message_id": PAYLOAD_ID,
    "app_id": APP_ID,
    "content_type": "application/json",
    "correlation_id": CORRELATION_ID,
    "type": "WorkflowRequestEvent",
    "timestamp": 1_767_225_600,
    "delivery_mode": 2,
    "headers": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
}
REQUEST: dict[str, Any] = {
    "payload_id": PAYLOAD_ID,
    "workflows": ["lung-nodules"],
    "file_count": 2,
    "correlation_id": CORRELATION_ID,
    "bucket": "monaideploy",
    "trigger": {
        "dataService": 2,
        "source": "203.0.113.7",
        "destination": "AETITLE_OF_15_C",
        "artifactType": 0,
    },
    "data_origins": [],
    "timestamp": "2026-01-01T00:00:00.123456Z",
    "workflow_instance_id": None,
    "task_id": None,
    "payload": [
        {"path": PATH, "metadata": f"{PATH}.json"},
        {"path": OTHER_PATH, "metadata": f"{OTHER_PATH}.json"},
    ],
}

Place = tuple[str | int, ...]


def encoded(request: Any) -> bytes:
    return json.dumps(request).encode()


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    request = deepcopy(REQUEST)
    change(request)
    return request


def inside(request: Any, place: Place) -> Any:
    for step in place:
        request = request[step]
    return request


def with_value(place: Place, value: Any) -> dict[str, Any]:
    return changed(lambda request: inside(request, place[:-1]).__setitem__(place[-1], value))


def without(place: Place) -> dict[str, Any]:
    return changed(lambda request: inside(request, place[:-1]).__delitem__(place[-1]))


def with_first_field_last(place: Place) -> dict[str, Any]:
    def move(request: dict[str, Any]) -> None:
        fields = inside(request, place)
        first = next(iter(fields))
        fields[first] = fields.pop(first)

    return changed(move)


def places(value: Any, above: Place = ()) -> list[Place]:
    """Every field of every object, as the steps that lead there."""
    steps = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[Place] = []
    for step, below in steps:
        if isinstance(value, dict):
            found.append((*above, step))
        if isinstance(below, dict | list):
            found += places(below, (*above, step))
    return found


def words(place: Place) -> str:
    return ".".join(map(str, place)) or "body"


def test_accepts_a_request_that_keeps_every_rule() -> None:
    assert violations(PROPERTIES, encoded(REQUEST)) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("workflows",), []),
        (("correlation_id",), "{5f1d1a52-7c13-4f0c-9d4e-6a7c8b9d0e1f}"),
        (("correlation_id",), "5F1D1A527C134F0C9D4E6A7C8B9D0E1F"),
        (("bucket",), "abc"),
        (("bucket",), "b" * 63),
        (("trigger", "source"), "x"),
        (("trigger", "source"), "255.255.255.255"),
        (("timestamp",), "2026-01-01T00:00:00Z"),
    ],
)
def test_accepts_what_is_right_in_another_way(place: Place, value: Any) -> None:
    request = with_value(place, value)
    properties = PROPERTIES | {"correlation_id": request["correlation_id"]}
    assert violations(properties, encoded(request)) == []


@pytest.mark.parametrize("place", places(REQUEST), ids=words)
def test_finds_a_field_that_is_missing(place: Place) -> None:
    assert violations(PROPERTIES, encoded(without(place)))


@pytest.mark.parametrize(
    "place",
    [place for place in places(REQUEST) if inside(REQUEST, place) is not None],
    ids=words,
)
def test_finds_a_null_where_a_value_belongs(place: Place) -> None:
    assert violations(PROPERTIES, encoded(with_value(place, None)))


@pytest.mark.parametrize("place", [(), ("trigger",), ("payload", 0)], ids=words)
def test_finds_a_field_that_nobody_knows(place: Place) -> None:
    assert violations(PROPERTIES, encoded(with_value((*place, "unknown"), None)))


@pytest.mark.parametrize("place", [(), ("trigger",), ("payload", 0)], ids=words)
def test_finds_fields_out_of_order(place: Place) -> None:
    assert violations(PROPERTIES, encoded(with_first_field_last(place)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("payload_id",), ""),
        (("payload_id",), PAYLOAD_ID.upper()),
        (("payload_id",), PAYLOAD_ID.replace("-", "")),
        (("payload_id",), f"{{{PAYLOAD_ID}}}"),
        (("payload_id",), f"{PAYLOAD_ID}\n"),
        (("payload_id",), "00000000-0000-0000-0000-000000000000"),
        (("workflows",), "lung-nodules"),
        (("workflows",), [""]),
        (("workflows",), ["lung-nodules", " "]),
        (("workflows",), [None]),
        (("workflows",), [7]),
        (("file_count",), 0),
        (("file_count",), 1),
        (("file_count",), 3),
        (("file_count",), 2.0),
        (("file_count",), "2"),
        (("file_count",), True),
        (("bucket",), "ab"),
        (("bucket",), "b" * 64),
        (("bucket",), 7),
        (("trigger",), []),
        (("trigger", "dataService"), 1),
        (("trigger", "dataService"), "2"),
        (("trigger", "dataService"), "DicomWeb"),
        (("trigger", "dataService"), 2.0),
        (("trigger", "artifactType"), 1),
        (("trigger", "artifactType"), "Unset"),
        (("trigger", "artifactType"), False),
        (("trigger", "source"), ""),
        (("trigger", "source"), " \t"),
        (("trigger", "source"), "::ffff:127.0.0.1"),
        (("trigger", "source"), 7),
        (("trigger", "destination"), ""),
        (("trigger", "destination"), " "),
        (("trigger", "destination"), "A" * 16),
        (("data_origins",), {}),
        (("data_origins",), [{}]),
        (("timestamp",), ""),
        (("timestamp",), 1_767_225_600),
        (("timestamp",), "2026-01-01T00:00:00"),
        (("timestamp",), "2026-01-01T00:00:00+00:00"),
        (("timestamp",), "2026-01-01 00:00:00Z"),
        (("timestamp",), "2026-01-01T00:00:00.12345678Z"),
        (("timestamp",), "2026-02-30T00:00:00Z"),
        (("timestamp",), "0001-01-01T00:00:00Z"),
        (("workflow_instance_id",), ""),
        (("task_id",), ""),
        (("payload",), []),
        (("payload",), {}),
        (("payload", 0), PATH),
        (("payload", 0, "path"), 7),
        (("payload", 0, "metadata"), PATH),
        (("payload", 0, "metadata"), f"{OTHER_PATH}.json"),
        (("payload", 0, "metadata"), ""),
    ],
)
def test_finds_a_value_that_breaks_a_rule(place: Place, value: Any) -> None:
    assert violations(PROPERTIES, encoded(with_value(place, value)))


@pytest.mark.parametrize(
    "path",
    [
        f"{PAYLOAD_ID}/{PATH}",
        f"/{PATH}",
        f"./{PATH}",
        PATH.removeprefix("dcm/"),
        PATH.removesuffix(".dcm"),
        PATH.upper(),
        f"{PATH}\n",
        "dcm/1.2/1.3.dcm",
        "dcm/1.2/1.3/1.4/1.5.dcm",
        "dcm/../1.3/1.4.dcm",
        "dcm/1.2//1.4.dcm",
        "dcm/1.2/1..3/1.4.dcm",
        f"dcm/1.2/1.3/1.{'4' * 63}.dcm",
        OTHER_PATH,
    ],
)
def test_finds_a_path_that_is_not_where_an_instance_lies(path: str) -> None:
    request = deepcopy(REQUEST)
    request["payload"][0] = {"path": path, "metadata": f"{path}.json"}
    assert violations(PROPERTIES, encoded(request))


@pytest.mark.parametrize(
    "correlation_id", ["", "not-a-guid", "5f1d1a52-7c13-4f0c-9d4e-6a7c8b9d0e1", 7]
)
def test_finds_a_correlation_id_that_does_not_parse_as_a_guid(correlation_id: Any) -> None:
    request = with_value(("correlation_id",), correlation_id)
    assert violations(PROPERTIES | {"correlation_id": correlation_id}, encoded(request))


@pytest.mark.parametrize("name", [name for name in PROPERTIES if name != "headers"])
@pytest.mark.parametrize("value", [None, "", " "])
def test_finds_a_property_that_is_missing(name: str, value: str | None) -> None:
    assert violations(PROPERTIES | {name: value}, encoded(REQUEST))
    absent = {other: held for other, held in PROPERTIES.items() if other != name}
    assert violations(absent, encoded(REQUEST))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("app_id", "stowgate"),
        ("content_type", "application/json; charset=utf-8"),
        ("correlation_id", "0c6d0e1e-4b6a-4f7c-8a54-2b0a3f1c9d8e"),
        ("type", "WorkflowRequest"),
        ("delivery_mode", 1),
        ("timestamp", 0),
        ("timestamp", 1_767_225_600_000),
        ("timestamp", 1_767_225_600.5),
        ("timestamp", True),
        ("timestamp", "1767225600"),
    ],
)
def test_finds_a_property_that_breaks_a_rule(name: str, value: Any) -> None:
    assert violations(PROPERTIES | {name: value}, encoded(REQUEST))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xef\xbb\xbf" + encoded(REQUEST),
        encoded(REQUEST).decode().encode("utf-16"),
        encoded(REQUEST).replace(b"lung-nodules", b"lung-\xff"),
        encoded(REQUEST).replace(b'"file_count": 2', b'"file_count": NaN'),
        encoded(REQUEST).replace(b'"task_id": null', b'"task_id": null, "task_id": null'),
    ],
)
def test_finds_a_body_that_is_not_one_json_object_in_utf_8(body: bytes) -> None:
    assert violations(PROPERTIES, body)


def test_has_nothing_against_the_message_that_our_worker_makes() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    record = IngestRecord(
        payload_id=PAYLOAD_ID,
        correlation_id=CORRELATION_ID,
        received_at=moment,
        source="203.0.113.7",
        destination="default",
        workflow=None,
        vae_workflows=None,
        file_count=1,
        instances=(StoredInstance("1.2", "1.2.3.4", "1.2.3", "1.2.3.5", 1, "0" * 64),),
        due_at=moment,
    )
    manager = WorkflowManager("monaideploy", "md.workflow.request", "monaideploy")
    request = manager.request(record, Route("a-rule", ("lung-nodules",)))
    message = manager.message(record, request, record.instances or ())
    assert violations(vars(message), message.body) == []


@pytest.fixture(scope="module")
def stored() -> tuple[bytes, dict[str, bytes]]:
    """A request for one real file, and the objects that it names."""
    instance = real_file()
    path = (
        f"dcm/{uid(instance, 'StudyInstanceUID')}/{uid(instance, 'SeriesInstanceUID')}/"
        f"{uid(instance, 'SOPInstanceUID')}.dcm"
    )
    request = with_value(("payload",), [{"path": path, "metadata": f"{path}.json"}])
    objects = {
        f"{PAYLOAD_ID}/{path}": instance,
        f"{PAYLOAD_ID}/{path}.json": metadata_json(instance),
    }
    return encoded(request), objects


def with_sidecar(
    stored: tuple[bytes, dict[str, bytes]], change: Callable[[dict[str, Any]], object]
) -> list[str]:
    body, objects = stored
    key = next(key for key in objects if key.endswith(".json"))
    dataset = json.loads(objects[key])
    change(dataset)
    sidecar = json.dumps(dataset, separators=(",", ":")).encode()
    return violations_in_store((objects | {key: sidecar}).get, body)


def test_accepts_objects_that_keep_every_rule(stored: tuple[bytes, dict[str, bytes]]) -> None:
    body, objects = stored
    assert violations_in_store(objects.get, body) == []


@pytest.mark.parametrize("end", [".dcm", ".json"])
def test_finds_an_object_that_is_missing(stored: tuple[bytes, dict[str, bytes]], end: str) -> None:
    body, objects = stored
    left = {key: value for key, value in objects.items() if not key.endswith(end)}
    assert violations_in_store(left.get, body)


@pytest.mark.parametrize(
    ("end", "content"),
    [
        (".dcm", b"DICM"),
        (".json", b""),
        (".json", b"[{}]"),
        (".json", b"{}"),
    ],
)
def test_finds_an_object_with_other_content(
    stored: tuple[bytes, dict[str, bytes]], end: str, content: bytes
) -> None:
    body, objects = stored
    other = {key: content if key.endswith(end) else value for key, value in objects.items()}
    assert violations_in_store(other.get, body)


@pytest.mark.parametrize(
    ("tag", "element"),
    [
        ("00020010", {"vr": "UI", "Value": ["1.2"]}),
        ("00080000", {"vr": "UL", "Value": [2]}),
        ("7FE00010", {"vr": "OW"}),
        ("7FE00010", {"vr": "OW", "InlineBinary": "AAAA"}),
        ("0008103e", {"vr": "LO", "Value": ["x"]}),
        ("PatientID", {"vr": "LO", "Value": ["x"]}),
        ("00081030", "x"),
        ("00081030", {"Value": ["x"]}),
        ("00081030", {"vr": "LO", "Value": []}),
        ("00081030", {"vr": "LO", "Value": "x"}),
        ("00081030", {"vr": "LO", "Value": [7]}),
        ("00081030", {"vr": "LO", "Value": ["x"], "keyword": "StudyDescription"}),
        ("00100010", {"vr": "PN", "Value": ["x"]}),
        ("00100010", {"vr": "PN", "Value": [{"alphabetic": "x"}]}),
        ("00100010", {"vr": "LO", "Value": ["x"]}),
        ("00100020", {"vr": "SH", "Value": ["x"]}),
        ("00180050", {"vr": "DS", "Value": ["5.0"]}),
        ("00200013", {"vr": "IS", "Value": ["1"]}),
        ("00280010", {"vr": "US", "Value": ["128"]}),
        ("00280010", {"vr": "US", "Value": [True]}),
        ("0020000E", {"vr": "UI", "Value": ["1.2.3"]}),
        ("0020000D", {"vr": "UI"}),
        ("00081140", {"vr": "SQ", "Value": ["x"]}),
        ("00081140", {"vr": "SQ", "Value": [{"00081150": {"vr": "UI", "Value": [7]}}]}),
    ],
)
def test_finds_a_sidecar_that_breaks_a_rule(
    stored: tuple[bytes, dict[str, bytes]], tag: str, element: Any
) -> None:
    assert with_sidecar(stored, lambda dataset: dataset.__setitem__(tag, element))


@pytest.mark.parametrize(
    ("tag", "element"),
    [
        ("00100010", {"vr": "PN"}),
        ("00180050", {"vr": "DS", "Value": ["five", None, 5.0]}),
        ("00200013", {"vr": "IS", "Value": ["1.5"]}),
        ("00189074", {"vr": "FD", "Value": ["NaN"]}),
        ("00081140", {"vr": "SQ", "Value": [{}, {"00091001": {"vr": "OB", "InlineBinary": ""}}]}),
    ],
)
def test_accepts_a_sidecar_that_is_odd_but_right(
    stored: tuple[bytes, dict[str, bytes]], tag: str, element: Any
) -> None:
    assert with_sidecar(stored, lambda dataset: dataset.__setitem__(tag, element)) == []


def test_finds_a_sidecar_that_is_indented(stored: tuple[bytes, dict[str, bytes]]) -> None:
    body, objects = stored
    indented = {
        key: json.dumps(json.loads(value), indent=2).encode() if key.endswith(".json") else value
        for key, value in objects.items()
    }
    assert violations_in_store(indented.get, body)


def test_takes_each_workflow_of_a_payload_once() -> None:
    intake = Intake()
    first, again, another, everything = (
        intake.take(PROPERTIES, encoded(with_value(("workflows",), workflows)))
        for workflows in (["a"], ["a"], ["a", "b"], ["b", "a"])
    )
    assert first == (
        Verdict.ACKNOWLEDGE,
        f"accepted {PAYLOAD_ID} workflows=['a'] files=2 source=203.0.113.7 "
        "destination=AETITLE_OF_15_C",
    )
    assert again == (Verdict.ACKNOWLEDGE, f"duplicate {PAYLOAD_ID} workflows=['a']")
    assert another[1].startswith("accepted")
    assert everything[1].startswith("duplicate")


def test_takes_the_same_workflow_for_another_payload() -> None:
    intake = Intake()
    other = PAYLOAD_ID.replace("abcd", "ef01")
    intake.take(PROPERTIES, encoded(REQUEST))
    _, line = intake.take(PROPERTIES, encoded(with_value(("payload_id",), other)))
    assert line.startswith(f"accepted {other}")


def test_refuses_a_request_that_breaks_rules_and_names_them_all() -> None:
    request = with_value(("trigger", "source"), "")
    verdict, line = Intake().take(PROPERTIES | {"delivery_mode": 1}, encoded(request))
    assert verdict is Verdict.REJECT
    assert line.startswith(f"REJECTED {PAYLOAD_ID}: property delivery_mode is 1, not 2; ")
    assert "trigger.source" in line


def test_refuses_a_request_whose_objects_are_missing() -> None:
    buckets: list[str] = []

    def store_of(bucket: str) -> Callable[[str], bytes | None]:
        buckets.append(bucket)
        return lambda _key: None

    verdict, line = Intake(store_of).take(PROPERTIES, encoded(REQUEST))
    assert verdict is Verdict.REJECT
    assert f"there is no object {PATH}.json" in line
    assert buckets == ["monaideploy"]


HERE = REQUEST["trigger"]["destination"]


@pytest.mark.parametrize(
    ("known", "asked", "verdict"),
    [
        ([], [], Verdict.REQUEUE),
        ([Workflow("a", HERE)], [], Verdict.ACKNOWLEDGE),
        ([Workflow("a", HERE.lower())], [], Verdict.REQUEUE),
        ([Workflow("a", HERE, ("203.0.113.7",))], [], Verdict.ACKNOWLEDGE),
        ([Workflow("a", HERE, ("CT",))], [], Verdict.REQUEUE),
        ([Workflow("a", HERE), Workflow("b", HERE, predicate=False)], [], Verdict.REQUEUE),
        ([Workflow("a", "OTHER")], ["a"], Verdict.ACKNOWLEDGE),
        ([Workflow("a", HERE)], ["b"], Verdict.REQUEUE),
        ([Workflow("a", HERE)], ["a", "b"], Verdict.ACKNOWLEDGE),
        ([Workflow("a", HERE), Workflow("b", HERE, predicate=False)], ["a", "b"], Verdict.REQUEUE),
    ],
)
def test_starts_the_workflows_that_match_or_none(
    known: list[Workflow], asked: list[str], verdict: Verdict
) -> None:
    intake = Intake(workflows=lambda: known)

    assert intake.take(PROPERTIES, encoded(with_value(("workflows",), asked)))[0] is verdict


def test_reads_workflows_from_json() -> None:
    text = '[{"id": "a", "ae_title": "AE", "data_origins": ["CT"], "predicate": false}]'

    assert workflows_in(text) == [Workflow("a", "AE", ("CT",), predicate=False)]
