"""Virtual Application Entities (VAEs) and their registry, which all replicas share.

The registry is one object in the state bucket. Only conditional writes change it, so names and AE
titles stay unique, and concurrent changes are applied one after the other.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

import orjson
from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_dump, pre_load, validate

from shared import versions
from shared.dicom.uids import is_code_string, is_uid
from shared.errors import ObjectMissing, Permanent, StowgateError, VersionConflict
from shared.ids import (
    AE_TITLE_RULE,
    SOURCE_RULE,
    WORKFLOW_ID_RULE,
    is_ae_title,
    is_source,
    is_workflow_id,
)
from shared.ports import ObjectStore
from shared.time import UtcDateTime

_KEY = "vae/registry.json"
_JSON = "application/json"
_CACHE_SECONDS = 2.0

_UID_RULE = "a UID is 1 to 64 characters: groups of digits, separated by dots"
_MODALITY_RULE = "a modality is 1 to 16 of A-Z 0-9 _ and spaces, without a space at either end"


@dataclass(frozen=True)
class Vae:
    """A Virtual Application Entity, with the field names of the Informatics Gateway in JSON.

    The fields from `accepted_sop_classes` on are its policy, which the Gateway does not have; None
    means no limit. `source` is the sender's name for the Workflow Manager, also an addition.
    `unknown` keeps the fields that a newer version wrote.
    """

    name: str
    virtual_ae_title: str
    workflows: tuple[str, ...]
    plug_in_assemblies: tuple[str, ...]
    date_time_created: datetime
    created_by: str | None = None
    updated_by: str | None = None
    date_time_updated: datetime | None = None
    accepted_sop_classes: tuple[str, ...] | None = None
    accepted_transfer_syntaxes: tuple[str, ...] | None = None
    accepted_modalities: tuple[str, ...] | None = None
    max_instance_bytes: int | None = None
    max_requests_per_minute: int | None = None
    source: str | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict, repr=False)


class VaeMissing(StowgateError):
    """No VAE has that name."""


class VaeTaken(StowgateError):
    """Another VAE has that name or AE title."""


class RegistryUnreadable(Permanent):
    """The stored registry is corrupt, or was written by a newer version."""


def _text(rule: str, check: Callable[[str], bool], **options: Any) -> fields.String:
    def validator(value: str) -> None:
        if not check(value):
            raise ValidationError(rule)

    return fields.String(validate=validator, **options)


def _ae_title(**options: Any) -> fields.String:
    return _text(AE_TITLE_RULE, is_ae_title, **options)


def _uids(name: str) -> fields.Field[Any]:
    return fields.List(_text(_UID_RULE, is_uid), data_key=name, allow_none=True)


class _Count(fields.Integer):
    """An integer, which may have a fraction of zero, as in JSON Schema (2020-12, 6.1.1)."""

    def __init__(self, name: str, max_count: int) -> None:
        in_range = validate.Range(min=1, max=max_count)
        super().__init__(data_key=name, strict=True, allow_none=True, validate=in_range)

    def _validated(self, value: Any) -> int:
        is_whole = isinstance(value, float) and value.is_integer()
        return super()._validated(int(value) if is_whole else value)


class VaeSchema(Schema):
    """A VAE in `config/vae` and in the registry. Nulls are omitted."""

    class Meta:
        unknown = EXCLUDE

    name = _ae_title()
    virtual_ae_title = _ae_title(data_key="virtualAeTitle", required=True)
    workflows = fields.List(_text(WORKFLOW_ID_RULE, is_workflow_id), allow_none=True)
    plug_in_assemblies = fields.List(
        fields.String(validate=validate.Length(min=1, max=512)),
        data_key="plugInAssemblies",
        allow_none=True,
    )
    accepted_sop_classes = _uids("acceptedSopClasses")
    accepted_transfer_syntaxes = _uids("acceptedTransferSyntaxes")
    accepted_modalities = fields.List(
        _text(_MODALITY_RULE, is_code_string),
        data_key="acceptedModalities",
        allow_none=True,
    )
    max_instance_bytes = _Count("maxInstanceBytes", 2**53)
    max_requests_per_minute = _Count("maxRequestsPerMinute", 1_000_000)
    source = _text(SOURCE_RULE, is_source, allow_none=True)
    created_by = fields.String(data_key="createdBy", dump_only=True)
    updated_by = fields.String(data_key="updatedBy", dump_only=True)
    date_time_created = UtcDateTime(data_key="dateTimeCreated", dump_only=True)
    date_time_updated = UtcDateTime(data_key="dateTimeUpdated", dump_only=True)

    @pre_load
    def _omit_blank_name(self, data: Any, **_: Any) -> Any:
        """Clients of the Informatics Gateway send a blank name to use the AE title."""
        if not isinstance(data, dict):
            return data
        name = data.get("name")
        is_blank = name is None or (isinstance(name, str) and not name.strip())
        return {k: v for k, v in data.items() if k != "name" or not is_blank}

    @post_dump
    def _omit_nulls(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {key: value for key, value in data.items() if value is not None}


class _StoredVaeSchema(VaeSchema):
    created_by = fields.String(data_key="createdBy", load_default=None)
    updated_by = fields.String(data_key="updatedBy", load_default=None)
    date_time_created = UtcDateTime(data_key="dateTimeCreated", required=True)
    date_time_updated = UtcDateTime(data_key="dateTimeUpdated", load_default=None)


VERSION = 1
"""The version of the registry's format. An optional field of a VAE does not need a new one."""

