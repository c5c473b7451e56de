"""The instances of a payload, and their part of the workflow request."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson

from shared.dicom.left_out import NOTHING_LEFT_OUT, LeftOut
from shared.dicom.uids import is_uid

_BATCH = 100


def instance_path(study_uid: str, series_uid: str, sop_instance_uid: str) -> str:
    """Return the path below the payload id that the Workflow Manager expects."""
    return f"dcm/{study_uid}/{series_uid}/{sop_instance_uid}.dcm"


@dataclass(frozen=True)
class StoredInstance:
    """One instance in the payloads' bucket.

    `left_out` names the parts that its metadata sidecar does not need.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    size_bytes: int
    sha256: str
    left_out: LeftOut = NOTHING_LEFT_OUT

    @property
    def path(self) -> str:
        return instance_path(self.study_uid, self.series_uid, self.sop_instance_uid)

    @property
    def metadata_path(self) -> str:
        return f"{self.path}.json"


def load_instance(row: Any) -> StoredInstance:
    """Read an instance from its JSON object. Raises ValueError, TypeError or KeyError.

    For thousands of instances, a marshmallow schema would take seconds.
    """
    instance = StoredInstance(**{**row, "left_out": _left_out(row["left_out"])})
    if not _is_stored_instance(instance):
        raise ValueError("an instance has a value of the wrong type")
    return instance


def _left_out(row: dict[str, Any]) -> LeftOut:
    pairs = {name: tuple(map(tuple, row[name])) for name in ("ranges", "without_value")}
    return LeftOut(**{**row, **pairs})


def _are_pairs(pairs: tuple[Any, ...], kind: type) -> bool:
    return all(len(pair) == 2 and all(isinstance(one, kind) for one in pair) for pair in pairs)


def _is_stored_instance(instance: StoredInstance) -> bool:
    uids = (
        instance.sop_class_uid,
        instance.sop_instance_uid,
        instance.study_uid,
        instance.series_uid,
    )
    return (
        all(isinstance(uid, str) and is_uid(uid) for uid in uids)
        and isinstance(instance.size_bytes, int)
        and isinstance(instance.sha256, str)
        and _are_pairs(instance.left_out.ranges, int)
        and _are_pairs(instance.left_out.without_value, str)
        and isinstance(instance.left_out.is_inflated, bool)
        and isinstance(instance.left_out.is_explicit, bool | None)
    )


def workflow_request_json(
    request: Mapping[str, Any], instances: Iterable[StoredInstance]
) -> Iterator[bytes]:
    """Yield a workflow request with its last field, `payload`, in pieces.

    A record keeps the request without this field, which follows from the instances.
    """
    yield orjson.dumps(request)[:-1] + b',"payload":['
    rest, separator = iter(instances), b""
    while batch := [
        {"path": instance.path, "metadata": instance.metadata_path}
        for instance in islice(rest, _BATCH)
    ]:
        yield separator + orjson.dumps(batch)[1:-1]
        separator = b","
    yield b"]}"
