"""The views of the operator's page."""

import re
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from http import HTTPStatus
from threading import BoundedSemaphore
from typing import Any

import structlog
from flask import Response, g, redirect, request
from flask.typing import ResponseReturnValue
from markupsafe import Markup

from api.admission.small_bodies import SmallBodies
from api.http.paths import bare_prefix
from api.http.problems import BadRequest, Conflict, NotFound, TooBusy
from api.page import plots
from api.page.activity import Activity, Report
from api.page.forms import FIELDS_OF_CHANGE, FIELDS_OF_NEW, FormInvalid, loaded, parsed, values_of
from api.page.rendering import Pages, link
from api.page.senders import senders
from api.page.verdict import verdict
from api.payloads.states import Payload, Payloads
from api.payloads.views import find, payload_state
from api.payloads.workflow_manager_api import WorkflowManagerApi, WorkflowManagerSilent
from api.settings import ApiSettings
from api.vae.registry import Vae, VaeRegistry
from api.vae.views import add_vae, change_vae, remove_vae
from shared.errors import StowgateError
from shared.ids import is_ae_title, is_guid
from shared.refusals import PayloadState
from shared.runtime.health import Readiness
from shared.time import Clock, utc_now

_log = structlog.get_logger()

PAGE_PAYLOADS = 25
"""Payloads on a page of the list."""

REPLAYED_AT_ONCE = 100
"""Payloads that one form replays; the next page continues."""

# A view of a slow store blocks a thread, which uploads and health checks need.
_MAX_VIEWS = 4
_MAX_WAIT_SECONDS = 0.25

_REPLAYABLE = (PayloadState.FAILED, PayloadState.REFUSED)

View = Callable[..., ResponseReturnValue]


