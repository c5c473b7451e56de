"""The documented STOW-RS behaviour of the MONAI Informatics Gateway, from a sender's view.

The paths, codes and shapes are those of its `docs/api/rest/dicomweb-stow.md` and of `config/vae`.
`docs/migrating.md` says where Stowgate differs from what it documents, or from what it does.
"""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import requests
from answering import Answering, serving
from instances import multipart, new_instance, real_file, uid
from pydicom.uid import DigitalMammographyXRayImageStorageForPresentation, generate_uid
from service import STOWGATE, Service, environment

MIGRATING = Path(__file__).parents[2] / "docs" / "migrating.md"

MADE_OF = {
    "CT": ("CT_small.dcm", {}),
    # The packages contain no mammogram.
    "MG": (
        "CT_small.dcm",
        {"Modality": "MG", "SOPClassUID": DigitalMammographyXRayImageStorageForPresentation},
    ),
    "MR": ("MR_small.dcm", {}),
    "US": ("ExplVR_BigEnd.dcm", {}),
    "RT": ("rtplan.dcm", {}),
}

# The path, the workflows of its VAE, and those of the workflow request.
PATHS = {
    "/dicomweb/studies": [],
    "/dicomweb/MyWorkflow/studies": ["MyWorkflow"],
    "/dicomweb/vae/{aet}/studies": ["of-the-vae", "and-another"],
    "/dicomweb/vae/{aet}/MyWorkflow/studies": ["MyWorkflow"],
}


def study_of(modality: str, instances: int) -> tuple[str, list[bytes]]:
    """A new study with that many instances."""
    file, elements = MADE_OF[modality]
    study = generate_uid()
    made = [new_instance(file, StudyInstanceUID=study, **elements) for _ in range(instances)]
    return study, made


@pytest.fixture(scope="module")
def aet(stowgate: Service) -> str:
    title = f"cool-{uuid4().hex[:6]}"
    created = requests.post(
        f"{stowgate.url}/config/vae",
        json={"virtualAeTitle": title, "workflows": ["of-the-vae", "and-another"]},
        timeout=30,
    )
    assert created.status_code == 201
    return title


def stored_bytes(stowgate: Service, payload_id: str) -> list[bytes]:
    folder = stowgate.data / "monaideploy" / payload_id
    return sorted(path.read_bytes() for path in folder.rglob("*.dcm"))


