"""Authentication and authorization of every request, before its body is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from flask import Flask, g, request
from werkzeug.datastructures import Authorization

from api.auth.own_hosts import OwnHosts
from api.http.client_address import sender_of
from api.http.problems import Forbidden, Problem
from api.http.routes import Scope
from shared.ids import AE_TITLE_RULE, WORKFLOW_ID_RULE, is_ae_title, is_workflow_id

REALM = "stowgate"


@dataclass(frozen=True)
class Caller:
    """An authenticated caller. `name` is None without authentication.

    `vaes` are its bindings to Virtual Application Entities: `AET` allows the workflows of that VAE,
    `AET/workflow` that workflow only. None allows every destination.
    `source` is its name for the Workflow Manager; None means its address.
    """

    name: str | None
    scopes: frozenset[Scope]
    vaes: frozenset[str] | None = None
    source: str | None = None

    def may_store_to(self, aet: str | None, workflow: str | None) -> bool:
        """Check what the URL alone shows; `may_open` checks the workflow."""
        if self.vaes is None or aet is None:
            return self.vaes is None
        return aet in self.vaes or (workflow is not None and f"{aet}/{workflow}" in self.vaes)

    def may_open(self, aet: str, workflow: str, workflows_of_vae: Collection[str]) -> bool:
        """Check whether the caller may name that workflow in the URL."""
        return (
            self.vaes is None
            or f"{aet}/{workflow}" in self.vaes
            or (aet in self.vaes and workflow in workflows_of_vae)
        )


BINDING_RULE = (
    "a binding is an AE title, or an AE title, a slash and a workflow id; "
    f"{AE_TITLE_RULE}; {WORKFLOW_ID_RULE}"
)


def is_binding(text: str) -> bool:
    """Check whether `text` is a valid binding."""
    aet, slash, workflow = text.partition("/")
    return is_ae_title(aet) and (not slash or is_workflow_id(workflow))


class Authenticator(Protocol):
    """Authenticates callers; one implementation for each value of `STOWGATE_AUTH`."""

    scheme: str
    """The scheme of the Authorization header (RFC 9110 11.1) in lower case; empty for none."""

    def caller(self, given: Authorization | None, address: str) -> Caller:
        """Authenticate the caller.

        Args:
            given: The credentials of the request.
            address: The address of the request, as `sender_of` returns it.

        Raises:
            Unauthorized: The credentials are missing or invalid.
            TooBusy: Too many checks are waiting.
            Unavailable: The issuer of the tokens does not respond.
        """

    def lacks(self, scope: Scope) -> dict[str, str]:
        """Return the response headers for a caller that lacks the scope."""

    def ping(self) -> None:
        """Check the services that authentication depends on. Raises `Transient`."""


class NoAuthentication:
    """Grants every scope to every caller."""

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
    own_origin: str | None = None,
) -> None:
    """Require authentication and the scope of each endpoint, and set `g.caller`.

    Args:
        app: The application.
        authenticator: Authenticates the callers.
        scopes: The scope by endpoint; None makes an endpoint public. An endpoint that is missing
            here is forbidden for all callers.
        page_origins: Other origins whose pages may use administrative endpoints.
        own_hosts: Rejects requests that name another host.
        own_origin: The origin of the public URL.
    """

    @app.before_request
    def authorize() -> None:
        # Without an endpoint the response is 404 or 405.
        if request.endpoint is None:
            return
        try:
            _authorize(request.endpoint)
        except Problem:
            g.access_denied = True
            raise

    def _authorize(endpoint: str) -> None:
        if own_hosts is not None:
            own_hosts.check(request)
        if endpoint not in scopes:
            raise Forbidden(
                "no scope is defined for this endpoint; contact the operator of this service"
            )
        scope = scopes[endpoint]
        if scope is None:
            return
        # A browser sends an empty POST, or one of plain text, without a preflight. The media types
        # of an upload always need a preflight (Fetch 2.2.2).
        if scope is Scope.ADMIN and request.blueprint == "page":
            _check_own_page(own_origin)
        elif scope is Scope.ADMIN and _from_another_site(page_origins):
            raise Forbidden(
                "the page's origin is not in STOWGATE_CORS_ORIGINS, which administration from a "
                "browser requires"
            )
        g.caller = caller = _caller(authenticator)
        if scope not in caller.scopes:
            raise Forbidden(
                f"the caller lacks the required scope {scope}", authenticator.lacks(scope)
            )
        if scope is Scope.STORE:
            named = request.view_args or {}
            if not caller.may_store_to(named.get("aet"), named.get("workflow")):
                raise Forbidden(
                    "the caller has bindings, and may store only to these: POST to "
                    "/dicomweb/vae/{aet}/studies or /dicomweb/vae/{aet}/{workflow}/studies"
                )


def may(authenticator: Authenticator, scope: Scope) -> bool:
    """Check whether the caller of a public endpoint has the scope."""
    try:
        return scope in _caller(authenticator).scopes
    except Problem:
        return False


def _from_another_site(listed: Collection[str]) -> bool:
    """Check for a browser's request from a page of another origin that is not listed.

    A page cannot set Sec-Fetch-Site (Fetch Metadata 2.3). Browsers without it still send Origin;
    other clients send neither.
    """
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    if origin in listed:
        return False
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and not _is_of_requested_host(origin)


def _check_own_page(own_origin: str | None) -> None:
    """Refuse a change through the operator's page unless the browser says that its form sent it.

    With Basic authentication a browser adds its saved password to the forms of all origins. Every
    browser sends Origin with a POST (Fetch 3.1), so a request without it is refused too; other
    clients use the API.
    """
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    if request.method in ("GET", "HEAD"):
        return
    is_own = origin is not None and (origin == own_origin or _is_of_requested_host(origin))
    if not is_own or site not in (None, "same-origin"):
        raise Forbidden(
            "the form was not sent by this page. Behind a proxy, the Host that it forwards must be "
            "the one in the browser's address bar, or STOWGATE_PUBLIC_URL must be that address"
        )


def _is_of_requested_host(origin: str) -> bool:
    """Compare with `Host`, which werkzeug reports as empty if it has an underscore; `null`, the
    origin of a sandboxed page, has an empty host too."""
    host = request.host or request.headers.get("Host", "").lower()
    return bool(host) and origin.partition("://")[2] == host


def _caller(authenticator: Authenticator) -> Caller:
    return authenticator.caller(_credentials(), sender_of(request.remote_addr))


def _credentials() -> Authorization | None:
    """Basic credentials that cannot be decoded have neither a user name nor a password."""
    given = request.headers.get("Authorization", "")
    # werkzeug raises an error for other characters.
    found = Authorization.from_header(given) if given.isascii() else None
    if found is None and given.lower().startswith("basic "):
        return Authorization("basic", {})
    return found
