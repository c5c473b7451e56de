"""Virtual Application Entities: their shape, and the registry that all replicas share.

The registry is one object in the state bucket, changed by conditional writes only: whatever has
to be unique is checked against all of it, and of two changes at once one is made on top of the
other.
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
from shared.dicom.uids import CODE_STRING, UID, UID_MAX_CHARACTERS, is_code_string, is_uid
from shared.errors import ObjectMissing, Permanent, StowgateError, VersionConflict
from shared.ids import (
    AE_TITLE,
    AE_TITLE_RULE,
    SOURCE,
    SOURCE_RULE,
    WORKFLOW_ID,
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

_UID_RULE = "a UID is at most 64 characters, digits separated by dots"
_MODALITY_RULE = "a modality is 1 to 16 of A-Z 0-9 _ and spaces, none of those around it"

# What the rules say, in JSON Schema.
Shape = dict[str, Any]
AE_TITLE_SHAPE: Shape = {"pattern": f"^{AE_TITLE}$"}
SOURCE_SHAPE: Shape = {"pattern": f"^{SOURCE}$"}
WORKFLOW_ID_SHAPE: Shape = {"pattern": f"^{WORKFLOW_ID}$"}
UID_SHAPE: Shape = {"pattern": f"^{UID}$", "maxLength": UID_MAX_CHARACTERS}


@dataclass(frozen=True)
class Vae:
    """A Virtual Application Entity; the field names on the wire are the Informatics Gateway's.

    From `accepted_sop_classes` on they are its policy, which that does not know: what it accepts,
    of what size and how often, and None where that is not limited. `source` is an addition too: the
    sender's name for the Workflow Manager, None for the caller's or the address. `unknown` are
    fields that a newer service wrote, and that are kept for it.
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
    """There is no VAE of that name."""


class VaeTaken(StowgateError):
    """Another VAE has that name or AE title already."""


class RegistryUnreadable(Permanent):
    """What lies in the registry's place is damaged, or was written by a newer Stowgate."""


def _text(rule: str, check: Callable[[str], bool], shape: Shape, **options: Any) -> fields.String:
    def validator(value: str) -> None:
        if not check(value):
            raise ValidationError(rule)

    return fields.String(validate=validator, metadata=shape, **options)


def _ae_title(**options: Any) -> fields.String:
    return _text(AE_TITLE_RULE, is_ae_title, AE_TITLE_SHAPE, **options)


def _uids(name: str) -> fields.Field[Any]:
    return fields.List(_text(_UID_RULE, is_uid, UID_SHAPE), data_key=name, allow_none=True)


def _count(name: str, most: int) -> fields.Field[Any]:
    return fields.Integer(
        data_key=name, strict=True, allow_none=True, validate=validate.Range(min=1, max=most)
    )


class VaeSchema(Schema):
    """A VAE as `config/vae` answers it and as the registry keeps it. Nulls are left out."""

    class Meta:
        unknown = EXCLUDE

    name = _ae_title()
    virtual_ae_title = _ae_title(data_key="virtualAeTitle", required=True)
    workflows = fields.List(
        _text(WORKFLOW_ID_RULE, is_workflow_id, WORKFLOW_ID_SHAPE), allow_none=True
    )
    plug_in_assemblies = fields.List(
        fields.String(validate=validate.Length(min=1, max=512)),
        data_key="plugInAssemblies",
        allow_none=True,
    )
    accepted_sop_classes = _uids("acceptedSopClasses")
    accepted_transfer_syntaxes = _uids("acceptedTransferSyntaxes")
    accepted_modalities = fields.List(
        _text(_MODALITY_RULE, is_code_string, {"pattern": f"^{CODE_STRING}$"}),
        data_key="acceptedModalities",
        allow_none=True,
    )
    max_instance_bytes = _count("maxInstanceBytes", 2**53)
    max_requests_per_minute = _count("maxRequestsPerMinute", 1_000_000)
    source = _text(SOURCE_RULE, is_source, SOURCE_SHAPE, allow_none=True)
    created_by = fields.String(data_key="createdBy", dump_only=True)
    updated_by = fields.String(data_key="updatedBy", dump_only=True)
    date_time_created = UtcDateTime(data_key="dateTimeCreated", dump_only=True)
    date_time_updated = UtcDateTime(data_key="dateTimeUpdated", dump_only=True)

    @pre_load
    def _omit_blank_name(self, data: Any, **_: Any) -> Any:
        """Clients of the Informatics Gateway send one for a name that is to be the AE title."""
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
"""Of the registry's shape. A field of a VAE that older services may ignore needs no new one."""

