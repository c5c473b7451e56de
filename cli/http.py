"""What the operator's commands share: they are clients of a running API."""

import json
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

import click
import urllib3

from shared.config import load_settings

UNUSABLE = 2


def default_url() -> str:
    settings = load_settings()
    return settings.public_url or f"http://{settings.listen}"


url_option = click.option(
    "--url",
    default=default_url,
    show_default="STOWGATE_PUBLIC_URL, else STOWGATE_LISTEN",
    help="Base URL of the API.",
)


class Unusable(click.ClickException):
    """The server could not be reached, or refused the request as a whole."""

    exit_code = UNUSABLE


def call(method: str, url: str, body: Any = None, **fields: str) -> Any:
    """One JSON request. Raises `Unusable` for anything but success."""
    pool = urllib3.PoolManager(retries=False, timeout=30.0)
    try:
        if body is None:
            answer = pool.request(method, url, fields=fields or None)
        else:
            answer = pool.request(method, url, json=body)
    except urllib3.exceptions.HTTPError as error:
        raise unreachable(url, error) from error
    if answer.status >= 400:
        raise Unusable(refusal(answer))
    return answer.json()


def unreachable(url: str, error: Exception) -> Unusable:
    return Unusable(f"{url} cannot be reached ({type(error).__name__}): is Stowgate running there?")


def refusal(answer: urllib3.BaseHTTPResponse) -> str:
    """What a problem document says, or the bare status where there is none."""
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = answer.reason or "no reason given"
    return f"{answer.status}: {detail}"


def segment(text: str) -> str:
    return quote(text, safe="")


def show_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns, whole values: for eyes, and for what reads the output."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
