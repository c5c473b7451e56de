"""Buckets of a real object store that keep what is removed as versions."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from engines import ObjectStoreEndpoint, object_store_client
from minio.commonconfig import ENABLED, Filter
from minio.deleteobjects import DeleteObject
from minio.lifecycleconfig import (
    Expiration,
    LifecycleConfig,
    NoncurrentVersionExpiration,
    Rule,
)
from minio.versioningconfig import VersioningConfig


@contextmanager
def versioned(endpoint: ObjectStoreEndpoint) -> Iterator[str]:
    """The name of one, which is removed with all that is in it."""
    client, name = object_store_client(endpoint), f"versioned-{secrets.token_hex(8)}"
    client.make_bucket(bucket_name=name)
    client.set_bucket_versioning(bucket_name=name, config=VersioningConfig(ENABLED))
    yield name
    found = client.list_objects(bucket_name=name, recursive=True, include_version=True)
    doomed = [DeleteObject(str(one.object_name), one.version_id) for one in found]
    assert not list(client.remove_objects(bucket_name=name, delete_object_list=doomed))
    client.remove_bucket(bucket_name=name)


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
