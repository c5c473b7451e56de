"""What the operator's commands share as clients of a running API."""

import base64
import functools
import os
import re
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import urllib3

from cli.settings import ALL_SETTINGS, ClientSettings
from shared.settings.loader import BadSetting, doubtful_variables, load
from shared.settings.parsers import http_url, without_password

UNUSABLE = 2

_GIVE_CREDENTIALS = (
    "give credentials with --user or --token-file, STOWGATE_CLIENT_USER or STOWGATE_CLIENT_TOKEN"
)


class Unusable(click.ClickException):
    """The server could not be reached, or refused the request."""

    exit_code = UNUSABLE


@dataclass(frozen=True)
class Api:
    """A running API, and the headers with the caller's credentials."""

    url: str
    headers: dict[str, str] = field(repr=False)
    ca: Path | None = None
    """File with the trusted certificate authorities; None for those that the system trusts."""
    kind: str = "Stowgate"
    """The service at the URL, for messages."""
    credentials_hint: str = _GIVE_CREDENTIALS
    """What to do if the service requires credentials and `headers` has none."""

    def pool(self, timeout: urllib3.Timeout) -> urllib3.PoolManager:
        ca_certs = str(self.ca) if self.ca else None
        return urllib3.PoolManager(retries=False, timeout=timeout, ca_certs=ca_certs)

    def call(self, method: str, path: str, body: Any = None, **fields: str) -> Any:
        """Send a JSON request and return the answer. Raises `Unusable` unless it succeeds."""
        pool = self.pool(urllib3.Timeout(30.0))
        url = self.url + path
        try:
            if body is None:
                answer = pool.request(method, url, fields=fields or None, headers=self.headers)
            else:
                answer = pool.request(method, url, json=body, headers=self.headers)
        except urllib3.exceptions.HTTPError as error:
            raise self.unreachable(url, error) from error
        if answer.status >= 400:
            raise Unusable(self.refusal(answer))
        try:
            return answer.json()
        except ValueError as error:
            raise Unusable(
                f"{url} answered {answer.status} without JSON: is this the URL of the API?"
            ) from error

    def unreachable(self, url: str, error: urllib3.exceptions.HTTPError) -> Unusable:
        if isinstance(error, urllib3.exceptions.SSLError):
            if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in error.args):
                return Unusable(
                    f"the certificate of {url} is not trusted ({error}): it must name the host of "
                    "the URL, and an authority in STOWGATE_CLIENT_CA, or one that the system "
                    "trusts, must have issued it"
                )
            return Unusable(
                f"{url} does not answer in TLS ({error}): should the URL begin with http://?"
            )
        return Unusable(
            f"{url} cannot be reached ({type(error).__name__}): is {self.kind} running there?"
        )

    def refusal(self, answer: urllib3.BaseHTTPResponse) -> str:
        """Return the detail of the problem document, or the bare status if there is none."""
        try:
            detail = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):
            detail = answer.reason or "no reason given"
        has_none = answer.status == HTTPStatus.UNAUTHORIZED and not self.headers
        return f"{answer.status}: {detail}" + (f"; {self.credentials_hint}" if has_none else "")


def with_api(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command the options for the API's URL and credentials, as its argument `api`."""

    @click.option(
        "--url",
        metavar="URL",
        show_default="STOWGATE_PUBLIC_URL, else STOWGATE_LISTEN",
        help="Base URL of the API.",
    )
    @click.option(
        "--user",
        metavar="NAME",
        show_default="STOWGATE_CLIENT_USER",
        help="User name; the password comes from STOWGATE_CLIENT_PASSWORD, or from a prompt.",
    )
    @click.option(
        "--token-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with a token, instead of a user name; the token itself may also be in "
        "STOWGATE_CLIENT_TOKEN.",
    )
    @functools.wraps(command)
    def with_options(
        *args: Any, url: str | None, user: str | None, token_file: Path | None, **options: Any
    ) -> None:
        for sentence in doubtful_variables(os.environ, ALL_SETTINGS):
            click.echo(f"Warning: {sentence}", err=True)
        try:
            command(*args, api=_api(load(ClientSettings), url, user, token_file), **options)
        except BadSetting as error:
            raise Unusable(str(error)) from error
        except KeyboardInterrupt as error:
            raise Unusable("interrupted") from error

    return with_options


def _api(
    settings: ClientSettings, url: str | None, user: str | None, token_file: Path | None
) -> Api:
    if url is None:
        url = settings.public_url or f"{settings.scheme}://{settings.listen}"
    else:
        url = checked_url(url, "--url")
    headers = _credentials(settings, user, token_file)
    check_client_ca(settings)
    return Api(url.removesuffix("/dicomweb"), headers, settings.client_ca)


def checked_url(text: str, name: str) -> str:
    """Return the http(s) URL that was given as `name`. Raises `Unusable` if it is not valid."""
    try:
        return http_url(text)
    except ValueError as error:
        shown = without_password(text)
        raise Unusable(f"{name} is {shown!r}, but must be {error}") from None


def _credentials(
    settings: ClientSettings, user: str | None, token_file: Path | None
) -> dict[str, str]:
    """An option takes precedence over a variable, and a token over a user."""
    if user and token_file:
        raise click.UsageError("give --user or --token-file, not both")
    token = token_file.read_text(errors="replace").strip() if token_file else settings.client_token
    user = user or (None if token else settings.client_user)
    if user:
        password = settings.client_password or _asked_password()
        given = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {"Authorization": f"Basic {given}"}
    if token:
        if not re.fullmatch(r"[!-~]+", token):
            raise Unusable("the token must be one line of visible ASCII characters")
        return {"Authorization": f"Bearer {token}"}
    return {}


def _asked_password() -> str:
    if not sys.stdin.isatty():
        raise Unusable("cannot prompt for the password here: set STOWGATE_CLIENT_PASSWORD")
    try:
        password: str = click.prompt("Password", hide_input=True, err=True)
    except click.Abort as error:
        raise Unusable("no password was given") from error
    return password


def check_client_ca(settings: ClientSettings) -> None:
    """Raise `BadSetting` if the file cannot be used."""
    if settings.client_ca is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(settings.client_ca)
    except OSError as error:
        raise BadSetting(
            f"STOWGATE_CLIENT_CA is '{settings.client_ca}', but must be a PEM file with "
            "certificates"
        ) from error


def segment(text: str) -> str:
    """Quote a path segment. Raises `Unusable` for a segment that would change the path."""
    if text in ("", ".", ".."):
        raise Unusable(f"'{text}' is not a valid name, id or UID")
    return quote(text, safe="", errors="surrogateescape")
