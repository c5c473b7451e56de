"""`stowgate failed`: what could not be opened, why, and once more."""

from collections.abc import Iterator
from typing import Any

import click

from cli.client import Api, Unusable, segment, show_json, show_rows, with_api
from shared.records import MOST_LISTED

_PAGE = str(MOST_LISTED)


@click.group(short_help="List, show and replay payloads that failed.")
def failed() -> None:
    """Payloads whose workflow request could not be opened, and that need a person."""


@failed.command("list")
@with_api
def list_all(api: Api) -> None:
    """List payloads that failed, the oldest first."""
    show_rows(
        ("payload", "received", "from", "to", "files", "attempts", "reason"),
        (
            (
                row["payload_id"],
                row["received_at"],
                row["source"],
                row["destination"],
                str(row["file_count"]),
                str(row["attempts"]),
                row["last_error"] or "",
            )
            for row in _oldest_first(api)
        ),
    )


@failed.command()
@click.argument("payload_id")
@with_api
def show(payload_id: str, api: Api) -> None:
    """Show a payload that failed, and why."""
    payload = api.call("GET", f"/payloads/{segment(payload_id)}")
    if payload["state"] != "failed":
        raise Unusable(f"payload {payload_id} is {payload['state']}, not failed")
    show_json(payload)


@failed.command()
@click.argument("payload_ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Replay all that failed, the oldest first.")
@with_api
def replay(payload_ids: tuple[str, ...], everything: bool, api: Api) -> None:
    """Try again what failed, under the same payload ids.

    Exits with 2 when one cannot be replayed.
    """
    if everything == bool(payload_ids):
        raise click.UsageError("give the payloads to replay, or --all")
    chosen = [row["payload_id"] for row in _oldest_first(api)] if everything else payload_ids
    if not chosen:
        click.echo("no payload has failed: there is nothing to replay", err=True)
    paths = {payload_id: f"/payloads/{segment(payload_id)}/replay" for payload_id in chosen}
    refused = []
    for payload_id, path in paths.items():
        try:
            api.call("POST", path)
        except Unusable as error:
            refused.append(payload_id)
            click.echo(f"{payload_id}  {error}", err=True)
        else:
            click.echo(f"{payload_id}  pending")
    if refused:
        raise Unusable(f"not replayed: {len(refused)} of {len(paths)}")


def _oldest_first(api: Api) -> list[dict[str, Any]]:
    return list(_newest_first(api))[::-1]


def _newest_first(api: Api) -> Iterator[dict[str, Any]]:
    fields = {"state": "failed", "limit": _PAGE}
    while True:
        page = api.call("GET", "/payloads", **fields)
        yield from page["payloads"]
        if page["next"] is None:
            return
        fields["cursor"] = page["next"]
