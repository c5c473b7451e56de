"""The form of a VAE: its fields, and what a browser sends of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from marshmallow import Schema, ValidationError

from api.http.problems import BadRequest
from api.vae.registry import Vae, VaeSchema
from api.vae.views import CHANGE_SCHEMA, in_words
from shared.ids import AE_TITLE_RULE, SOURCE_RULE, WORKFLOW_ID_RULE

_MAX_FIELDS = 50


@dataclass(frozen=True)
class Field:
    """A field of the form: its name in JSON, the attribute of `Vae`, label and help."""

    name: str
    attribute: str
    label: str
    help: str
    is_list: bool = False
    is_number: bool = False


_IDENTITY = (
    Field(
        "virtualAeTitle",
        "virtual_ae_title",
        "AE title",
        f"Part of the URL, and cannot be changed later: {AE_TITLE_RULE}.",
    ),
    Field(
        "name",
        "name",
        "Name",
        "The Workflow Manager sees it as the destination. Leave it empty to use the AE title.",
    ),
)

_CHANGEABLE = (
    Field(
        "workflows",
        "workflows",
        "Workflows",
        "One id per line; all of them are opened for each POST. Empty: the Workflow Manager "
        f"selects them. {WORKFLOW_ID_RULE[0].upper()}{WORKFLOW_ID_RULE[1:]}.",
        is_list=True,
    ),
    Field(
        "source",
        "source",
        "Source",
        "The name of the senders for the Workflow Manager, in place of their address: "
        f"{SOURCE_RULE}.",
    ),
    Field(
        "acceptedModalities",
        "accepted_modalities",
        "Accepted modalities",
        "One per line, such as CT. Empty: all.",
        is_list=True,
    ),
    Field(
        "acceptedSopClasses",
        "accepted_sop_classes",
        "Accepted SOP classes",
        "One UID per line. Empty: all.",
        is_list=True,
    ),
    Field(
        "acceptedTransferSyntaxes",
        "accepted_transfer_syntaxes",
        "Accepted transfer syntaxes",
        "One UID per line. Empty: all.",
        is_list=True,
    ),
    Field(
        "maxInstanceBytes",
        "max_instance_bytes",
        "Largest instance, in bytes",
        "A larger one is refused with 413. Empty: the limit of the server.",
        is_number=True,
    ),
    Field(
        "maxRequestsPerMinute",
        "max_requests_per_minute",
        "POSTs per minute",
        "More are refused with 429, counted by each API process. Empty: no limit.",
        is_number=True,
    ),
)

FIELDS_OF_NEW = (*_IDENTITY, *_CHANGEABLE)
FIELDS_OF_CHANGE = _CHANGEABLE

_NEW = VaeSchema()


class FormInvalid(Exception):
    """What a browser sent is not a valid VAE; `errors` says why for each field."""

    def __init__(self, values: Mapping[str, str], errors: Mapping[str, str]) -> None:
        super().__init__("the form is not valid")
        self.values = values
        self.errors = errors


def values_of(vae: Vae | None) -> dict[str, str]:
    """Return the text of each field, empty for a new VAE."""
    return {
        field.name: _text(getattr(vae, field.attribute)) if vae else "" for field in FIELDS_OF_NEW
    }


def parsed(body: bytes) -> dict[str, str]:
    """Return the text of each field that was sent. Raises `BadRequest`."""
    try:
        found = parse_qs(
            body.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MAX_FIELDS,
        )
    except ValueError as error:
        raise BadRequest("the body is not a form (application/x-www-form-urlencoded)") from error
    return {field.name: found.get(field.name, [""])[0] for field in FIELDS_OF_NEW}


def loaded(values: Mapping[str, str], *, is_new: bool) -> dict[str, Any]:
    """Return the fields of a VAE as its schema loads them. Raises `FormInvalid`."""
    fields, schema = (FIELDS_OF_NEW, _NEW) if is_new else (FIELDS_OF_CHANGE, CHANGE_SCHEMA)
    described = {field.name: _value(field, values[field.name]) for field in fields}
    return _load(schema, described, values)


def _load(schema: Schema, described: dict[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = schema.load(described)
    except ValidationError as error:
        raise FormInvalid(values, in_words(error)) from error
    return found


def _value(field: Field, text: str) -> Any:
    if field.is_list:
        lines = (line.strip() for line in re.split(r"[\n,]", text))
        return [line for line in lines if line]
    text = text.strip()
    if field.is_number and re.fullmatch("[0-9]{1,18}", text):
        return int(text)
    if field.name == "virtualAeTitle":
        return text
    return text or None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return "\n".join(value) if isinstance(value, tuple) else str(value)
