"""Programs that send, from wherever they can be had."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import NotToBeHad, install_debian_package, program

CLIENT_MISSING = "client missing: "


def had_by_one_of(client: str, *ways: Callable[[], Path]) -> Path:
    """What the first way leads to that leads anywhere. Where none does, the test is skipped, and
    named in the last lines of the run; with CI set it fails."""
    reasons = []
    for way in ways:
        try:
            return way()
        except NotToBeHad as why:
            reasons.append(str(why))
    words = f"{CLIENT_MISSING}{client}: {'; '.join(reasons)}"
    if os.environ.get("CI"):
        pytest.fail(words, pytrace=False)
    pytest.skip(words)


def on_this_machine(name: str) -> Path:
    return Path(program(name))


def from_debian(package: str, name: str) -> Path:
    install_debian_package(package)
    return Path(program(name))
