"""Who is asking, and may they? One place asks, before anything of a body is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from flask import Flask, g, request
from werkzeug.datastructures import Authorization

from api.auth.own_hosts import OwnHosts
from api.problems import Forbidden, Problem
from api.rates import sender_of
from shared.ids import AE_TITLE_RULE, WORKFLOW_ID_RULE, is_ae_title, is_workflow_id

REALM = "stowgate"


class Scope(StrEnum):
    """What a caller may be let do."""

    STORE = "store"
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True)
class Caller:
    """Who asks. `name` is None where nobody is asked.

    `vaes` are the Virtual Application Entities that it is bound to: `AET` for what that stands for,
    its own workflows, and `AET/workflow` for that one workflow. None lets it store anywhere.
    `source` is its name for the Workflow Manager, and None for the address that it sends from.
    """

    name: str | None
    scopes: frozenset[Scope]
    vaes: frozenset[str] | None = None
    source: str | None = None

    def may_store_to(self, aet: str | None, workflow: str | None) -> bool:
        """As far as the URL alone tells; for the rest see `may_open`."""
        if self.vaes is None or aet is None:
            return self.vaes is None
        return aet in self.vaes or (workflow is not None and f"{aet}/{workflow}" in self.vaes)

    def may_open(self, aet: str, workflow: str, workflows_of_vae: Collection[str]) -> bool:
        """Whether it may name that workflow in the URL."""
        return (
            self.vaes is None
            or f"{aet}/{workflow}" in self.vaes
            or (aet in self.vaes and workflow in workflows_of_vae)
        )


BINDING_RULE = (
    "a binding is an AE title, or one with / and a workflow id behind it; "
    f"{AE_TITLE_RULE}; {WORKFLOW_ID_RULE}"
)


def is_binding(text: str) -> bool:
    """Whether it is one that `Caller.vaes` may have."""
    aet, slash, workflow = text.partition("/")
    return is_ae_title(aet) and (not slash or is_workflow_id(workflow))


class Authenticator(Protocol):
    scheme: str
    """Of the Authorization header (RFC 9110 11.1), in lower case; empty where none is wanted."""

    def caller(self, given: Authorization | None, address: str) -> Caller:
        """Who sent these credentials from this address, as `sender_of` gives it.

        Raises `Unauthorized`, and where it cannot tell now `TooBusy` or `Unavailable`.
        """

    def lacks(self, scope: Scope) -> dict[str, str]:
        """The headers of the answer to a caller that lacks the scope."""

    def ping(self) -> None:
        """Raises `Transient` where what credentials are checked with cannot be had."""


class Anyone:
    """Asks nobody, and lets everybody in."""

    scheme = ""

    def caller(self, given: Authorization | None, address: str) -> Caller:  # noqa: ARG002
        return Caller(None, frozenset(Scope))

    def lacks(self, scope: Scope) -> dict[str, str]:  # noqa: ARG002
        return {}

    def ping(self) -> None:
        pass


def install(
    app: Flask,
    authenticator: Authenticator,
    scopes: Mapping[str, Scope | None],
    page_origins: Collection[str],
    own_hosts: OwnHosts | None = None,
) -> None:
    """Let nobody reach an endpoint without its scope; None is for everybody.

    An endpoint that is missing in `scopes` is refused to all. The caller is `g.caller` from then.
    Of the pages of other origins only those of `page_origins` may administer. With `own_hosts` a
    request that names another host reaches nothing.
    """

    @app.before_request
    def enter() -> None:
        # Where there is no endpoint the answer is 404 or 405, whoever asks.
        if request.endpoint is None:
            return
        try:
            _enter(request.endpoint)
        except Problem:
            g.kept_out = True
            raise

    def _enter(endpoint: str) -> None:
        if own_hosts is not None:
            own_hosts.check(request)
        if endpoint not in scopes:
            raise Forbidden("nobody may do this: it has not been decided who may")
        scope = scopes[endpoint]
        if scope is None:
            return
        # A browser sends a POST of plain text, or of nothing, without a preflight. An upload needs
        # no such care: the media types that it may have are asked for first (Fetch 2.2.2).
        if scope is Scope.ADMIN and _from_another_site(page_origins):
            raise Forbidden(
                "a page of another origin may not administer; STOWGATE_CORS_ORIGINS lists those "
                "that may"
            )
        g.caller = caller = _caller(authenticator)
        if scope not in caller.scopes:
            raise Forbidden(
                f"the caller lacks the scope {scope}, which this needs", authenticator.lacks(scope)
            )
        if scope is Scope.STORE:
            named = request.view_args or {}
            if not caller.may_store_to(named.get("aet"), named.get("workflow")):
                raise Forbidden(
                    "the caller may store to its own Virtual Application Entities only: POST to "
                    "/dicomweb/vae/{aet}/studies with one of them, or with a workflow that it is "
                    "bound to"
                )


def may(authenticator: Authenticator, scope: Scope) -> bool:
    """Whether whoever sent this request has the scope, at an endpoint that is for everybody."""
    try:
        return scope in _caller(authenticator).scopes
    except Problem:
        return False


def _from_another_site(listed: Collection[str]) -> bool:
    """By what the browser says of the page (Fetch Metadata 2.3), which no page can change; and of
    one that does not say, by the page's origin. Who is no browser has neither."""
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    if origin in listed:
        return False
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2] != request.host


def _caller(authenticator: Authenticator) -> Caller:
    return authenticator.caller(_credentials(), sender_of(request.remote_addr))


def _credentials() -> Authorization | None:
    """Basic credentials that cannot be decoded have neither a user name nor a password."""
    given = request.headers.get("Authorization", "")
    # werkzeug fails on others.
    found = Authorization.from_header(given) if given.isascii() else None
    if found is None and given.lower().startswith("basic "):
        return Authorization("basic", {})
    return found
