"""The contract of the Store transaction: stored objects and answers."""

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from uuid import uuid4

import pydicom
import pytest
import requests
from instances import multipart, new_instance, real_file, uid
from pydicom.uid import generate_uid
from service import Service, running

STUDY = uid(real_file(), "StudyInstanceUID")
NATIVE = "{http://dicom.nema.org/PS3.19/models/NativeDICOM}"


@pytest.fixture(scope="module")
def vae(stowgate: Service) -> str:
    title = f"AE{uuid4().hex[:8]}"
    answer = requests.post(
        f"{stowgate.url}/config/vae",
        json={"virtualAeTitle": title, "workflows": ["w-of-vae", "w-two"]},
        timeout=10,
    )
    assert answer.status_code == 201
    return title


FORMS = {
    "/dicomweb/studies": ("left-to-workflow-manager", [], False),
    "/dicomweb/w-in-url/studies": ("workflow-in-url", ["w-in-url"], False),
    "/dicomweb/vae/{vae}/studies": ("workflows-of-vae", ["w-of-vae", "w-two"], True),
    "/dicomweb/vae/{vae}/w-in-url/studies": ("workflow-in-url", ["w-in-url"], True),
}
SPELLINGS = {
    "plain": lambda path: path,
    "trailing slash": lambda path: path + "/",
    "doubled slashes": lambda path: path.replace("/", "//"),
    "doubled slash before studies": lambda path: path.replace("/studies", "//studies") + "/",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("with_study", [False, True], ids=["any study", "study in the URL"])
@pytest.mark.parametrize("kind", ["application/dicom", "multipart/related"])
@pytest.mark.parametrize("form", FORMS)
def test_every_path_stores_and_opens_a_request_by_its_own_rule(
    stowgate: Service, vae: str, form: str, kind: str, with_study: bool, spelling: str
) -> None:
    rule, workflows, names_vae = FORMS[form]
    instance = new_instance()
    path = SPELLINGS[spelling](form.format(vae=vae) + (f"/{STUDY}" if with_study else ""))
    body, content_type = (instance, kind) if kind == "application/dicom" else multipart(instance)

    answer = stowgate.post(path, body, content_type)

    assert answer.status_code == 200, answer.text
    payload = stowgate.opened(answer.headers["X-Payload-ID"])
    assert payload["route"] == rule
    assert payload["workflow_request"]["workflows"] == workflows
    assert payload["destination"] == (vae if names_vae else "default")


def test_the_answer_lists_what_is_stored_in_request_order(stowgate: Service) -> None:
    instances = [new_instance() for _ in range(7)]

    answer = stowgate.post("/dicomweb/studies", *multipart(*instances))

    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/dicom+json"
    dataset = answer.json()
    assert set(dataset) == {"00081190", "00081199"}
    items = pydicom.Dataset.from_json(dataset).ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in items] == [
        uid(instance, "SOPInstanceUID") for instance in instances
    ]
    assert {item.ReferencedSOPClassUID for item in items} == {uid(instances[0], "SOPClassUID")}
    assert not any("WarningReason" in item for item in items)


def test_stored_bytes_and_their_place_are_what_the_workflow_manager_expects(
    stowgate: Service,
) -> None:
    instance = new_instance("MR_small.dcm")

    answer = stowgate.post("/dicomweb/studies", instance, "application/dicom")

    payload = stowgate.opened(answer.headers["X-Payload-ID"])
    folder = stowgate.data / "monaideploy" / payload["payload_id"]
    path = (
        f"dcm/{uid(instance, 'StudyInstanceUID')}/{uid(instance, 'SeriesInstanceUID')}/"
        f"{uid(instance, 'SOPInstanceUID')}.dcm"
    )
    assert (folder / path).read_bytes() == instance
    assert payload["workflow_request"]["payload"] == [{"path": path, "metadata": f"{path}.json"}]
    metadata = json.loads((folder / f"{path}.json").read_bytes())
    assert metadata["00080018"]["Value"] == [uid(instance, "SOPInstanceUID")]
    assert sorted(p for p in folder.rglob("*") if p.is_file()) == [
        folder / path,
        folder / f"{path}.json",
    ]