def page_views(
    pages: Pages,
    *,
    activity: Activity,
    payloads: Payloads,
    vaes: VaeRegistry,
    readiness: Readiness,
    workflow_manager: WorkflowManagerApi | None,
    bodies: SmallBodies,
    settings: ApiSettings,
    clock: Clock = utc_now,
) -> dict[str, View]:
    """Return the views by endpoint."""
    spare_threads = settings.api_threads - settings.concurrent_uploads
    reading = BoundedSemaphore(max(1, min(_MAX_VIEWS, spare_threads // 2)))
    sender_help = senders(_address(settings))

    def limited(view: View) -> View:
        @wraps(view)
        def limited_view(**arguments: str) -> ResponseReturnValue:
            if not reading.acquire(timeout=_MAX_WAIT_SECONDS):
                raise TooBusy("too many people look at this page, or the store is slow; try again")
            try:
                return view(**arguments)
            finally:
                reading.release()

        return limited_view

    def overview() -> ResponseReturnValue:
        prefix = bare_prefix(request.environ.get("RAW_URI", ""), settings.public_url)
        if prefix is not None:
            # A relative link would lead out of the prefix.
            return redirect(f"{prefix}/ui")
        span = request.args.get("span", "")
        span = span if span in plots.SPANS else "24h"
        now = clock()
        health = readiness.check()
        faults = health.faults if health else {}
        report, error = None, faults.get("object_store")
        if error is None:
            report, error = reported(plots.start_of(span, now))
        return pages.render(
            "overview.html",
            verdict=verdict(readiness.status(health), faults, report, now),
            faults=faults,
            report=report,
            error=error,
            plots=plots.plots_of(report, span, now) if report else None,
            span=span,
            spans=plots.SPAN_NAMES,
            now=now,
        )

    def reported(since: datetime) -> tuple[Report | None, str | None]:
        try:
            return activity.read(since), None
        except StowgateError as error:
            _log.error("could not read what the overview shows", error=str(error))
            return None, str(error)

    def list_payloads() -> ResponseReturnValue:
        wanted = request.args.get("id", "").strip().lower()
        if wanted and is_guid(wanted):
            return redirect(link("page.payload", payload_id=wanted))
        given = request.args.get("state", "")
        state = payload_state(given) if given else None
        cursor = request.args.get("cursor", "").lower()
        if cursor and not is_guid(cursor):
            raise BadRequest("cursor must be that of a link on an earlier page")
        found, following = payloads.newest(state, PAGE_PAYLOADS, cursor)
        return pages.render(
            "payloads.html",
            payloads=list(found),
            following=following,
            state=state,
            states=tuple(PayloadState),
            cursor=cursor,
            is_bad_id=bool(wanted),
            replayed=_count("replayed"),
            not_replayed=_count("not_replayed"),
            more=_guid("more"),
            replayable=_REPLAYABLE,
        )

    def payload(payload_id: str) -> ResponseReturnValue:
        found = find(payloads, payload_id)
        progress, silent = progress_of(found)
        return pages.render(
            "payload.html",
            payload=found,
            record=found.record,
            size_bytes=found.record.total_bytes,
            progress=progress,
            silent=silent,
            asks_workflow_manager=workflow_manager is not None,
            is_replayable=found.state in _REPLAYABLE,
            is_replayed=request.args.get("replayed") == "1",
        )

    def progress_of(found: Payload) -> tuple[list[dict[str, Any]] | None, str | None]:
        if workflow_manager is None or found.record.opened_at is None:
            return None, None
        try:
            return workflow_manager.workflow_instances(found.record.payload_id), None
        except WorkflowManagerSilent as error:
            return None, str(error)

    def replay(payload_id: str) -> ResponseReturnValue:
        payloads.replay(find(payloads, payload_id))
        return _see_other(link("page.payload", payload_id=payload_id.lower(), replayed=1))

    def replay_all(state: str) -> ResponseReturnValue:
        wanted = payload_state(state)
        if wanted not in _REPLAYABLE:
            raise BadRequest("only failed or refused payloads can be replayed")
        cursor = request.args.get("cursor", "").lower()
        if cursor and not is_guid(cursor):
            raise BadRequest("cursor must be that of a form on an earlier page")
        done = payloads.replay_page(wanted, REPLAYED_AT_ONCE, cursor)
        counts = {"replayed": done.replayed, "not_replayed": len(done.reasons)}
        more = {"more": done.following} if done.following else {}
        return _see_other(link("page.payloads", state=state, **counts, **more))

    def list_vaes() -> ResponseReturnValue:
        return pages.render(
            "vaes.html",
            vaes=sorted(vaes.all().values(), key=lambda vae: vae.name.lower()),
            removed=_name("removed"),
        )

    def vae(name: str) -> ResponseReturnValue:
        found = existing_vae(name)
        done = request.args.get("done", "")
        done = done if done in ("added", "changed") else ""
        return form_of_change(found, values_of(found), {}, HTTPStatus.OK, done=done)

    def existing_vae(name: str) -> Vae:
        found = vaes.all().get(name)
        if found is None:
            raise NotFound("no VAE has that name")
        return found

    def form_of_change(
        found: Vae, values: Any, errors: Any, status: HTTPStatus, *, done: str = ""
    ) -> Response:
        return pages.render(
            "vae.html",
            status,
            vae=found,
            address=_address(settings),
            fields=FIELDS_OF_CHANGE,
            values=values,
            errors=errors,
            done=done,
        )

    def new_vae() -> ResponseReturnValue:
        return form_of_new(values_of(None), {}, HTTPStatus.OK)

    def form_of_new(
        values: Any, errors: Any, status: HTTPStatus = HTTPStatus.BAD_REQUEST
    ) -> Response:
        return pages.render(
            "vae.html",
            status,
            vae=None,
            fields=FIELDS_OF_NEW,
            values=values,
            errors=errors,
            done="",
        )

    def add() -> ResponseReturnValue:
        values = parsed(bodies.receive())
        try:
            added = add_vae(vaes, loaded(values, is_new=True))
        except FormInvalid as error:
            return form_of_new(error.values, error.errors)
        except (BadRequest, Conflict) as error:
            return form_of_new(values, {"": error.detail}, error.status)
        return _see_other(link("page.vae", name=added.name, done="added"))

    def change(name: str) -> ResponseReturnValue:
        if not is_ae_title(name):
            # Below, the name becomes part of the audit trail.
            raise NotFound("no VAE has that name")
        values = parsed(bodies.receive())
        try:
            change_vae(vaes, name, loaded(values, is_new=False))
        except FormInvalid as error:
            found = existing_vae(name)
            return form_of_change(found, error.values, error.errors, HTTPStatus.BAD_REQUEST)
        return _see_other(link("page.vae", name=name, done="changed"))

    def remove(name: str) -> ResponseReturnValue:
        removed = remove_vae(vaes, name)
        return _see_other(link("page.vaes", removed=removed.name))

    def send() -> ResponseReturnValue:
        return pages.render(
            "send.html",
            vaes=sorted(vaes.all().values(), key=lambda vae: vae.virtual_ae_title.lower()),
            bindings=None if g.caller.vaes is None else sorted(g.caller.vaes),
        )

    def show_help() -> ResponseReturnValue:
        return pages.render("help.html", address=_address(settings), senders=sender_help)

    return {
        "page.overview": limited(overview),
        "page.payloads": limited(list_payloads),
        "page.payload": limited(payload),
        "page.replay": limited(replay),
        "page.replay_all": limited(replay_all),
        "page.vaes": limited(list_vaes),
        "page.vae": limited(vae),
        "page.new_vae": new_vae,
        "page.add_vae": limited(add),
        "page.change_vae": limited(change),
        "page.remove_vae": limited(remove),
        "page.send": limited(send),
        "page.help": show_help,
        "page.static": pages.static,
    }


def _see_other(url: str) -> Response:
    """Answer a form, so that a reload does not send it again (RFC 9110 15.4.4)."""
    return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": url})


def _address(settings: ApiSettings) -> Markup:
    """Return the URL of Stowgate; the script replaces one that only this machine may know."""
    if settings.public_url is not None:
        return Markup("{}").format(settings.public_url.rstrip("/"))
    return Markup("<span data-base>{}://{}</span>").format(settings.scheme, settings.listen)


def _count(name: str) -> int | None:
    given = request.args.get(name, "")
    return int(given) if re.fullmatch("[0-9]{1,4}", given) else None


def _guid(name: str) -> str | None:
    given = request.args.get(name, "")
    return given if is_guid(given) else None


def _name(name: str) -> str | None:
    given = request.args.get(name, "")
    return given if is_ae_title(given) else None
