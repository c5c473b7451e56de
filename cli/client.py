"""What the operator's commands share: they are clients of a running API."""

import base64
import functools
import json
import os
import re
import ssl
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import urllib3

from cli.settings import ALL_SETTINGS, ClientSettings
from shared.settings.loader import BadSetting, load, unknown_variables
from shared.settings.parsers import http_url, without_password

UNUSABLE = 2

_SAY_WHO = "say who asks with --user or --token-file, STOWGATE_CLIENT_USER or STOWGATE_CLIENT_TOKEN"


class Unusable(click.ClickException):
    """The server could not be reached, or refused the request as a whole."""

    exit_code = UNUSABLE


@dataclass(frozen=True)
class Api:
    """A running API, and the headers that say who asks it."""

    url: str
    headers: dict[str, str] = field(repr=False)
    ca: Path | None = None
    """Certificates of which one has to vouch for the API's; None for those the system trusts."""
    kind: str = "Stowgate"
    """What should run at the URL, as it is called in messages."""
    unnamed_hint: str = _SAY_WHO
    """What to do where it asks who is there and `headers` do not say."""

    def pool(self, timeout: urllib3.Timeout) -> urllib3.PoolManager:
        ca_certs = str(self.ca) if self.ca else None
        return urllib3.PoolManager(retries=False, timeout=timeout, ca_certs=ca_certs)

    def call(self, method: str, path: str, body: Any = None, **fields: str) -> Any:
        """One JSON request. Raises `Unusable` for anything but success."""
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
                f"{url} answered {answer.status} and no JSON: is the URL that of the API?"
            ) from error

    def unreachable(self, url: str, error: urllib3.exceptions.HTTPError) -> Unusable:
        if isinstance(error, urllib3.exceptions.SSLError):
            if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in error.args):
                return Unusable(
                    f"{url} cannot be trusted ({error}): its certificate must have the host of the "
                    "URL, and one that STOWGATE_CLIENT_CA names, or that the system trusts, must "
                    "vouch for it"
                )
            return Unusable(
                f"{url} does not answer in TLS ({error}): should the URL begin with http://?"
            )
        return Unusable(
            f"{url} cannot be reached ({type(error).__name__}): is {self.kind} running there?"
        )

    def refusal(self, answer: urllib3.BaseHTTPResponse) -> str:
        """What a problem document says, or the bare status where there is none."""
        try:
            detail = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):
            detail = answer.reason or "no reason given"
        asks_who = answer.status == HTTPStatus.UNAUTHORIZED and not self.headers
        return f"{answer.status}: {detail}" + (f"; {self.unnamed_hint}" if asks_who else "")


def with_api(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command the options that say where the API is and who asks, as its `api`."""

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
        help="User name; the password is STOWGATE_CLIENT_PASSWORD, or is asked for on a terminal.",
    )
    @click.option(
        "--token-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with a token, instead of a user name; without it, the token itself may be in "
        "STOWGATE_CLIENT_TOKEN.",
    )
    @functools.wraps(command)
    def with_options(
        *args: Any, url: str | None, user: str | None, token_file: Path | None, **options: Any
    ) -> None:
        for sentence in unknown_variables(os.environ, ALL_SETTINGS):
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
    """The URL that was given as `name`. Raises `Unusable` for anything but http:// or https://."""
    try:
        return http_url(text)
    except ValueError as error:
        shown = without_password(text)
        raise Unusable(f"{name} is {shown!r}, but must be {error}") from None


def _credentials(
    settings: ClientSettings, user: str | None, token_file: Path | None
) -> dict[str, str]:
    """What was given as an option wins over a variable, and a token over a user."""
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
        raise Unusable("the password cannot be asked for here: set STOWGATE_CLIENT_PASSWORD")
    try:
        password: str = click.prompt("Password", hide_input=True, err=True)
    except click.Abort as error:
        raise Unusable("no password was given") from error
    return password


def check_client_ca(settings: ClientSettings) -> None:
    """Raises `BadSetting`."""
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
    """One step of a URL's path. Raises `Unusable` for what would make the URL another one."""
    if text in ("", ".", ".."):
        raise Unusable(f"'{text}' is no name, id or UID")
    return quote(text, safe="", errors="surrogateescape")


def show_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns, whole values: for eyes, and for what reads the output."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
