"""Administration of Virtual Application Entities: `config/vae` of the Informatics Gateway."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import orjson
from flask import g, jsonify, url_for
from flask.typing import ResponseReturnValue
from marshmallow import Schema, ValidationError

from api.admission.small_bodies import SmallBodies
from api.auth import audit
from api.http.problems import BadRequest, Conflict, NotFound
from api.vae.registry import Vae, VaeMissing, VaeRegistry, VaeSchema, VaeTaken
from shared.time import utc_now

_SCHEMA = VaeSchema()
# PUT cannot change the AE title. `update` requires the name, with its own error text.
CHANGE_SCHEMA = VaeSchema(exclude=["virtual_ae_title"])

_LISTS = ("workflows", "plug_in_assemblies")
_ACCEPTED = ("accepted_sop_classes", "accepted_transfer_syntaxes", "accepted_modalities")
_SINGLE = ("max_instance_bytes", "max_requests_per_minute", "source")

_NOT_AN_OBJECT = "the body must be a JSON object that describes a VAE"

# The path of the list of plug-ins hides a VAE of this name.
_PLUG_INS = "plug-ins"


def vae_views(
    vaes: VaeRegistry, public_url: str | None, bodies: SmallBodies
) -> dict[str, Callable[..., ResponseReturnValue]]:
    """Return the views of `config/vae` by endpoint.

    Args:
        vaes: The registry.
        public_url: The base of the Location header; None makes it relative.
        bodies: Receives the bodies.
    """

    def list_all() -> ResponseReturnValue:
        return jsonify(_SCHEMA.dump(vaes.all().values(), many=True))

    def plug_ins() -> ResponseReturnValue:
        """Stowgate has no input plug-ins, as it stores instances unchanged."""
        return jsonify({})

    def show(name: str) -> ResponseReturnValue:
        vae = vaes.all().get(name)
        if vae is None:
            raise NotFound(f"no VAE has that name; GET {url_for('.list_all')} lists all VAEs")
        return jsonify(_SCHEMA.dump(vae))

    def add() -> ResponseReturnValue:
        given = _load(_SCHEMA, bodies)
        _check_plug_ins(given)
        vae = add_vae(vaes, given)
        location = (public_url or "") + url_for(".show", name=vae.name)
        return jsonify(_SCHEMA.dump(vae)), HTTPStatus.CREATED, {"Location": location}

    def update() -> ResponseReturnValue:
        given = _load(CHANGE_SCHEMA, bodies)
        if "name" not in given:
            raise BadRequest("name: required in the body, to identify the VAE")
        _check_plug_ins(given)
        return jsonify(_SCHEMA.dump(change_vae(vaes, given["name"], given)))

    def remove(name: str) -> ResponseReturnValue:
        return jsonify(_SCHEMA.dump(remove_vae(vaes, name)))

    return {
        "vae.list_all": list_all,
        "vae.plug_ins": plug_ins,
        "vae.show": show,
        "vae.add": add,
        "vae.update": update,
        "vae.remove": remove,
    }


def add_vae(vaes: VaeRegistry, given: dict[str, Any]) -> Vae:
    """Add a VAE for the caller, from the fields that `VaeSchema` loaded.

    Raises `BadRequest` and `Conflict`.
    """
    name = given.get("name") or given["virtual_ae_title"]
    if name == _PLUG_INS:
        raise BadRequest(f"name: {_PLUG_INS} is reserved for the list of plug-ins")
    audit.about(vae=name)
    try:
        return vaes.add(
            Vae(
                name=name,
                virtual_ae_title=given["virtual_ae_title"],
                date_time_created=utc_now(),
                created_by=g.caller.name,
                **({"workflows": (), "plug_in_assemblies": ()} | _changeable(given)),
            )
        )
    except VaeTaken as error:
        raise Conflict(str(error)) from error


def change_vae(vaes: VaeRegistry, name: str, given: dict[str, Any]) -> Vae:
    """Change the given fields of a VAE for the caller. Raises `NotFound`."""
    audit.about(vae=name)
    try:
        return vaes.update(
            name, date_time_updated=utc_now(), updated_by=g.caller.name, **_changeable(given)
        )
    except VaeMissing as error:
        raise NotFound(str(error)) from error


def remove_vae(vaes: VaeRegistry, name: str) -> Vae:
    """Remove a VAE. Raises `NotFound`."""
    try:
        return vaes.remove(name)
    except VaeMissing as error:
        raise NotFound("no VAE has that name") from error


def _check_plug_ins(given: dict[str, Any]) -> None:
    """A plug-in that is not run may be the one that was to remove patient data."""
    if given.get("plug_in_assemblies"):
        raise BadRequest(
            "plugInAssemblies: Stowgate has no input plug-in of that name, so it cannot do what "
            f"the plug-in would; GET {url_for('.plug_ins')} lists those that it has"
        )


def _load(schema: Schema, bodies: SmallBodies) -> dict[str, Any]:
    try:
        described = orjson.loads(bodies.receive())
    except orjson.JSONDecodeError as error:
        raise BadRequest(_NOT_AN_OBJECT) from error
    if not isinstance(described, dict):
        raise BadRequest(_NOT_AN_OBJECT)
    try:
        given: dict[str, Any] = schema.load(described)
    except ValidationError as error:
        words = "; ".join(f"{field}: {why}" for field, why in in_words(error).items())
        raise BadRequest(words) from error
    return given


def in_words(error: ValidationError) -> dict[str, str]:
    """Return what is wrong with each field."""
    return {field: _words(why) for field, why in error.messages_dict.items()}


def _changeable(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a request changes; an empty list of accepted values means no limit."""
    lists = {name: tuple(given[name] or ()) for name in _LISTS if name in given}
    accepted = {name: tuple(given[name] or ()) or None for name in _ACCEPTED if name in given}
    return lists | accepted | {name: given[name] for name in _SINGLE if name in given}


def _words(messages: Any) -> str:
    """Join marshmallow's messages, which are nested by index for lists."""
    if isinstance(messages, dict):
        return ", ".join(f"item {index}: {_words(why)}" for index, why in messages.items())
    return ", ".join(map(str, messages))
