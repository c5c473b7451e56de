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
from api.http.problems import BadRequest, Conflict, NoSuchThing, TooBusy
from api.vae.registry import Vae, VaeMissing, VaeRegistry, VaeSchema, VaeTaken
from shared.time import utc_now

_SCHEMA = VaeSchema()
# What PUT takes: the AE title stays what it is. The name is required, in words of its own.
CHANGE_SCHEMA = VaeSchema(exclude=["virtual_ae_title"])

_LISTS = ("workflows", "plug_in_assemblies")
_ACCEPTED = ("accepted_sop_classes", "accepted_transfer_syntaxes", "accepted_modalities")
_COUNTS = ("max_instance_bytes", "max_requests_per_minute")

_MAX_BYTES = 1 << 20

_BODY_SECONDS = 5.0

# A body that stalls holds a thread for some seconds, and there are others to serve.
_BODIES_AT_ONCE = 2
_BODY_WAIT_SECONDS = 0.25
_NO_OBJECT = "the body must be a JSON object that describes a VAE"

# A VAE of this name could not be shown.
_PLUG_INS = "plug-ins"


def vae_views(
    vaes: VaeRegistry, public_url: str | None, watchdog: Watchdog
) -> dict[str, Callable[..., ResponseReturnValue]]:
    """By their endpoints."""
    receiving = BoundedSemaphore(_BODIES_AT_ONCE)

    def list_all() -> ResponseReturnValue:
        return jsonify(_SCHEMA.dump(vaes.all().values(), many=True))

    def plug_ins() -> ResponseReturnValue:
        """Input plug-ins by name; Stowgate changes nothing in what it is sent and has none."""
        return jsonify({})

    def show(name: str) -> ResponseReturnValue:
        vae = vaes.all().get(name)
        if vae is None:
            raise NoSuchThing(f"there is no VAE of that name; GET {url_for('.list_all')} lists all")
        return jsonify(_SCHEMA.dump(vae))

    def add() -> ResponseReturnValue:
        given = _load(_SCHEMA, receiving, watchdog)
        name = given.get("name") or given["virtual_ae_title"]
        if name == _PLUG_INS:
            raise BadRequest(f"name: {_PLUG_INS} is the name of the list of plug-ins")
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
            raise BadRequest("name: the VAE to change must be named in the body")
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

    def remove(name: str) -> ResponseReturnValue:
        try:
            return jsonify(_SCHEMA.dump(vaes.remove(name)))
        except VaeMissing as error:
            raise NoSuchThing("there is no VAE of that name") from error

    return {
        "vae.list_all": list_all,
        "vae.plug_ins": plug_ins,
        "vae.show": show,
        "vae.add": add,
        "vae.update": update,
        "vae.remove": remove,
    }


def _load(schema: Schema, receiving: BoundedSemaphore, watchdog: Watchdog) -> dict[str, Any]:
    try:
        described = orjson.loads(_received(receiving, watchdog))
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


def _received(receiving: BoundedSemaphore, watchdog: Watchdog) -> bytes:
    body = RequestBody.of(
        request,
        limit_bytes=_MAX_BYTES,
        idle_seconds=_BODY_SECONDS,
        max_seconds=_BODY_SECONDS,
        watchdog=watchdog,
    )
    if not receiving.acquire(timeout=_BODY_WAIT_SECONDS):
        raise TooBusy(
            "the bodies of other requests are being received, and are slow; send it again"
        )
    try:
        return b"".join(iter(partial(body.read, _MAX_BYTES), b""))
    finally:
        receiving.release()


def _changeable(given: dict[str, Any]) -> dict[str, Any]:
    """What may be changed of a VAE. Nothing accepted would be no use: an empty list is no limit."""
    lists = {name: tuple(given[name] or ()) for name in _LISTS if name in given}
    accepted = {name: tuple(given[name] or ()) or None for name in _ACCEPTED if name in given}
    return lists | accepted | {name: given[name] for name in _COUNTS if name in given}


def _words(messages: Any) -> str:
    """marshmallow's messages, which nest by index for the items of a list."""
    if isinstance(messages, dict):
        return ", ".join(f"item {index}: {_words(why)}" for index, why in messages.items())
    return ", ".join(map(str, messages))