_STORED = _StoredVaeSchema(many=True)
_STORED_NAMES = {field.data_key or name for name, field in _StoredVaeSchema().fields.items()}


def _encode(vaes: Mapping[str, Vae], unknown: Mapping[str, Any]) -> bytes:
    rows = [
        {**row, **vae.unknown}
        for row, vae in zip(_STORED.dump(vaes.values()), vaes.values(), strict=True)
    ]
    return orjson.dumps({"version": VERSION, "vaes": rows, **unknown}, option=orjson.OPT_INDENT_2)


def _decode(data: bytes) -> tuple[dict[str, Vae], dict[str, Any]]:
    """The VAEs by their names, and fields of the registry that are not known."""
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
            f"{_KEY} is no registry of VAEs that can be read: it {versions.why_unreadable(error)}"
        ) from error
    return vaes, registry


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}


@dataclass(frozen=True)
class _Registry:
    """All VAEs as one version of the stored registry has them; None where there is none yet.

    `unknown` are fields of a newer Stowgate, which are kept.
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
    """Every call that reads or writes the store may raise what the object store raises, and
    `RegistryUnreadable`.

    To read the registry costs little, to decode a thousand VAEs fifty milliseconds of a core. So
    each version is decoded once, and what was decoded is shared.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._decoding = threading.Lock()
        self._decoded = _EMPTY
        self._cached = _EMPTY
        self._cached_until = 0.0

    def all(self) -> Mapping[str, Vae]:
        """Every VAE by its name, as the store has them now."""
        return self._current().by_name

    def cached(self, ae_title: str) -> Vae | None:
        """The VAE of exactly that title, if it was there in the last few seconds; asks no store."""
        fresh = time.monotonic() < self._cached_until
        return self._cached.by_ae_title.get(ae_title) if fresh else None

    def by_ae_title(self, ae_title: str) -> Vae | None:
        """The VAE of exactly that title, no older than the cache's few seconds.

        A title that the cache does not know is looked up in the store, so that a VAE created at
        one replica can be used at the others at once.
        """
        if not is_ae_title(ae_title):
            return None
        return self.cached(ae_title) or self._current().by_ae_title.get(ae_title)

    def add(self, vae: Vae) -> Vae:
        """Raises `VaeTaken`."""

        def insert(vaes: dict[str, Vae]) -> Vae:
            for other in vaes.values():
                if other.name == vae.name:
                    raise VaeTaken(f"there is a VAE named {vae.name} already")
                if other.virtual_ae_title == vae.virtual_ae_title:
                    raise VaeTaken(f"VAE {other.name} has AE title {vae.virtual_ae_title} already")
            vaes[vae.name] = vae
            return vae

        return self._change(insert)

    def update(self, name: str, **changes: Any) -> Vae:
        """Raises `VaeMissing`."""

        def rewrite(vaes: dict[str, Vae]) -> Vae:
            vaes[name] = replace(_named(vaes, name), **changes)
            return vaes[name]

        return self._change(rewrite)

    def remove(self, name: str) -> Vae:
        """Raises `VaeMissing`."""

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
        raise VaeMissing(f"there is no VAE named {name}")
    return vaes[name]
