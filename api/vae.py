"""Administration of Virtual Application Entities: `config/vae` of the Informatics Gateway."""

from http import HTTPStatus
from threading import BoundedSemaphore
from typing import Any

import orjson
from flask import Blueprint, g, jsonify, request, url_for
from flask.typing import ResponseReturnValue
from marshmallow import Schema, ValidationError

from api import audit
from api.problems import BadRequest, Conflict, NoSuchThing, TooBusy, TooLarge
from shared.time import utc_now
from shared.vae import Vae, VaeMissing, VaeRegistry, VaeSchema, VaeTaken

_SCHEMA = VaeSchema()
# What PUT takes: the AE title stays what it is. The name is required, in words of its own.
CHANGE_SCHEMA = VaeSchema(exclude=["virtual_ae_title"])

_LISTS = ("workflows", "plug_in_assemblies")
_ACCEPTED = ("accepted_sop_classes", "accepted_transfer_syntaxes", "accepted_modalities")
_SINGLE = ("max_instance_bytes", "max_requests_per_minute", "source")

_MOST_BYTES = 1 << 20

# A body that stalls holds a thread for some seconds, and there are others to serve.
_BODIES_AT_ONCE = 2
_BODY_WAIT_SECONDS = 0.25
_NO_OBJECT = "the body must be a JSON object that describes a VAE"
_NOT_WHOLE = "the body did not arrive whole, or not in time; send it again"

# A VAE of this name could not be shown.
_PLUG_INS = "plug-ins"


def vae_blueprint(vaes: VaeRegistry, public_url: str | None) -> Blueprint:
    blueprint = Blueprint("vae", __name__, url_prefix="/config/vae")
    receiving = BoundedSemaphore(_BODIES_AT_ONCE)

    @blueprint.get("")
    def list_all() -> ResponseReturnValue:
        return jsonify(_SCHEMA.dump(vaes.all().values(), many=True))

    @blueprint.get(f"/{_PLUG_INS}")
    def plug_ins() -> ResponseReturnValue:
        """Input plug-ins by name; Stowgate changes nothing in what it is sent and has none."""
        return jsonify({})

    @blueprint.get("/<name>")
    def show(name: str) -> ResponseReturnValue:
        vae = vaes.all().get(name)
        if vae is None:
            raise NoSuchThing(f"there is no VAE of that name; GET {url_for('.list_all')} lists all")
        return jsonify(_SCHEMA.dump(vae))

    @blueprint.post("")
    def add() -> ResponseReturnValue:
        given = _load(_SCHEMA, receiving)
        name = given.get("name") or given["virtual_ae_title"]
        if name == _PLUG_INS:
            raise BadRequest(f"name: {_PLUG_INS} is the name of the list of plug-ins")
        _check_plug_ins(given)
        audit.about(vae=name)
        try:
            vae = vaes.add(
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
        location = (public_url or "") + url_for(".show", name=vae.name)
        return jsonify(_SCHEMA.dump(vae)), HTTPStatus.CREATED, {"Location": location}

    @blueprint.put("")
    def update() -> ResponseReturnValue:
        given = _load(CHANGE_SCHEMA, receiving)
        if "name" not in given:
            raise BadRequest("name: the VAE to change must be named in the body")
        _check_plug_ins(given)
        audit.about(vae=given["name"])
        try:
            vae = vaes.update(
                given["name"],
                date_time_updated=utc_now(),
                updated_by=g.caller.name,
                **_changeable(given),
            )
        except VaeMissing as error:
            raise NoSuchThing(str(error)) from error
        return jsonify(_SCHEMA.dump(vae))

    @blueprint.delete("/<name>")
    def remove(name: str) -> ResponseReturnValue:
        try:
            return jsonify(_SCHEMA.dump(vaes.remove(name)))
        except VaeMissing as error:
            raise NoSuchThing("there is no VAE of that name") from error

    return blueprint


def _check_plug_ins(given: dict[str, Any]) -> None:
    """A plug-in that is not run may be the one that was to remove patient data."""
    if given.get("plug_in_assemblies"):
        raise BadRequest(
            "plugInAssemblies: Stowgate has no input plug-in of that name, so it cannot do what "
            f"the plug-in would; GET {url_for('.plug_ins')} lists those that it has"
        )


def _load(schema: Schema, receiving: BoundedSemaphore) -> dict[str, Any]:
    if (request.content_length or 0) > _MOST_BYTES:
        raise _too_large()
    body = _received(receiving)
    if len(body) > _MOST_BYTES:
        raise _too_large()
    if len(body) < (request.content_length or 0):
        raise BadRequest(_NOT_WHOLE)
    try:
        described = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(_NO_OBJECT) from error
    if not isinstance(described, dict):
        raise BadRequest(_NO_OBJECT)
    try:
        given: dict[str, Any] = schema.load(described)
    except ValidationError as error:
        words = "; ".join(f"{field}: {_words(why)}" for field, why in error.messages_dict.items())
        raise BadRequest(words) from error
    return given


def _received(receiving: BoundedSemaphore) -> bytes:
    if not receiving.acquire(timeout=_BODY_WAIT_SECONDS):
        raise TooBusy(
            "the bodies of other requests are being received, and are slow; send it again"
        )
    try:
        body: bytes = request.environ["wsgi.input"].read(_MOST_BYTES + 1)
        return body
    except OSError as error:
        raise BadRequest(_NOT_WHOLE) from error
    finally:
        receiving.release()


def _too_large() -> TooLarge:
    return TooLarge(f"the body is over the limit of {_MOST_BYTES} bytes for a VAE")


def _changeable(given: dict[str, Any]) -> dict[str, Any]:
    """What may be changed of a VAE. Nothing accepted would be no use: an empty list is no limit."""
    lists = {name: tuple(given[name] or ()) for name in _LISTS if name in given}
    accepted = {name: tuple(given[name] or ()) or None for name in _ACCEPTED if name in given}
    return lists | accepted | {name: given[name] for name in _SINGLE if name in given}


def _words(messages: Any) -> str:
    """marshmallow's messages, which nest by index for the items of a list."""
    if isinstance(messages, dict):
        return ", ".join(f"item {index}: {_words(why)}" for index, why in messages.items())
    return ", ".join(map(str, messages))
