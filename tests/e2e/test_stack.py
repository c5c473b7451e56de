"""The compose stack from outside: what a sender sees, and what reaches the Workflow Manager.

The Workflow Manager is the strict double, which judges every request and the objects it names.
"""

import ipaddress
import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient
from engines import MINIO_IMAGE, NotToBeHad, lasting_port, rabbitmq_image
from instances import multipart, new_instance, real_file, uid
from program_output import ROOT, CommandFailed, output_of
from service import STOWGATE, wait_for

UP_SECONDS = 240

# `make e2e STORE=versitygw` has that store in place of MinIO.
STORE = os.environ.get("STORE") or "minio"
ENVIRONMENT = {
    "COMPOSE_PROFILES": f"demo,{STORE}",
    "OBJECT_STORE": {"minio": "http://minio:9000", "versitygw": "http://versitygw:7070"}[STORE],
    # By tag alone, as a machine without a registry has them.
    "MINIO_IMAGE": MINIO_IMAGE,
    "VERSITYGW_IMAGE": "versity/versitygw:v1.8.0",
    "RABBITMQ_IMAGE": rabbitmq_image(),
}

# The first test's time includes building and starting the stack.
pytestmark = pytest.mark.timeout(UP_SECONDS + 180)


@dataclass(frozen=True)
class Stack:
    """The services of one compose project, and the URL of the port that they publish."""

    port: int
    project: str = field(default_factory=lambda: f"stowgate-e2e-{secrets.token_hex(4)}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments: str, seconds: float = 60) -> str:
        return output_of(
            *("docker", "compose", "--project-name", self.project, *arguments),
            seconds=seconds,
            environment={"STOWGATE_PORT": str(self.port), **ENVIRONMENT},
        )

    def log(self, *services: str) -> list[str]:
        return self.compose("logs", "--no-color", "--no-log-prefix", *services).splitlines()

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--all", "--quiet", service).split()

    def addresses(self, service: str) -> set[str]:
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}"
        return set(output_of("docker", "inspect", "-f", form, *self.containers(service)).split())

    def post(self, path: str, body: Any, content_type: str, **headers: str) -> requests.Response:
        return requests.post(
            self.url + path,
            data=body,
            headers={"Content-Type": content_type, **headers},
            allow_redirects=False,
            timeout=120,
        )

    def opened(self, payload_id: str) -> dict[str, Any]:
        """The payload once its workflow request is opened, and the Workflow Manager has it."""

        def look() -> dict[str, Any] | None:
            answer = requests.get(f"{self.url}/payloads/{payload_id}", timeout=30)
            payload: dict[str, Any] = answer.json()
            return payload if payload.get("state") == "opened" else None

        payload = wait_for(look, 60)
        self.verdict(payload_id)
        return payload

    def verdict(self, payload_id: str) -> str:
        """What the Workflow Manager said of the payload's request, as soon as it has."""

        def look() -> str | None:
            lines = self.log("workflow-manager")
            return next((line for line in lines if f" {payload_id}" in line), None)

        verdict = wait_for(look, 60)
        assert verdict.startswith(f"accepted {payload_id} "), verdict
        return verdict

    @contextmanager
    def without(self, containers: list[str]) -> Iterator[None]:
        """Kill these containers, and have them back in the end."""
        output_of("docker", "kill", *containers)
        try:
            yield
        finally:
            output_of("docker", "start", *containers)
            wait_for(lambda: all(map(_is_healthy, containers)), 60)


def _is_healthy(container: str) -> bool:
    form = "{{.State.Health.Status}}"
    return output_of("docker", "inspect", "-f", form, container).strip() == "healthy"


def _need_docker() -> None:
    """Raises `NotToBeHad`; a Docker that cannot pull what the stack needs is none."""
    if shutil.which("docker") is None:
        raise NotToBeHad("there is no command docker")
    try:
        output_of("docker", "compose", "version")
        output_of("docker", "info")
        for image in _images():
            try:
                output_of("docker", "image", "inspect", image)
            except CommandFailed:
                output_of("docker", "pull", "--quiet", image, seconds=300)
    except (CommandFailed, subprocess.TimeoutExpired) as error:
        raise NotToBeHad(str(error)) from error


