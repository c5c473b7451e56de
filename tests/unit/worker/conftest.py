"""The bench of the handler tests."""

from pathlib import Path

import pytest
from handler_bench import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)
