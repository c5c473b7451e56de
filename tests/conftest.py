"""The real engines as fixtures. Where one comes from is in `engines.py`."""

import os
import pickle
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import CLIENT_MISSING
from engines import (
    MISSING,
    SECOND_OBJECT_STORE,
    Engines,
    NotToBeHad,
    ObjectStoreEndpoint,
    object_store_client,
)
from minio.deleteobjects import DeleteObject
from minio.error import S3Error

ENGINES = pytest.StashKey[Engines]()
FIXTURES = {
    "object_store_endpoint": "object store",
    "second_object_store_endpoint": SECOND_OBJECT_STORE,
    "broker_url": "broker",
}


def _sources(config: pytest.Config) -> Iterable[Path]:
    for argument in config.args:
        path = config.invocation_params.dir / argument.partition("::")[0]
        if path.is_dir():
            yield from path.rglob("*.py")
        else:
            yield from (path, path.parent / "conftest.py")


def _wanted_engines(config: pytest.Config) -> set[str]:
    # The header comes before the collection, so go by the words in the tests.
    texts = [path.read_text(encoding="utf-8") for path in _sources(config) if path.is_file()]
    return {
        engine
        for fixture, engine in FIXTURES.items()
        if any(re.search(rf"\b{fixture}\b", text) for text in texts)
    }


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    terminal = config.pluginmanager.get_plugin("terminalreporter")

    def say(line: str) -> None:
        if terminal is not None:
            terminal.write_line(f"engines: {line}")

    # Processes that pytest-xdist starts share the engines of the one that started them.
    handed_down = getattr(config, "workerinput", {}).get("engines")
    engines = Engines(say, pickle.loads(handed_down) if handed_down else {})
    config.stash[ENGINES] = engines
    config.add_cleanup(engines.close)
    if not handed_down and not config.option.collectonly:
        engines.start(_wanted_engines(config))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist is about to start a process for a part of the tests."""
    node.workerinput["engines"] = pickle.dumps(node.config.stash[ENGINES].outcomes)


@pytest.hookimpl(trylast=True)
def pytest_report_header(config: pytest.Config) -> str:
    return f"engines: {config.stash[ENGINES].describe()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
        and any(missing in report.longrepr[2] for missing in (MISSING, CLIENT_MISSING))
    ]
    if not skipped:
        return
    terminalreporter.section(
        f"{len(skipped)} tests of real engines and clients were skipped", yellow=True
    )
    for reason in sorted({report.longrepr[2] for report in skipped}):
        terminalreporter.write_line(reason)
    for report in skipped:
        terminalreporter.write_line(f"  {report.nodeid}")


def _address(request: pytest.FixtureRequest, name: str) -> ObjectStoreEndpoint | str:
    try:
        return request.config.stash[ENGINES].address(name)
    except NotToBeHad as why:
        # The second store needs Go, which not every machine has.
        if os.environ.get("CI") and name != SECOND_OBJECT_STORE:
            pytest.fail(f"{MISSING}{name}: {why}", pytrace=False)
        pytest.skip(f"{MISSING}{name}: {why}")


@pytest.fixture(scope="session")
def object_store_endpoint(request: pytest.FixtureRequest) -> ObjectStoreEndpoint:
    """A real S3 object store, shared with every other test: use a `bucket` of your own."""
    address = _address(request, "object store")
    assert isinstance(address, ObjectStoreEndpoint)
    return address


@pytest.fixture(scope="session")
def second_object_store_endpoint(request: pytest.FixtureRequest) -> ObjectStoreEndpoint:
    """A store of another make than the first one, shared in the same way."""
    address = _address(request, SECOND_OBJECT_STORE)
    assert isinstance(address, ObjectStoreEndpoint)
    return address


@pytest.fixture(scope="session")
def broker_url(request: pytest.FixtureRequest) -> str:
    """A real RabbitMQ, shared with every other test: name what you declare at random."""
    address = _address(request, "broker")
    assert isinstance(address, str)
    return address


@pytest.fixture
def bucket(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    """The name of a bucket that does not exist yet; removed with all that is in it."""
    yield from _bucket(object_store_endpoint)


@pytest.fixture
def second_bucket(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    """Another one."""
    yield from _bucket(object_store_endpoint)


@pytest.fixture
def bucket_of_second_store(second_object_store_endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    """The same at the second store."""
    yield from _bucket(second_object_store_endpoint)


def _bucket(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    name = f"stowgate-test-{secrets.token_hex(8)}"
    yield name
    client = object_store_client(object_store_endpoint)
    try:
        keys = client.list_objects(bucket_name=name, recursive=True)
        doomed = [DeleteObject(key.object_name) for key in keys if key.object_name]
        assert not list(client.remove_objects(bucket_name=name, delete_object_list=doomed))
        client.remove_bucket(bucket_name=name)
    except S3Error as error:
        if error.code != "NoSuchBucket":
            raise
