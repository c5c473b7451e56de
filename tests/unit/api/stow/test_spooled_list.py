"""A list that is on disk above a threshold."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.stow.spooled_list import SpooledList


@pytest.fixture
def words(tmp_path: Path) -> Iterator[SpooledList[str]]:
    found: SpooledList[str] = SpooledList(tmp_path, 100, str)
    yield found
    found.spool.close()


@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_a_list_can_be_iterated_repeatedly(words: SpooledList[str], count: int) -> None:
    appended = [f"number {number}\n" for number in range(count)]
    for word in appended:
        words.append(word)

    next(iter(words), None)

    assert [*words] == [*words] == appended
    assert len(words) == count


def test_a_killed_process_leaves_no_file_of_a_list(words: SpooledList[str], tmp_path: Path) -> None:
    for number in range(1000):
        words.append(f"number {number}")

    assert [*words][-1] == "number 999"
    assert list(tmp_path.iterdir()) == []