def test_the_embedded_run_shows_the_request_in_the_data_folder(stowgate: Service) -> None:
    answer = stowgate.post("/dicomweb/studies", new_instance(), "application/dicom")

    payload = stowgate.opened(answer.headers["X-Payload-ID"])
    shown = stowgate.data / "workflow-requests" / f"{payload['payload_id']}.json"
    request = json.loads(shown.read_text())
    assert request["body"] == payload["workflow_request"]
    assert request["properties"]["type"] == "WorkflowRequestEvent"


def test_each_post_opens_its_own_request(stowgate: Service) -> None:
    instance = new_instance()

    answers = [stowgate.post("/dicomweb/studies", *multipart(instance)) for _ in range(3)]

    ids = {answer.headers["X-Payload-ID"] for answer in answers}
    assert len(ids) == 3
    assert all(stowgate.opened(payload_id)["file_count"] == 1 for payload_id in ids)


def test_an_instance_of_another_study_than_in_the_url_is_stored_with_warning_b007(
    stowgate: Service,
) -> None:
    other_study = generate_uid()
    instances = [new_instance(), new_instance(StudyInstanceUID=other_study), new_instance()]

    answer = stowgate.post(f"/dicomweb/studies/{STUDY}", *multipart(*instances))

    assert answer.status_code == 202
    items = answer.json()["00081199"]["Value"]
    assert [item.get("00081196", {}).get("Value") for item in items] == [None, [0xB007], None]
    payload = stowgate.opened(answer.headers["X-Payload-ID"])
    assert payload["file_count"] == 3
    assert f"dcm/{other_study}/" in payload["workflow_request"]["payload"][1]["path"]


def test_failed_instances_are_listed_with_their_reasons(stowgate: Service) -> None:
    good, nameless = new_instance(), new_instance(StudyInstanceUID=None)

    answer = stowgate.post("/dicomweb/studies", *multipart(b"no DICOM", good, nameless))

    assert answer.status_code == 202
    dataset = answer.json()
    assert [item["00081155"]["Value"] for item in dataset["00081199"]["Value"]] == [
        [uid(good, "SOPInstanceUID")]
    ]
    (failed,) = dataset["00081198"]["Value"]
    assert failed["00081155"]["Value"] == [uid(nameless, "SOPInstanceUID")]
    assert failed["00081150"]["Value"] == [uid(nameless, "SOPClassUID")]
    assert failed["00081197"]["Value"] == [0xA900]
    assert "part 3" in failed["00091001"]["Value"][0]
    assert "StudyInstanceUID" in failed["00091001"]["Value"][0]
    (other,) = dataset["0008119A"]["Value"]
    assert other["00081197"]["Value"] == [0xC000]
    assert "part 1" in other["00091001"]["Value"][0]
    assert stowgate.opened(answer.headers["X-Payload-ID"])["file_count"] == 1


def test_identical_bytes_sent_twice_are_one_stored_instance(stowgate: Service) -> None:
    instance = new_instance()

    answer = stowgate.post("/dicomweb/studies", *multipart(instance, instance))

    assert answer.status_code == 200
    assert len(answer.json()["00081199"]["Value"]) == 1
    assert stowgate.opened(answer.headers["X-Payload-ID"])["file_count"] == 1


def test_one_uid_with_different_bytes_keeps_the_first_and_fails_the_second(
    stowgate: Service,
) -> None:
    first = new_instance(PatientID="one")
    second = new_instance(PatientID="two", SOPInstanceUID=uid(first, "SOPInstanceUID"))

    answer = stowgate.post("/dicomweb/studies", *multipart(first, second))

    assert answer.status_code == 202
    (failed,) = answer.json()["00081198"]["Value"]
    assert failed["00081197"]["Value"] == [0x0111]
    payload = stowgate.opened(answer.headers["X-Payload-ID"])
    (entry,) = payload["workflow_request"]["payload"]
    stored = stowgate.data / "monaideploy" / payload["payload_id"] / entry["path"]
    assert hashlib.sha256(stored.read_bytes()).digest() == hashlib.sha256(first).digest()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty body"),
        pytest.param(b"--x--\r\n", id="multipart with zero parts"),
        pytest.param(b"preamble\r\n--x--", id="preamble only"),
    ],
)
def test_a_request_without_data_is_answered_204_without_body(
    stowgate: Service, content: bytes
) -> None:
    answer = stowgate.post("/dicomweb/studies", content, "multipart/related; boundary=x")

    assert answer.status_code == 204
    assert answer.content == b""
    assert "Content-Type" not in answer.headers
    assert "X-Payload-ID" not in answer.headers


