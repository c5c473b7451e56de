"""Object stores and brokers that the contract tests run against."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import Broker, InMemory, Rabbit
from engines import ObjectStoreEndpoint
from object_stores import minio_store
from proxy import Proxy

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.s3.store import MinioObjectStore
from shared.ports import ObjectStore


@pytest.fixture(params=["folder", "minio", "versitygw"])
def unprepared(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A store whose bucket does not exist yet."""
    if request.param == "folder":
        return FolderObjectStore(tmp_path / "bucket")
    if request.param == "versitygw":
        endpoint = request.getfixturevalue("second_object_store_endpoint")
        return minio_store(endpoint, request.getfixturevalue("bucket_of_second_store"))
    endpoint = request.getfixturevalue("object_store_endpoint")
    return minio_store(endpoint, request.getfixturevalue("bucket"))


@pytest.fixture
def store(unprepared: ObjectStore) -> ObjectStore:
    unprepared.prepare()
    return unprepared


@pytest.fixture
def folder(tmp_path: Path) -> FolderObjectStore:
    store = FolderObjectStore(tmp_path / "bucket")
    store.prepare()
    return store


@pytest.fixture
def minio(object_store_endpoint: ObjectStoreEndpoint, bucket: str) -> MinioObjectStore:
    store = minio_store(object_store_endpoint, bucket)
    store.prepare()
    return store


@pytest.fixture(params=["memory", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    with contextlib.ExitStack() as closing:
        if request.param == "memory":
            yield InMemory(closing)
        else:
            yield Rabbit(request.getfixturevalue("broker_url"), closing)


@pytest.fixture
def rabbit(broker_url: str) -> Iterator[Rabbit]:
    with contextlib.ExitStack() as closing:
        yield Rabbit(broker_url, closing)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    with Proxy(broker_url, keeps_requests=True) as proxy:
        yield proxy
