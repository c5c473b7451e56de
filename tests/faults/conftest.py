"""A Stowgate for each test, on the engines that all tests share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from engines import NotToBeHad, ObjectStoreEndpoint
from stowgate_site import Site

T = TypeVar("T")


def own_engine(start: Callable[[], T]) -> T:
    """What `start` returns; without the engine the tests are skipped, and fail in CI."""
    try:
        return start()
    except NotToBeHad as why:
        words = f"engine missing: {why}"
        if os.environ.get("CI"):
            pytest.fail(words, pytrace=False)
        pytest.skip(words)


@pytest.fixture
def unattended_site(
    object_store_endpoint: ObjectStoreEndpoint, broker_url: str, tmp_path: Path
) -> Iterator[Site]:
    """Nothing runs yet, nor was a Workflow Manager ever there."""
    found = Site(tmp_path, broker_url, object_store_endpoint)
    try:
        yield found
    finally:
        found.close()
        found.remove()


@pytest.fixture
def site(unattended_site: Site) -> Site:
    """Nothing runs yet but the Workflow Manager's queue."""
    unattended_site.start_workflow_manager()
    return unattended_site