def test_headers_have_the_payload_id_and_the_status_link(stowgate: Service) -> None:
    correlation_id = str(uuid4())

    answer = stowgate.post(
        "/dicomweb/studies",
        new_instance(),
        "application/dicom",
        **{"X-Correlation-ID": correlation_id},
    )

    assert answer.headers["X-Correlation-ID"] == correlation_id
    payload_id = answer.headers["X-Payload-ID"]
    assert answer.headers["Link"] == f'</payloads/{payload_id}>; rel="status"'
    payload = stowgate.opened(payload_id)
    assert payload["correlation_id"] == correlation_id
    assert payload["workflow_request"]["correlation_id"] == correlation_id


@pytest.mark.parametrize("given", ["no-guid", "", "1" * 36])
def test_an_invalid_correlation_id_is_replaced(stowgate: Service, given: str) -> None:
    answer = stowgate.post("/dicomweb/studies", b"x", "text/plain", **{"X-Correlation-ID": given})

    assert re.fullmatch(
        r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", answer.headers["X-Correlation-ID"]
    )


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("application/dicom+xml", "application/dicom+xml"),
        ("APPLICATION/DICOM+XML; charset=utf-8", "application/dicom+xml"),
        ("application/dicom+json", "application/dicom+json"),
        ("*/*", "application/dicom+json"),
        ("application/dicom+xml, application/dicom+json", "application/dicom+json"),
        ("application/dicom+xml;q=1, application/dicom+json;q=0.5", "application/dicom+xml"),
        ("application/dicom+json;q=0.8, application/dicom+xml", "application/dicom+xml"),
        ("application/dicom+xml, application/json;q=0.9, */*;q=0.1", "application/dicom+xml"),
        ("application/dicom+xml, */*;q=0.5", "application/dicom+xml"),
        ("application/dicom+xml, text/html", "application/dicom+xml"),
        ("application/dicom+xml;q=0.5, application/dicom+json;q=0.5", "application/dicom+json"),
        ("application/dicom+xml;q=0.5, application/dicom+json", "application/dicom+json"),
        ("application/dicom+xml;q=0.5, application/json", "application/dicom+json"),
        ("application/dicom+xml, */*", "application/dicom+json"),
        ("application/dicom+xml;q=0.9, application/*", "application/dicom+json"),
        ("application/dicom+xml;q=0", "application/dicom+json"),
        ("application/dicom+json;q=0, */*", "application/dicom+json"),
        ("", "application/dicom+json"),
        ("image/png", "application/dicom+json"),
        ("text/html;q=0.1, nonsense", "application/dicom+json"),
    ],
)
def test_xml_is_sent_only_to_clients_that_prefer_it_and_406_never(
    stowgate: Service, accept: str, content_type: str
) -> None:
    answer = stowgate.post("/dicomweb/studies", new_instance(), "application/dicom", Accept=accept)

    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == content_type


def test_the_xml_answer_is_the_native_dicom_model_of_the_json_one(stowgate: Service) -> None:
    instances = [new_instance(), new_instance(StudyInstanceUID=generate_uid()), b"no DICOM"]
    body, content_type = multipart(*instances)

    answer = stowgate.post(
        f"/dicomweb/studies/{STUDY}", body, content_type, Accept="application/dicom+xml"
    )

    assert answer.status_code == 202
    root = ET.fromstring(answer.content)
    assert root.tag == f"{NATIVE}NativeDicomModel"
    sequences = {element.get("tag"): element for element in root}
    assert list(sequences) == ["00081190", "00081199", "0008119A"]
    referenced = sequences["00081199"]
    assert (referenced.get("vr"), referenced.get("keyword")) == ("SQ", "ReferencedSOPSequence")
    items = referenced.findall(f"{NATIVE}Item")
    assert [item.get("number") for item in items] == ["1", "2"]
    values = {
        element.get("keyword"): element.findtext(f"{NATIVE}Value")
        for element in items[1].findall(f"{NATIVE}DicomAttribute")
        if element.get("keyword")
    }
    assert values == {
        "ReferencedSOPClassUID": uid(instances[1], "SOPClassUID"),
        "ReferencedSOPInstanceUID": uid(instances[1], "SOPInstanceUID"),
        "RetrieveURL": None,
        "WarningReason": str(0xB007),
    }
    reason = sequences["0008119A"].find(f".//{NATIVE}DicomAttribute[@keyword='FailureReason']")
    assert reason is not None
    assert reason.findtext(f"{NATIVE}Value") == str(0xC000)