def _images() -> list[str]:
    config = output_of("docker", "compose", "config", "--format", "json", environment=ENVIRONMENT)
    services = json.loads(config)["services"].values()
    bases = re.findall(r"^FROM (\S+:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return [service["image"] for service in services if "build" not in service] + bases


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    try:
        _need_docker()
    except NotToBeHad as why:
        if os.environ.get("CI"):
            pytest.fail(f"no Docker for the stack: {why}", pytrace=False)
        pytest.skip(f"no Docker for the stack: {why}")
    stack = Stack(lasting_port())
    failed_before = request.session.testsfailed
    try:
        stack.compose(
            *("up", "--build", "--detach", "--wait", "--wait-timeout", str(UP_SECONDS)),
            seconds=UP_SECONDS + 60,
        )
        yield stack
    except BaseException:
        _show_log(stack, request.config)
        raise
    else:
        if request.session.testsfailed > failed_before:
            _show_log(stack, request.config)
    finally:
        stack.compose("down", "--volumes", "--rmi", "local", "--timeout", "5", seconds=120)


def _show_log(stack: Stack, config: pytest.Config) -> None:
    capture = config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print(stack.compose("ps", "--all"))
        print(stack.compose("logs", "--no-color", "--tail", "50"))


@pytest.fixture(autouse=True)
def nothing_rejected(stack: Stack) -> Iterator[None]:
    """Whatever a test does, the Workflow Manager must have nothing against our requests."""
    yield
    assert [line for line in stack.log("workflow-manager") if "REJECTED" in line] == []


@pytest.fixture(scope="module")
def vae(stack: Stack) -> str:
    """The AE title of a VAE of two workflows, created at whichever replica answered."""
    title = f"E2E_{secrets.token_hex(4)}"
    answer = requests.post(
        f"{stack.url}/config/vae",
        json={"virtualAeTitle": title, "workflows": ["lung-nodules", "liver"]},
        timeout=30,
    )
    assert answer.status_code == 201, answer.text
    return title


def test_instance_posted_as_multipart_reaches_the_workflow_manager(stack: Stack) -> None:
    instance = real_file()
    answer = stack.post("/dicomweb/studies", *multipart(instance))
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/dicom+json"
    [item] = answer.json()["00081199"]["Value"]
    assert item["00081155"]["Value"] == [uid(instance, "SOPInstanceUID")]

    payload_id = answer.headers["X-Payload-ID"]
    payload = stack.opened(payload_id)
    assert payload["workflow_request"]["payload_id"] == payload_id
    assert payload["workflow_request"]["file_count"] == payload["file_count"] == 1
    source = payload["workflow_request"]["trigger"]["source"]
    assert stack.verdict(payload_id) == (
        f"accepted {payload_id} workflows=[] files=1 source={source} destination=default"
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/", "Services"),
        ("/ui/payloads", "Payloads"),
        ("/ui/help", "dicomweb_client import DICOMwebClient"),
        ("/ui/static/page.css", "prefers-color-scheme"),
    ],
)
def test_the_operators_page_is_in_the_image(stack: Stack, path: str, words: str) -> None:
    answer = requests.get(f"{stack.url}{path}", headers={"Accept": "text/html"}, timeout=30)

    assert answer.status_code == 200
    assert words in answer.text


def test_dicomweb_client_stores_an_instance(stack: Stack) -> None:
    correlation_id = str(uuid4())
    ds = pydicom.dcmread(BytesIO(new_instance()))
    client = DICOMwebClient(f"{stack.url}/dicomweb/", headers={"X-Correlation-ID": correlation_id})
    stored = client.store_instances([ds])
    assert stored.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == ds.SOPInstanceUID

    payloads = requests.get(f"{stack.url}/payloads", timeout=30).json()["payloads"]
    [payload_id] = [p["payload_id"] for p in payloads if p["correlation_id"] == correlation_id]
    stack.opened(payload_id)


@pytest.mark.parametrize("study", ["", "/{study}"], ids=["no-study", "study"])
@pytest.mark.parametrize(
    ("path", "workflows", "has_vae"),
    [
        ("/dicomweb/studies", [], False),
        ("/dicomweb/chest.v2/studies", ["chest.v2"], False),
        ("/dicomweb/vae/{vae}/studies", ["lung-nodules", "liver"], True),
        ("/dicomweb/vae/{vae}/chest.v2/studies", ["chest.v2"], True),
    ],
)
def test_url_says_which_workflows_are_opened(
    stack: Stack, vae: str, path: str, study: str, workflows: list[str], has_vae: bool
) -> None:
    instance = new_instance()
    url = (path + study).format(vae=vae, study=uid(instance, "StudyInstanceUID"))
    answer = stack.post(url, instance, "application/dicom")
    assert answer.status_code == 200, answer.text
    request = stack.opened(answer.headers["X-Payload-ID"])["workflow_request"]
    assert request["workflows"] == workflows
    assert request["trigger"]["destination"] == (vae if has_vae else "default")


def test_vae_serves_at_every_replica(stack: Stack, vae: str) -> None:
    replicas = {f"{address}:8080" for address in stack.addresses("api")}
    assert len(replicas) == 2
    correlation_ids = set()

    def used_at_every_replica() -> bool:
        """both replicas answered"""
        correlation_id = str(uuid4())
        answer = stack.post(
            f"/dicomweb/vae/{vae}/studies",
            new_instance(),
            "application/dicom",
            **{"X-Correlation-ID": correlation_id},
        )
        assert answer.status_code == 200, answer.text
        correlation_ids.add(correlation_id)
        served = [json.loads(line) for line in stack.log("nginx") if line.startswith("{")]
        return replicas == {
            request["upstream"]
            for request in served
            if request["correlation_id"] in correlation_ids
        }

    wait_for(used_at_every_replica, 60)


