"""Senders written for Node and in Go: dicomweb-client of npm, and what their own libraries make."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from instances import new_instance
from service import Service, running
from snippets import snippet

# A body that is still being sent when it is refused, so larger than what sockets hold.
MAX_BODY_BYTES = 1 << 20
LARGE_BYTES = 32 << 20

# A client that is installed first is a fixture, and may take minutes.
pytestmark = pytest.mark.timeout(180, func_only=True)

Run = Callable[..., str]


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("strict")
    with running("run", folder, STOWGATE_MAX_BODY_BYTES=str(MAX_BODY_BYTES)) as service:
        yield service


def _output(command: list[str | Path], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def dicomweb_client(node: Path, npm_folder: Path, desk: Path) -> Run:
    (desk / "node_modules").symlink_to(npm_folder / "node_modules")

    def run(url: str, base: str = "/dicomweb") -> str:
        code = snippet("dicomweb-client (npm) and OHIF", "js", url=url)
        (desk / "store.mjs").write_text(code.replace("/dicomweb", base))
        return _output([node, "store.mjs"], desk)

    return run


@pytest.fixture
def node_sender(node: Path, desk: Path) -> Run:
    def run(url: str) -> str:
        (desk / "store.mjs").write_text(snippet("Node", "js", url=url))
        return _output([node, "store.mjs"], desk)

    return run


@pytest.fixture
def go_sender(go: Path, desk: Path) -> Run:
    def run(url: str) -> str:
        (desk / "store.go").write_text(snippet("Go", "go", url=url))
        return _output([go, "run", "store.go"], desk)

    return run


def _stored(stowgate: Service, desk: Path) -> bool:
    return all(stowgate.payloads_with(path.read_bytes()) for path in (desk / "series").iterdir())


def test_dicomweb_client_stores_many(dicomweb_client: Run, stowgate: Service, desk: Path) -> None:
    assert dicomweb_client(stowgate.url) == "stored 3 of 3"
    assert _stored(stowgate, desk)


def test_dicomweb_client_takes_a_base_url_with_a_slash_behind(
    dicomweb_client: Run, stowgate: Service, desk: Path
) -> None:
    assert dicomweb_client(stowgate.url, base="/dicomweb/") == "stored 3 of 3"
    assert _stored(stowgate, desk)


def test_dicomweb_client_resolves_a_202_and_rejects_a_409(
    dicomweb_client: Run, stowgate: Service, desk: Path
) -> None:
    (desk / "series" / "0.dcm").write_bytes(b"no DICOM")
    assert dicomweb_client(stowgate.url) == "stored 2 of 3"

    for path in (desk / "series").iterdir():
        path.write_bytes(b"no DICOM")
    refused, dataset = dicomweb_client(stowgate.url).split("{", 1)
    assert refused == "refused with 409 "
    assert len(json.loads("{" + dataset)["0008119A"]["Value"]) == 3


@pytest.mark.parametrize("sender", ["node_sender", "go_sender"])
def test_a_chunked_multipart_is_stored_as_it_is(
    request: pytest.FixtureRequest, sender: str, stowgate: Service, desk: Path
) -> None:
    (desk / "series" / "more.dcm").write_bytes(new_instance("examples_palette.dcm"))

    status, _, body = request.getfixturevalue(sender)(stowgate.url).partition(" ")

    assert status == "200"
    assert len(json.loads(body)["00081199"]["Value"]) == 4
    assert _stored(stowgate, desk)


@pytest.mark.parametrize("sender", ["dicomweb_client", "node_sender", "go_sender"])
def test_a_refusal_in_the_middle_of_a_large_body_is_read(
    request: pytest.FixtureRequest, sender: str, strict: Service, desk: Path
) -> None:
    (desk / "series" / "large.dcm").write_bytes(bytes(LARGE_BYTES))

    told = request.getfixturevalue(sender)(strict.url)

    assert told.removeprefix("refused with ").startswith("413 ")
    assert f"{MAX_BODY_BYTES} bytes" in told
