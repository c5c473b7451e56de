"""One embedded Stowgate, with nothing set but what a test needs, for all senders."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import from_debian, had_by_one_of, on_this_machine
from instances import new_instance
from service import Service, running


@pytest.fixture(scope="session")
def stowgate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running("run", tmp_path_factory.mktemp("stowgate")) as service:
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
