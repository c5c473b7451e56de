"""`stowgate payloads`: list, show and replay payloads."""

from collections.abc import Iterator
from typing import Any

import click

from cli.client import Api, Unusable, segment, show_json, show_rows, with_api
from shared.record_store import MAX_LISTED
from shared.refusals import PayloadState

_REPLAYABLE = (PayloadState.FAILED, PayloadState.REFUSED)


@click.group(short_help="List, show and replay payloads.")
def payloads() -> None:
    """List, show and replay payloads."""


@payloads.command("list")
@click.option(
    "--state",
    type=click.Choice([str(state) for state in PayloadState]),
    help="List only payloads in this state.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, MAX_LISTED),
    default=20,
    show_default=True,
    help="Maximum number of payloads.",
)
@click.option(
    "--cursor", metavar="ID", help="Continue after this payload id, which an earlier list printed."
)
@with_api
def list_newest(state: str | None, limit: int, cursor: str | None, api: Api) -> None:
    """List payloads, newest first."""
    given = {"limit": str(limit), "state": state, "cursor": cursor}
    page = api.call("GET", "/payloads", **{name: value for name, value in given.items() if value})
    show_rows(
        ("payload", "state", "received", "from", "to", "files", "attempts", "last error"),
        (
            (
                row["payload_id"],
                row["state"],
                row["received_at"],
                row["source"],
                row["destination"],
                str(row["file_count"]),
                str(row["attempts"]),
                row["last_error"] or "",
            )
            for row in page["payloads"]
        ),
    )
    if page["next"] is not None:
        click.echo(f"more: --cursor {page['next']}", err=True)


@payloads.command(short_help="Show a payload and its workflow request.")
@click.argument("payload_id")
@with_api
def show(payload_id: str, api: Api) -> None:
    """Show a payload, with the workflow request that was opened for it."""
    show_json(api.call("GET", f"/payloads/{segment(payload_id)}"))


@payloads.command(short_help="Open failed or refused workflow requests again.")
@click.argument("payload_ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Replay all, oldest first.")
@click.option(
    "--state",
    type=click.Choice([str(state) for state in _REPLAYABLE]),
    help="With --all: replay only payloads in this state.",
)
@with_api
def replay(payload_ids: tuple[str, ...], everything: bool, state: str | None, api: Api) -> None:
    """Open the workflow requests of these payloads again, with the same payload ids.

    Only failed payloads (no request could be opened) and refused ones (the Workflow Manager refused
    the request) can be replayed. Exits with 2 if one could not be replayed.
    """
    if everything == bool(payload_ids):
        raise click.UsageError("give the payloads to replay, or --all")
    if state is not None and not everything:
        raise click.UsageError("--state needs --all")
    chosen = payload_ids
    if everything:
        states = [str(one) for one in _REPLAYABLE] if state is None else [state]
        found = [row["payload_id"] for one in states for row in _newest_first(api, one)]
        # Payload ids are UUIDv7, which sort by time.
        chosen = tuple(sorted(found))
        if not chosen:
            click.echo(f"no payload is {' or '.join(states)}: nothing to replay", err=True)
    paths = {payload_id: f"/payloads/{segment(payload_id)}/replay" for payload_id in chosen}
    not_replayed = 0
    for payload_id, path in paths.items():
        try:
            api.call("POST", path)
        except Unusable as error:
            not_replayed += 1
            click.echo(f"{payload_id}  {error}", err=True)
        else:
            click.echo(f"{payload_id}  pending")
    if not_replayed:
        raise Unusable(f"not replayed: {not_replayed} of {len(paths)}")


def _newest_first(api: Api, state: str) -> Iterator[dict[str, Any]]:
    fields = {"state": state, "limit": str(MAX_LISTED)}
    while True:
        page = api.call("GET", "/payloads", **fields)
        yield from page["payloads"]
        if page["next"] is None:
            return
        fields["cursor"] = page["next"]