# RetrieveURL: PS3.18 Table I.1-1

ARCHIVE = "https://archive.example/dicom-web"
EMPTY = {"vr": "UR"}


@pytest.fixture(scope="module")
def beside_an_archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(
        "run",
        tmp_path_factory.mktemp("archive"),
        STOWGATE_PUBLIC_URL="https://stowgate.example",
        STOWGATE_RETRIEVE_URL=f"{ARCHIVE}/",
    ) as service:
        yield service


def _url_of(instance: bytes) -> str:
    study, series, sop = (
        uid(instance, f"{level}InstanceUID") for level in ("Study", "Series", "SOP")
    )
    return f"{ARCHIVE}/studies/{study}/series/{series}/instances/{sop}"


def test_without_an_archive_the_retrieve_url_is_empty(stowgate: Service) -> None:
    stored = stowgate.post("/dicomweb/studies", *multipart(new_instance(), new_instance())).json()
    refused = stowgate.post("/dicomweb/studies", b"no DICOM", "application/dicom").json()

    assert stored["00081190"] == refused["00081190"] == EMPTY
    assert [item["00081190"] for item in stored["00081199"]["Value"]] == [EMPTY, EMPTY]


def test_the_retrieve_url_is_that_of_the_archive(beside_an_archive: Service) -> None:
    instances = [new_instance(), new_instance()]
    lies = {"Host": "stowgate.example", "X-Forwarded-Host": "evil.example"}
    body, content_type = multipart(*instances)

    answer = beside_an_archive.post("/dicomweb/studies", body, content_type, **lies)

    dataset = answer.json()
    assert dataset["00081190"] == {"vr": "UR", "Value": [f"{ARCHIVE}/studies/{STUDY}"]}
    assert [item["00081190"] for item in dataset["00081199"]["Value"]] == [
        {"vr": "UR", "Value": [_url_of(instance)]} for instance in instances
    ]
    assert pydicom.Dataset.from_json(dataset).RetrieveURL == f"{ARCHIVE}/studies/{STUDY}"


def test_the_retrieve_url_of_several_studies_is_the_archives_base_url(
    beside_an_archive: Service,
) -> None:
    instances = [new_instance(), new_instance(StudyInstanceUID=generate_uid()), b"no DICOM"]
    body, content_type = multipart(*instances)

    dataset = beside_an_archive.post("/dicomweb/studies", body, content_type).json()

    assert dataset["00081190"] == {"vr": "UR", "Value": [ARCHIVE]}
    urls = [item["00081190"]["Value"] for item in dataset["00081199"]["Value"]]
    assert urls == [[_url_of(instance)] for instance in instances[:2]]
    assert "00081190" not in dataset["0008119A"]["Value"][0]


def test_without_stored_instances_the_retrieve_url_is_empty(beside_an_archive: Service) -> None:
    answer = beside_an_archive.post("/dicomweb/studies", b"no DICOM", "application/dicom")

    assert answer.status_code == 409
    assert answer.json()["00081190"] == EMPTY


def test_the_xml_answer_has_the_retrieve_url_too(beside_an_archive: Service) -> None:
    instance = new_instance()

    answer = beside_an_archive.post(
        "/dicomweb/studies", instance, "application/dicom", Accept="application/dicom+xml"
    )

    found = ET.fromstring(answer.content).iter(f"{NATIVE}DicomAttribute")
    urls = [e for e in found if (e.get("tag"), e.get("vr")) == ("00081190", "UR")]
    assert [e.get("keyword") for e in urls] == ["RetrieveURL", "RetrieveURL"]
    assert [e.findtext(f"{NATIVE}Value") for e in urls] == [
        f"{ARCHIVE}/studies/{STUDY}",
        _url_of(instance),
    ]