@pytest.mark.parametrize("with_study", [False, True], ids=["any study", "study in the URL"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("modality", MADE_OF)
def test_a_study_of_any_modality_is_stored_and_opens_one_workflow_request(
    stowgate: Service, aet: str, modality: str, path: str, with_study: bool
) -> None:
    study, instances = study_of(modality, 2)
    target = path.format(aet=aet) + (f"/{study}" if with_study else "/")

    answer = stowgate.post(target, *multipart(*instances))

    assert answer.status_code == 200, answer.text
    dataset = answer.json()
    assert len(dataset["00081199"]["Value"]) == 2
    assert "00081198" not in dataset
    payload_id = answer.headers["X-Payload-ID"]
    request = stowgate.opened(payload_id)["workflow_request"]
    assert request["workflows"] == PATHS[path]
    assert request["payload_id"] == payload_id
    assert request["file_count"] == 2
    assert stored_bytes(stowgate, payload_id) == sorted(instances)


@pytest.mark.parametrize("modality", MADE_OF)
def test_a_single_instance_is_accepted_without_multipart(stowgate: Service, modality: str) -> None:
    _, (instance,) = study_of(modality, 1)

    answer = stowgate.post("/dicomweb/studies/", instance, "application/dicom")

    assert answer.status_code == 200
    assert stored_bytes(stowgate, answer.headers["X-Payload-ID"]) == [instance]


def test_two_studies_in_one_post_open_one_request(stowgate: Service) -> None:
    instances = study_of("MG", 1)[1] + study_of("MG", 2)[1]

    answer = stowgate.post("/dicomweb/studies", *multipart(*instances))

    assert stowgate.opened(answer.headers["X-Payload-ID"])["file_count"] == 3


def test_one_study_in_two_posts_opens_two_requests(stowgate: Service) -> None:
    study, instances = study_of("MR", 2)

    answers = [
        stowgate.post(f"/dicomweb/studies/{study}", instance, "application/dicom")
        for instance in instances
    ]

    payload_ids = {answer.headers["X-Payload-ID"] for answer in answers}
    assert len(payload_ids) == 2
    for payload_id in payload_ids:
        assert stowgate.opened(payload_id)["file_count"] == 1


@pytest.mark.parametrize("path", PATHS)
def test_another_study_than_in_the_url_is_stored_with_warning_b007(
    stowgate: Service, aet: str, path: str
) -> None:
    """A VAE in the Gateway's documented format."""
    _, instances = study_of("CT", 2)

    answer = stowgate.post(f"{path.format(aet=aet)}/{generate_uid()}", *multipart(*instances))

    assert answer.status_code == 202
    reasons = [item["00081196"]["Value"] for item in answer.json()["00081199"]["Value"]]
    assert reasons == [[0xB007]] * 2
    payload_id = answer.headers["X-Payload-ID"]
    assert stowgate.opened(payload_id)["workflow_request"]["workflows"] == PATHS[path]
    assert stored_bytes(stowgate, payload_id) == sorted(instances)


def test_a_failed_instance_is_409_alone_and_202_with_stored_ones(stowgate: Service) -> None:
    alone = stowgate.post("/dicomweb/studies", b"no DICOM", "application/dicom")
    beside = stowgate.post("/dicomweb/studies", *multipart(b"no DICOM", new_instance()))

    assert (alone.status_code, beside.status_code) == (409, 202)
    for answer in (alone, beside):
        assert answer.headers["Content-Type"] == "application/dicom+json"
    assert stowgate.opened(beside.headers["X-Payload-ID"])["file_count"] == 1


@pytest.mark.parametrize(
    "path",
    [
        "/dicomweb/vae/nobody/studies",
        "/dicomweb/vae/nobody/MyWorkflow/studies",
        "/dicomweb/studies/not-a-uid",
        "/dicomweb/MyWorkflow/studies/1.2.x",
    ],
)
def test_an_unknown_vae_and_an_invalid_study_are_400_with_problem_details(
    stowgate: Service, path: str
) -> None:
    answer = stowgate.post(path, real_file(), "application/dicom")

    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == 400


def test_an_unknown_workflow_is_passed_to_the_workflow_manager(
    stowgate: Service,
) -> None:
    answer = stowgate.post(f"/dicomweb/{uuid4()}/studies", new_instance(), "application/dicom")

    assert answer.status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_no_data_is_204_and_another_media_type_is_415_without_a_body(
    stowgate: Service, aet: str, path: str
) -> None:
    empty = stowgate.post(path.format(aet=aet), b"", "application/dicom")
    other = stowgate.post(path.format(aet=aet), b"{}", "application/json")

    assert (empty.status_code, other.status_code) == (204, 415)
    assert empty.content == other.content == b""


def of_a_gateway(name: str, **fields: Any) -> dict[str, Any]:
    """A VAE as the Gateway lists it, with fields that Stowgate does not know."""
    return {
        "id": str(uuid4()),
        "name": name,
        "virtualAeTitle": name,
        "workflows": ["brain-tumor"],
        "plugInAssemblies": [],
        "createdBy": None,
        "updatedBy": None,
        "dateTimeUpdated": None,
        "dateTimeCreated": "2023-08-23T22:43:11.2233445Z",
        **fields,
    }


def gateway(*vaes: dict[str, Any]) -> AbstractContextManager[str]:
    return saying(json.dumps(vaes).encode())


@contextmanager
def saying(listed: bytes) -> Iterator[str]:
    """The URL of a Gateway that answers `GET /config/vae`."""

    class Listing(Answering):
        def do_GET(self) -> None:
            body = listed if self.path == "/config/vae" else b"[]"
            self.answer(200, body, Content_Type="application/json; charset=utf-8")

    with serving(Listing) as url:
        yield url


def copied(stowgate: Service, source_url: str, *more: str) -> "subprocess.CompletedProcess[str]":
    """The commands of `docs/migrating.md`, with the URLs of this test."""
    (line,) = re.findall(r"^\$ \.venv/bin/stowgate (vae copy .*)$", MIGRATING.read_text(), re.M)
    urls = {"http://gateway:5000": source_url, "http://stowgate:8080": stowgate.url}
    return subprocess.run(
        [STOWGATE, *(urls.get(word, word) for word in line.split()), *more],
        env=environment(Path("unused"), {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


PLUG_IN = "Monai.Deploy.Example.PlugIn, Monai.Deploy.Example"


def test_a_vae_with_plug_ins_is_copied_only_with_the_option_to_drop_them(stowgate: Service) -> None:
    plain, changing = (f"v-{uuid4().hex[:6]}" for _ in range(2))
    vaes = [of_a_gateway(changing, plugInAssemblies=[PLUG_IN]), of_a_gateway(plain)]
    with gateway(*vaes) as source_url:
        done = copied(stowgate, source_url)
        missing = stowgate.get(f"/config/vae/{changing}").status_code
        told = copied(stowgate, source_url, "--without-plug-ins")

    assert (done.returncode, done.stdout.split()) == (1, ["copied", plain])
    assert f"not copied: {changing}: Stowgate cannot run its plug-ins '{PLUG_IN}'" in done.stderr
    assert "--without-plug-ins" in done.stderr
    assert missing == 404
    assert f"copied {changing} without '{PLUG_IN}'\n" in told.stdout
    assert stowgate.get(f"/config/vae/{changing}").json()["plugInAssemblies"] == []


def test_the_vaes_of_a_gateway_are_copied_unchanged(stowgate: Service) -> None:
    names = [f"v-{uuid4().hex[:6]}" for _ in range(2)]
    vaes = [
        of_a_gateway(names[0], workflows=["a", "b"]),
        of_a_gateway(names[1], workflows=[]),
    ]
    with gateway(*vaes) as source_url:
        done = copied(stowgate, source_url)
        again = copied(stowgate, source_url)

    assert (done.returncode, again.returncode) == (0, 1), done.stderr
    assert done.stdout.split() == ["copied", names[0], "copied", names[1]]
    assert "already" in again.stderr
    for vae in vaes:
        shown = stowgate.get(f"/config/vae/{vae['name']}").json()
        for field in ("name", "virtualAeTitle", "workflows", "plugInAssemblies"):
            assert shown[field] == vae[field]


def test_a_vae_that_cannot_be_created_is_reported_and_the_others_are_copied(
    stowgate: Service,
) -> None:
    good, long = f"v-{uuid4().hex[:6]}", "longer-than-15-characters"
    with gateway(of_a_gateway(long), of_a_gateway(good)) as source_url:
        done = copied(stowgate, source_url)

    assert done.returncode == 1
    assert done.stdout.split() == ["copied", good]
    assert f"not copied: {long}: 400" in done.stderr


@pytest.mark.parametrize("said", [b"<html>", b"", b'{"status": "ok"}', b"[null]"])
def test_a_source_without_a_list_of_vaes_is_reported_in_one_line(
    stowgate: Service, said: bytes
) -> None:
    with saying(said) as source_url:
        done = copied(stowgate, source_url)

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert source_url in line


def test_an_unreachable_source_is_not_reported_as_this_stowgate(stowgate: Service) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = copied(stowgate, f"http://127.0.0.1:{closed.getsockname()[1]}")

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "is another Stowgate or an Informatics Gateway running there?" in line


def test_administration_has_the_json_shapes_of_the_gateway(stowgate: Service) -> None:
    url, name = f"{stowgate.url}/config/vae", f"v-{uuid4().hex[:6]}"
    given = {"name": name, "virtualAeTitle": name, "workflows": [str(UUID(int=1))]}

    created = requests.post(url, json=given, timeout=30)
    changed = requests.put(url, json={"name": name, "workflows": ["other"]}, timeout=30)
    listed = requests.get(url, timeout=30)
    removed = requests.delete(f"{url}/{name}", timeout=30)
    gone = requests.get(f"{url}/{name}", timeout=30)

    statuses = [answer.status_code for answer in (created, changed, listed, removed, gone)]
    assert statuses == [201, 200, 200, 200, 404]
    assert given.items() <= created.json().items()
    assert changed.json()["workflows"] == ["other"]
    assert changed.json() in listed.json()
    assert removed.json()["name"] == name
    assert requests.get(f"{url}/plug-ins", timeout=30).json() == {}


def test_an_instance_keeps_its_own_study_instance_uid(stowgate: Service) -> None:
    _, (instance,) = study_of("RT", 1)
    answer = stowgate.post(f"/dicomweb/studies/{generate_uid()}", instance, "application/dicom")

    folder = stowgate.data / "monaideploy" / answer.headers["X-Payload-ID"] / "dcm"
    assert [path.name for path in folder.iterdir()] == [uid(instance, "StudyInstanceUID")]