_STORED = _StoredVaeSchema(many=True)
_STORED_NAMES = {field.data_key or name for name, field in _StoredVaeSchema().fields.items()}


def _encode(vaes: Mapping[str, Vae], unknown: Mapping[str, Any]) -> bytes:
    rows = [
        {**row, **vae.unknown}
        for row, vae in zip(_STORED.dump(vaes.values()), vaes.values(), strict=True)
    ]
    return orjson.dumps({"version": VERSION, "vaes": rows, **unknown}, option=orjson.OPT_INDENT_2)


def _decode(data: bytes) -> tuple[dict[str, Vae], dict[str, Any]]:
    """Return the VAEs by name, and unknown fields of the registry."""
    try:
        registry = versions.loads(data, VERSION)
        rows = registry.pop("vaes")
        vaes = {
            known["name"]: Vae(
                **_with_tuples(known),
                unknown={name: row[name] for name in row.keys() - _STORED_NAMES},
            )
            for known, row in zip(_STORED.load(rows), rows, strict=True)
        }
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        raise RegistryUnreadable(
            f"{_KEY} is not a valid registry of VAEs: it {versions.why_unreadable(error)}"
        ) from error
    return vaes, registry


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}


@dataclass(frozen=True)
class _Registry:
    """One version of the stored registry; `version` is None before the first write.

    `unknown` keeps the fields that a newer version of Stowgate wrote.
    """

    version: str | None
    by_name: Mapping[str, Vae]
    by_ae_title: Mapping[str, Vae]
    unknown: Mapping[str, Any]


def _registry(
    version: str | None, vaes: Mapping[str, Vae], unknown: Mapping[str, Any]
) -> _Registry:
    by_ae_title = {vae.virtual_ae_title: vae for vae in vaes.values()}
    return _Registry(version, MappingProxyType(dict(vaes)), by_ae_title, unknown)


_EMPTY = _registry(None, {}, {})


class VaeRegistry:
    """Reads and changes the registry.

    Decoding a thousand VAEs takes 50 ms of CPU time, so each version is decoded once and shared.

    Raises:
        RegistryUnreadable: The stored registry cannot be decoded.
        Transient, Permanent: The object store failed.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._decoding = threading.Lock()
        self._decoded = _EMPTY
        self._cached = _EMPTY
        self._cached_until = 0.0

    def all(self) -> Mapping[str, Vae]:
        """Read all VAEs by name from the store."""
        return self._current().by_name

    def cached(self, ae_title: str) -> Vae | None:
        """Return the VAE with that AE title from the cache, which lasts two seconds."""
        fresh = time.monotonic() < self._cached_until
        return self._cached.by_ae_title.get(ae_title) if fresh else None

    def by_ae_title(self, ae_title: str) -> Vae | None:
        """Return the VAE with that AE title, at most two seconds old.

        A title that is not in the cache is read from the store, so that a VAE created at one
        replica can be used at the others at once.
        """
        if not is_ae_title(ae_title):
            return None
        return self.cached(ae_title) or self._current().by_ae_title.get(ae_title)

    def add(self, vae: Vae) -> Vae:
        """Add a VAE. Raises `VaeTaken`."""

        def insert(vaes: dict[str, Vae]) -> Vae:
            for other in vaes.values():
                if other.name == vae.name:
                    raise VaeTaken(f"the VAE name {vae.name} is already in use")
                if other.virtual_ae_title == vae.virtual_ae_title:
                    raise VaeTaken(
                        f"AE title {vae.virtual_ae_title} is already in use by VAE {other.name}"
                    )
            vaes[vae.name] = vae
            return vae

        return self._change(insert)

    def update(self, name: str, **changes: Any) -> Vae:
        """Change fields of a VAE. Raises `VaeMissing`."""

        def rewrite(vaes: dict[str, Vae]) -> Vae:
            vaes[name] = replace(_named(vaes, name), **changes)
            return vaes[name]

        return self._change(rewrite)

    def remove(self, name: str) -> Vae:
        """Remove a VAE. Raises `VaeMissing`."""

        def drop(vaes: dict[str, Vae]) -> Vae:
            removed = _named(vaes, name)
            del vaes[name]
            return removed

        return self._change(drop)

    def _current(self) -> _Registry:
        registry = self._read()
        self._cached = registry
        self._cached_until = time.monotonic() + _CACHE_SECONDS
        return registry

    def _read(self) -> _Registry:
        try:
            found = self._store.get(_KEY)
        except ObjectMissing:
            return _EMPTY
        with self._decoding:
            if self._decoded.version != found.version:
                vaes, unknown = _decode(found.data)
                self._decoded = _registry(found.version, vaes, unknown)
            return self._decoded

    def _change(self, change: Callable[[dict[str, Vae]], Vae]) -> Vae:
        while True:
            registry = self._read()
            vaes = dict(registry.by_name)
            changed = change(vaes)
            data = _encode(vaes, registry.unknown)
            try:
                if registry.version is None:
                    self._store.create(_KEY, data, _JSON)
                else:
                    self._store.replace(_KEY, data, registry.version, _JSON)
            except VersionConflict:
                continue
            self._cached_until = 0.0
            return changed


def _named(vaes: Mapping[str, Vae], name: str) -> Vae:
    if name not in vaes:
        raise VaeMissing(f"VAE {name} does not exist")
    return vaes[name]