@pytest.mark.parametrize(
    "path",
    [
        "/dicomweb/studies/",
        "//dicomweb//studies//",
        "/dicomweb/chest.v2//studies/",
        "/dicomweb/%63hest.v2/studies/",
        "/dicomweb//studies//{study}//",
    ],
)
def test_odd_spelling_of_a_path_is_served_without_a_redirect(stack: Stack, path: str) -> None:
    instance = new_instance()
    url = path.format(study=uid(instance, "StudyInstanceUID"))
    answer = stack.post(url, iter([instance]), "application/dicom")
    assert answer.status_code == 200, (answer.headers, answer.text)


def test_a_chunked_body_of_curl_is_stored_completely(stack: Stack) -> None:
    boundary = "------------------------d74496d66958873e"
    instances = [new_instance() for _ in range(3)]

    def body() -> Iterator[bytes]:
        for instance in instances:
            yield f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
            yield from (instance[i : i + 5000] for i in range(0, len(instance), 5000))
            yield b"\r\n"
        yield f"--{boundary}--\r\n".encode()

    answer = stack.post(
        "/dicomweb/studies",
        body(),
        f"multipart/related; type=application/dicom; boundary={boundary}",
        Expect="100-continue",
    )
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["00081199"]["Value"]) == 3
    assert stack.opened(answer.headers["X-Payload-ID"])["file_count"] == 3


def test_instance_of_100_megabytes_is_stored(stack: Stack) -> None:
    side = 7168
    pixels = bytes(side * side * 2)
    assert len(pixels) > 100_000_000
    instance = new_instance(Rows=side, Columns=side, PixelData=pixels)
    answer = stack.post("/dicomweb/studies", *multipart(instance))
    assert answer.status_code == 200, answer.text
    stack.opened(answer.headers["X-Payload-ID"])


def test_sender_in_the_middle_of_sending_gets_to_see_the_refusal(stack: Stack) -> None:
    for body in (bytes(20_000_000), iter([bytes(1_000_000)] * 200)):
        answer = stack.post("/dicomweb/vae/NO_SUCH_VAE/studies", body, "application/dicom")
        assert answer.status_code == 400
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_source_is_the_sender_and_neither_the_proxy_nor_what_the_sender_claims(
    stack: Stack,
) -> None:
    claimed = "198.51.100.7"
    answer = stack.post(
        "/dicomweb/studies", new_instance(), "application/dicom", **{"X-Forwarded-For": claimed}
    )
    payload = stack.opened(answer.headers["X-Payload-ID"])
    source = payload["workflow_request"]["trigger"]["source"]
    assert ipaddress.ip_address(source)
    assert len(source) <= 15
    assert source not in stack.addresses("nginx") | {claimed}


@pytest.mark.parametrize("service", ["api", "worker"])
def test_who_gets_into_a_container_of_ours_can_do_little_there(stack: Stack, service: str) -> None:
    for container in stack.containers(service):
        (found,) = json.loads(output_of("docker", "inspect", container))
        host, config = found["HostConfig"], found["Config"]

        assert config["User"] == "10001:10001"
        assert host["ReadonlyRootfs"] is True
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert not host["Privileged"]
        assert "no-new-privileges:true" in host["SecurityOpt"]
        status = output_of("docker", "exec", container, "cat", "/proc/1/status")
        values = dict(line.split(":\t", 1) for line in status.splitlines())
        assert set(values["Uid"].split()) == {"10001"}
        assert int(values["CapEff"], 16) == 0
        with pytest.raises(CommandFailed, match=r"Read-only file system|Permission denied"):
            output_of("docker", "exec", container, "touch", "/opt/x")


def test_stowgate_send_sends_through_the_stack(stack: Stack, vae: str, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.dcm").write_bytes(new_instance())
    said = output_of(str(STOWGATE), "send", "--url", stack.url, "--vae", vae, str(tmp_path))
    assert "stored 3 of 3 files" in said
    payload_id = re.search(r"payload (\S+)", said)
    assert payload_id, said
    payload = stack.opened(payload_id[1])
    assert payload["file_count"] == 3
    assert payload["destination"] == vae


def test_posts_succeed_and_open_while_one_replica_of_each_service_is_dead(stack: Stack) -> None:
    dead = [stack.containers(service)[0] for service in ("api", "worker")]
    with stack.without(dead):
        answers = [stack.post("/dicomweb/studies", *multipart(new_instance())) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        for answer in answers:
            stack.opened(answer.headers["X-Payload-ID"])


def test_sender_is_told_to_come_back_while_every_replica_is_dead(stack: Stack) -> None:
    with stack.without(stack.containers("api")):
        answer = stack.post("/dicomweb/studies", *multipart(new_instance()))
        assert answer.status_code == 503
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["status"] == 503
