"""`stowgate payloads`: what came in and where it stands."""

import click

from cli.client import Api, segment, show_json, show_rows, with_api
from shared.records import MOST_LISTED, State


@click.group(short_help="List and show payloads: what came in, where it stands.")
def payloads() -> None:
    """Payloads: what came in and where it stands."""


@payloads.command("list")
@click.option(
    "--state", type=click.Choice([str(state) for state in State]), help="Those in this state only."
)
@click.option(
    "--limit",
    type=click.IntRange(1, MOST_LISTED),
    default=20,
    show_default=True,
    help="How many at most.",
)
@click.option(
    "--cursor", metavar="ID", help="Continue after this payload id, which an earlier list printed."
)
@with_api
def list_newest(state: str | None, limit: int, cursor: str | None, api: Api) -> None:
    """List payloads, the newest first."""
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
        click.echo(f"there are older ones: see them with --cursor {page['next']}", err=True)


@payloads.command(short_help="Show a payload and its workflow request.")
@click.argument("payload_id")
@with_api
def show(payload_id: str, api: Api) -> None:
    """Show a payload, with the workflow request that was opened for it."""
    show_json(api.call("GET", f"/payloads/{segment(payload_id)}"))
