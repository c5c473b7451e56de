"""Buckets of a real object store that keep what is removed as versions."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from engines import OBJECT_STORE_VARIABLE, VERSITYGW, ObjectStoreEndpoint, object_store_client
from minio.commonconfig import ENABLED, Filter
from minio.deleteobjects import DeleteObject
from minio.lifecycleconfig import (
    Expiration,
    LifecycleConfig,
    NoncurrentVersionExpiration,
    Rule,
)
from minio.versioningconfig import VersioningConfig


def require_versions() -> None:
    """Skip the test if the buckets with versions of the store under test are refused."""
    if os.environ.get(OBJECT_STORE_VARIABLE) == VERSITYGW:
        pytest.skip("its buckets with versions are refused, see test_store_conformance.py")


def make_versioned(endpoint: ObjectStoreEndpoint) -> str:
    """Make one, and return its name."""
    client, name = object_store_client(endpoint), f"versioned-{secrets.token_hex(8)}"
    client.make_bucket(bucket_name=name)
    client.set_bucket_versioning(bucket_name=name, config=VersioningConfig(ENABLED))
    return name


def remove_versioned(endpoint: ObjectStoreEndpoint, bucket: str) -> None:
    """Remove one with all that is in it, also what a lock in governance mode holds."""
    client = object_store_client(endpoint)
    found = client.list_objects(bucket_name=bucket, recursive=True, include_version=True)
    doomed = [DeleteObject(str(one.object_name), one.version_id) for one in found]
    assert not list(
        client.remove_objects(
            bucket_name=bucket, delete_object_list=doomed, bypass_governance_mode=True
        )
    )
    client.remove_bucket(bucket_name=bucket)


@contextmanager
def versioned(endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    """The name of one, which is removed with all that is in it."""
    require_versions()
    name = make_versioned(endpoint)
    yield name
    remove_versioned(endpoint, name)


def clear_versions(endpoint: ObjectStoreEndpoint, bucket: str) -> None:
    """Set the rule that the documentation names."""
    rule = Rule(
        ENABLED,
        rule_filter=Filter(prefix=""),
        rule_id="stowgate",
        expiration=Expiration(expired_object_delete_marker=True),
        noncurrent_version_expiration=NoncurrentVersionExpiration(noncurrent_days=1),
    )
    client = object_store_client(endpoint)
    client.set_bucket_lifecycle(bucket_name=bucket, config=LifecycleConfig([rule]))
