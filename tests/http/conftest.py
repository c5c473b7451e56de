"""One embedded Stowgate for the tests of the HTTP contract."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from instances import new_instance, real_file
from limits import MAX_BODY_BYTES, MAX_PART_BYTES, MAX_PARTS
from service import Service, running


@pytest.fixture(scope="session")
def stowgate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(
        "run",
        tmp_path_factory.mktemp("embedded"),
        STOWGATE_MAX_BODY_BYTES=str(MAX_BODY_BYTES),
        STOWGATE_MAX_PART_BYTES=str(MAX_PART_BYTES),
        STOWGATE_MAX_PARTS=str(MAX_PARTS),
        STOWGATE_IDLE_SECONDS="2",
        STOWGATE_SPOOL_MEMORY_BYTES="50000",
    ) as service:
        yield service


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder as on a CD: two instances, a DICOMDIR and another file."""
    folder = tmp_path / "a folder"
    (folder / "IMAGES").mkdir(parents=True)
    for number in range(2):
        (folder / "IMAGES" / f"IM{number}").write_bytes(new_instance())
    (folder / "DICOMDIR").write_bytes(real_file())
    (folder / "README.TXT").write_text("read me")
    return folder
