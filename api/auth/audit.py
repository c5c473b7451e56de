"""The audit trail: one log line for each upload, administrative act and refused request.

A line has the caller, its address, the act, its payload or Virtual Application Entity, and the
outcome; that of an upload also how long each step took. It contains validated ids only, so that
nobody can forge a line and no line has patient data.
"""

import time
from http import HTTPStatus
from typing import Any

import structlog
from flask import Flask, Response, g, request

from api.http.client_address import address_of
from api.http.problems import Refusal
from api.http.routes import ACTS
from shared.ids import is_ae_title, is_guid

_log = structlog.get_logger("audit")


def about(**subject: str | int | None) -> None:
    """Add validated ids, or numbers, to the audit line of this request."""
    g.audited = {**g.get("audited", {}), **subject}


def install(app: Flask) -> None:
    """Log each request that is an act, or that was refused, after its response."""

    @app.after_request
    def write(response: Response) -> Response:
        act = None if request.method == "OPTIONS" else ACTS.get(request.endpoint or "")
        refusal = g.get("refusal")
        if act or refusal or "access_denied" in g:
            caller = g.get("caller")
            _log.info(
                act or "read",
                outcome="done" if response.status_code < HTTPStatus.BAD_REQUEST else "refused",
                status=response.status_code,
                caller=caller.name if caller else None,
                # A proxy may forward any text as the address.
                address=str(address_of(request.remote_addr) or "unknown"),
                **_ids_in_url() | g.get("audited", {}) | _why(refusal) | _times(),
            )
        return response


def _why(refusal: Refusal | None) -> dict[str, str | None]:
    return refusal._asdict() if refusal else {}


def _times() -> dict[str, Any]:
    if "began_at" not in g:
        return {}
    return {"seconds": round(time.monotonic() - g.began_at, 4), "step_seconds": g.steps.seconds}


def _ids_in_url() -> dict[str, str]:
    named, found = request.view_args or {}, {}
    if is_guid(named.get("payload_id", "")):
        found["payload_id"] = named["payload_id"].lower()
    if is_ae_title(named.get("name", "")):
        found["vae"] = named["name"]
    if is_ae_title(named.get("aet", "")):
        found["ae_title"] = named["aet"]
    return found
