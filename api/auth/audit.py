"""The audit trail: one line for each upload, each act of administration, and each refusal to enter.

It says who, from where, what was done to which payload or Virtual Application Entity, and what came
of it. Only what a grammar of ours let through is named, so that no line can be forged or can hold
data of a patient.
"""

from http import HTTPStatus

import structlog
from flask import Flask, Response, g, request

from api.http.client_address import address_of
from api.routes import ACTS
from shared.ids import is_ae_title, is_guid

_log = structlog.get_logger("audit")


def about(**subject: str | int | None) -> None:
    """Add to the line of this request what its act is about: validated ids, and numbers."""
    g.audited = {**g.get("audited", {}), **subject}


def install(app: Flask) -> None:
    """Log a line behind the answer of each request that is an act, or that may not enter."""

    @app.after_request
    def write(response: Response) -> Response:
        act = None if request.method == "OPTIONS" else ACTS.get(request.endpoint or "")
        if act or "kept_out" in g:
            caller = g.get("caller")
            _log.info(
                act or "read",
                outcome="done" if response.status_code < HTTPStatus.BAD_REQUEST else "refused",
                status=response.status_code,
                caller=caller.name if caller else None,
                # A proxy may have passed anything on.
                address=str(address_of(request.remote_addr) or "unknown"),
                **_named_in_the_url() | g.get("audited", {}),
            )
        return response


def _named_in_the_url() -> dict[str, str]:
    named, found = request.view_args or {}, {}
    if is_guid(named.get("payload_id", "")):
        found["payload_id"] = named["payload_id"].lower()
    if is_ae_title(named.get("name", "")):
        found["vae"] = named["name"]
    if is_ae_title(named.get("aet", "")):
        found["ae_title"] = named["aet"]
    return found
