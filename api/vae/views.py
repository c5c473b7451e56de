"""Administration of Virtual Application Entities: `config/vae` of the Informatics Gateway."""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from threading import BoundedSemaphore
from typing import Any

import orjson
from flask import g, jsonify, request, url_for
from flask.typing import ResponseReturnValue
from marshmallow import Schema, ValidationError

from api.admission.body import RequestBody
from api.admission.watchdog import Watchdog
from api.auth import audit
from api.http.problems import BadRequest, Conflict, NotFound, TooBusy
from api.vae.registry import Vae, VaeMissing, VaeRegistry, VaeSchema, VaeTaken
from shared.time import utc_now

_SCHEMA = VaeSchema()
# PUT cannot change the AE title. `update` requires the name, with its own error text.
CHANGE_SCHEMA = VaeSchema(exclude=["virtual_ae_title"])

_LISTS = ("workflows", "plug_in_assemblies")
_ACCEPTED = ("accepted_sop_classes", "accepted_transfer_syntaxes", "accepted_modalities")
_SINGLE = ("max_instance_bytes", "max_requests_per_minute", "source")

_MAX_BYTES = 1 << 20

_BODY_SECONDS = 5.0

# A stalled body blocks a thread for some seconds, so not all threads may receive one.
_MAX_BODIES = 2
_MAX_BODY_WAIT_SECONDS = 0.25
_NOT_AN_OBJECT = "the body must be a JSON object that describes a VAE"

# The path of the list of plug-ins hides a VAE of this name.
_PLUG_INS = "plug-ins"


def vae_views(
    vaes: VaeRegistry, public_url: str | None, watchdog: Watchdog
) -> dict[str, Callable[..., ResponseReturnValue]]:
    """Return the views of `config/vae` by endpoint.

    Args:
        vaes: The registry.
        public_url: The base of the Location header; None makes it relative.
        watchdog: Ends the bodies of slow clients.
    """
    receiving = BoundedSemaphore(_MAX_BODIES)

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
        given = _load(_SCHEMA, receiving, watchdog)
        name = given.get("name") or given["virtual_ae_title"]
        if name == _PLUG_INS:
            raise BadRequest(f"name: {_PLUG_INS} is reserved for the list of plug-ins")
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

    def update() -> ResponseReturnValue:
        given = _load(CHANGE_SCHEMA, receiving, watchdog)
        if "name" not in given:
            raise BadRequest("name: required in the body, to identify the VAE")
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
            raise NotFound(str(error)) from error
        return jsonify(_SCHEMA.dump(vae))

    def remove(name: str) -> ResponseReturnValue:
        try:
            return jsonify(_SCHEMA.dump(vaes.remove(name)))
        except VaeMissing as error:
            raise NotFound("no VAE has that name") from error

    return {
        "vae.list_all": list_all,
        "vae.plug_ins": plug_ins,
        "vae.show": show,
        "vae.add": add,
        "vae.update": update,
        "vae.remove": remove,
    }


def _check_plug_ins(given: dict[str, Any]) -> None:
    """A plug-in that is not run may be the one that was to remove patient data."""
    if given.get("plug_in_assemblies"):
        raise BadRequest(
            "plugInAssemblies: Stowgate has no input plug-in of that name, so it cannot do what "
            f"the plug-in would; GET {url_for('.plug_ins')} lists those that it has"
        )


def _load(schema: Schema, receiving: BoundedSemaphore, watchdog: Watchdog) -> dict[str, Any]:
    try:
        described = orjson.loads(_received(receiving, watchdog))
    except orjson.JSONDecodeError as error:
        raise BadRequest(_NOT_AN_OBJECT) from error
    if not isinstance(described, dict):
        raise BadRequest(_NOT_AN_OBJECT)
    try:
        given: dict[str, Any] = schema.load(described)
    except ValidationError as error:
        words = "; ".join(f"{field}: {_words(why)}" for field, why in error.messages_dict.items())
        raise BadRequest(words) from error
    return given


def _received(receiving: BoundedSemaphore, watchdog: Watchdog) -> bytes:
    body = RequestBody.of(
        request,
        limit_bytes=_MAX_BYTES,
        idle_seconds=_BODY_SECONDS,
        max_seconds=_BODY_SECONDS,
        watchdog=watchdog,
    )
    if not receiving.acquire(timeout=_MAX_BODY_WAIT_SECONDS):
        raise TooBusy("too many concurrent request bodies; send it again later")
    try:
        return b"".join(iter(partial(body.read, _MAX_BYTES), b""))
    finally:
        receiving.release()


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
