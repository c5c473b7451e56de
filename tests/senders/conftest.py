"""One embedded Stowgate, with nothing set but what a test needs, for all senders."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import (
    from_debian,
    had_by_one_of,
    had_chromium,
    npm_packages,
    on_this_machine,
    orthanc_from_debian,
    orthanc_on_this_machine,
)
from instances import new_instance
from service import Service, running


@pytest.fixture(scope="session")
def stowgate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # What was seen on the wire names the hosts of its site.
    settings = {"STOWGATE_ALLOW_ANYONE": "true"}
    with running("run", tmp_path_factory.mktemp("stowgate"), **settings) as service:
        yield service


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A working folder with the files that the snippets of docs/senders.md send."""
    (tmp_path / "image.dcm").write_bytes(new_instance())
    (tmp_path / "series").mkdir()
    for number in range(3):
        (tmp_path / "series" / f"{number}.dcm").write_bytes(new_instance("MR_small.dcm"))
    return tmp_path


@pytest.fixture(scope="session")
def curl() -> Path:
    return had_by_one_of(
        "curl", lambda: on_this_machine("curl"), lambda: from_debian("curl", "curl")
    )


@pytest.fixture(scope="session")
def node() -> Path:
    return had_by_one_of(
        "node", lambda: on_this_machine("node"), lambda: from_debian("nodejs", "node")
    )


@pytest.fixture(scope="session")
def npm_folder() -> Path:
    """Where node_modules has dicomweb-client and what it needs outside a browser."""
    return had_by_one_of(
        "dicomweb-client (npm)",
        lambda: npm_packages(on_this_machine("npm")),
        lambda: npm_packages(from_debian("npm", "npm")),
    )


@pytest.fixture(scope="session")
def go() -> Path:
    return had_by_one_of(
        "go", lambda: on_this_machine("go"), lambda: from_debian("golang-go", "go")
    )


@pytest.fixture(scope="session")
def chromium() -> Path:
    return had_chromium()


@pytest.fixture(scope="session")
def orthanc() -> Path:
    return had_by_one_of("Orthanc", orthanc_on_this_machine, orthanc_from_debian)


@pytest.fixture(scope="session")
def java() -> Path:
    """Of a JDK, which runs a source file."""
    return had_by_one_of(
        "java",
        lambda: on_this_machine("javac").with_name("java"),
        lambda: from_debian("default-jdk-headless", "javac").with_name("java"),
    )
