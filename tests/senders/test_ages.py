"""Clients at several ages, always with several instances in one POST; Java is in test_java.py."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from ages import GO, NODE, NPM, PYPI
from clients import (
    NPM_PACKAGES,
    go_toolchain,
    had_by_one_of,
    node_from_npm,
    npm_packages,
    on_this_machine,
    pypi_packages,
)
from instances import new_instance
from service import Service
from snippets import snippet

# What is installed first is so in a fixture, and may take minutes.
pytestmark = pytest.mark.timeout(180, func_only=True)

# As users of its oldest releases know it, which return nothing.
STORE = """
import sys

import pydicom
from dicomweb_client.api import DICOMwebClient

url, *paths = sys.argv[1:]
client = DICOMwebClient(url)
answer = client.store_instances([pydicom.dcmread(path) for path in paths])
stored = paths if answer is None else answer.ReferencedSOPSequence
print("stored", len(stored), "of", len(paths))
"""

# The writer of its own, which its users take for a few files.
WRITER = """
import asyncio
import sys
from pathlib import Path

import aiohttp


async def main(url, *paths):
    with aiohttp.MultipartWriter("related") as body:
        for path in paths:
            body.append(Path(path).read_bytes(), {"Content-Type": "application/dicom"})
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url}/studies", data=body) as answer:
                dataset = await answer.json(content_type="application/dicom+json")
    print("stored", len(dataset["00081199"]["Value"]), "of", len(paths))


asyncio.run(main(*sys.argv[1:]))
"""


def _output(command: list[str | Path], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def _series(desk: Path) -> list[Path]:
    return sorted((desk / "series").iterdir())


def _is_one_payload(stowgate: Service, desk: Path) -> bool:
    """Whether all of the series are stored as they are, by one POST."""
    payloads = [stowgate.payloads_with(path.read_bytes()) for path in _series(desk)]
    return len(payloads[0]) == 1 and all(found == payloads[0] for found in payloads)


def _scripts(client: str, url: str) -> list[str]:
    if client == "requests":
        return [snippet("requests", "python", 2, url=url)]
    if client == "httpx":
        return [snippet("httpx", "python", url=url)]
    if client == "aiohttp":
        return [snippet("aiohttp", "python", url=url), WRITER]
    return [STORE]


@pytest.fixture
def packages(client: str, age: str) -> Path:
    return had_by_one_of(f"{client} {age}", partial(pypi_packages, *PYPI[client][age]))


@pytest.mark.parametrize(
    ("client", "age"), [(client, age) for client, ages in PYPI.items() for age in ages]
)
def test_a_client_of_pypi_stores_several(
    packages: Path, client: str, age: str, stowgate: Service, desk: Path
) -> None:
    name = client.partition(" ")[0]
    this_age = f"from importlib.metadata import version\nassert version({name!r}) == {age!r}\n"
    for script in _scripts(client, stowgate.url):
        for path in _series(desk):
            path.write_bytes(new_instance("MR_small.dcm"))
        arguments: list[str | Path] = [f"{stowgate.url}/dicomweb", *_series(desk)]
        command = [sys.executable, "-c", this_age + script, *arguments]

        assert _output(command, desk, PYTHONPATH=str(packages)) == "stored 3 of 3"
        assert _is_one_payload(stowgate, desk)


@pytest.fixture(scope="module")
def npm() -> Path:
    return had_by_one_of("npm", lambda: on_this_machine("npm"))


@pytest.fixture(scope="module")
def dicomweb_clients(npm: Path) -> Path:
    return had_by_one_of(
        "dicomweb-client (npm) at its ages", lambda: npm_packages(npm, NPM_PACKAGES / "ages")
    )


@pytest.mark.parametrize("age", NPM)
def test_dicomweb_client_of_npm_stores_several(
    node: Path, dicomweb_clients: Path, age: str, stowgate: Service, desk: Path
) -> None:
    (desk / "node_modules").symlink_to(dicomweb_clients / "node_modules")
    code = snippet("dicomweb-client (npm) and OHIF", "js", url=stowgate.url)
    (desk / "store.mjs").write_text(
        code.replace('from "dicomweb-client"', f'from "dicomweb-client-{age}"')
    )

    assert _output([node, "store.mjs"], desk) == "stored 3 of 3"
    assert _is_one_payload(stowgate, desk)


@pytest.mark.parametrize("age", NODE)
def test_node_stores_several(npm: Path, age: str, stowgate: Service, desk: Path) -> None:
    node = had_by_one_of(f"node {age}", lambda: node_from_npm(npm, age))
    assert _output([node, "--version"], desk) == f"v{age}"
    (desk / "store.mjs").write_text(snippet("Node", "js", url=stowgate.url))

    assert _output([node, "store.mjs"], desk).startswith("200 ")
    assert _is_one_payload(stowgate, desk)


@pytest.fixture
def old_go(go: Path, age: str, tmp_path: Path) -> Path:
    """Which has built its libraries, as that takes the longest."""
    found = had_by_one_of(f"go {age}", lambda: go_toolchain(go, f"go{age}"))
    (tmp_path / "warm.go").write_text('package main\nimport _ "net/http"\nfunc main() {}\n')
    _output([found, "build", "-o", os.devnull, "warm.go"], tmp_path, GOTOOLCHAIN=f"go{age}")
    return found


@pytest.mark.parametrize("age", GO)
def test_go_stores_several(old_go: Path, age: str, stowgate: Service, desk: Path) -> None:
    (desk / "store.go").write_text(snippet("Go", "go", url=stowgate.url))

    told = _output([old_go, "run", "store.go"], desk, GOTOOLCHAIN=f"go{age}")

    assert told.startswith("200 ")
    assert _is_one_payload(stowgate, desk)
