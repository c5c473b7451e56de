"""What `make release` has built in `dist/`, used as its users do."""

import json
import re
import tarfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import pytest
import requests
from engines import lasting_port
from instances import multipart, new_instance
from program_output import ROOT, output_of
from service import running, wait_for

DIST = ROOT / "dist"
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
WHEEL = DIST / f"stowgate-{VERSION}-py3-none-any.whl"
SDIST = DIST / f"stowgate-{VERSION}.tar.gz"
BILL = DIST / f"stowgate-{VERSION}.cdx.json"
IMAGE = f"stowgate:{VERSION}"
PACKAGES = ("api", "cli", "shared", "worker")
UV = ROOT / ".venv" / "bin" / "uv"

pytestmark = pytest.mark.timeout(600)


def _in_git(*folders: str) -> set[str]:
    return set(output_of("git", "ls-files", "--", *folders).split("\n")) - {""}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a new environment, with the wheel and the locked dependencies."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    output_of(UV, "venv", "--quiet", place)
    install = partial(output_of, UV, "pip", "install", "--quiet", "--python", place, seconds=300)
    install("--require-hashes", "--requirement", ROOT / "requirements.lock")
    install("--no-deps", WHEEL)
    return place / "bin"


def _locked() -> dict[str, tuple[str, set[str]]]:
    """The version and the SHA-256 digests of each dependency of the lock file."""
    found: dict[str, tuple[str, set[str]]] = {}
    text = (ROOT / "requirements.lock").read_text()
    for name, version, rest in re.findall(r"^([\w.-]+)==(\S+)((?:.*\\\n)*.*)", text, re.MULTILINE):
        found[name] = version, set(re.findall(r"--hash=sha256:(\w+)", rest))
    return found


def _expect_opened(url: str) -> None:
    """An instance that is sent there is stored, and its workflow request is opened."""
    body, content_type = multipart(new_instance())
    answer = requests.post(
        f"{url}/dicomweb/studies", data=body, headers={"Content-Type": content_type}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    payload = f"{url}/payloads/{answer.headers['X-Payload-ID']}"
    wait_for(lambda: requests.get(payload, timeout=30).json()["state"] == "opened")


def test_the_wheel_has_the_files_of_the_packages_and_the_licence_only() -> None:
    with ZipFile(WHEEL) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        about = f"stowgate-{VERSION}.dist-info"
        metadata = BytesParser().parsebytes(wheel.read(f"{about}/METADATA"))
    assert {name for name in names if not name.startswith(about)} == _in_git(*PACKAGES)
    assert f"{about}/licenses/LICENSE" in names
    assert (metadata["Name"], metadata["Version"]) == ("stowgate", VERSION)


def test_the_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    output_of(UV, "build", "--quiet", "--wheel", "--out-dir", tmp_path, SDIST, seconds=300)
    assert (tmp_path / WHEEL.name).read_bytes() == WHEEL.read_bytes()


def test_the_sdist_has_no_file_that_is_not_in_the_repository() -> None:
    with tarfile.open(SDIST) as archive:
        files = {found.name.partition("/")[2] for found in archive.getmembers() if found.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    foreign = {n for n in files - made - _in_git(".") if not n.startswith("stowgate.egg-info/")}
    assert not foreign


def test_the_installed_wheel_stores_an_instance_and_opens_its_request(
    installed: Path, tmp_path: Path
) -> None:
    assert VERSION in output_of(installed / "stowgate", "--version")
    with running("run", tmp_path, installed / "stowgate") as service:
        _expect_opened(service.url)


def test_the_bill_of_materials_names_each_locked_dependency_with_its_digests() -> None:
    bill = json.loads(BILL.read_text())
    product = bill["metadata"]["component"]
    assert (product["name"], product["version"]) == ("stowgate", VERSION)
    named = {
        part["name"]: (
            part["version"],
            {
                digest["content"]
                for source in part.get("externalReferences", [])
                for digest in source.get("hashes", [])
                if digest["alg"] == "SHA-256"
            },
        )
        for part in bill["components"]
    }
    assert named == _locked()


@contextmanager
def _container(*options: str) -> Iterator[str]:
    container = output_of("docker", "run", "--detach", *options, IMAGE).strip()
    try:
        yield container
    finally:
        output_of("docker", "rm", "--force", "--volumes", container)


def test_the_image_stores_an_instance_and_opens_its_request_without_root() -> None:
    port = lasting_port()
    options = ("--env", "STOWGATE_ALLOW_ANYONE=true", "--publish", f"127.0.0.1:{port}:8080")
    with _container(*options) as container:
        inspect = partial(output_of, "docker", "inspect", container, "--format")
        wait_for(lambda: inspect("{{.State.Health.Status}}").strip() == "healthy", 120)
        assert inspect("{{.Config.User}}").strip() == "10001:10001"
        assert VERSION in output_of("docker", "exec", container, "stowgate", "--version")
        _expect_opened(f"http://127.0.0.1:{port}")
