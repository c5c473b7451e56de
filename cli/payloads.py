"""`stowgate payloads`: list, show and replay payloads."""

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import click
from rich.text import Text

from cli.client import Api, Unusable, segment, with_api
from cli.terminal import (
    Cell,
    as_json,
    duration,
    local_time,
    show_fields,
    show_json,
    show_rows,
)
from shared.record_store import MAX_LISTED
from shared.refusals import PayloadState
from shared.time import utc_now

_REPLAYABLE = (PayloadState.FAILED, PayloadState.REFUSED)

_COLOURS: dict[str, str] = {
    PayloadState.PENDING: "yellow",
    PayloadState.OPENED: "green",
    PayloadState.FAILED: "red",
    PayloadState.REFUSED: "red",
}

# The rules of worker/routing.py.
_ROUTES = {
    "workflow-in-url": "from the URL",
    "workflows-of-vae": "from the VAE",
    "left-to-workflow-manager": "selected by the Workflow Manager",
}

# Of the tasks of a workflow that are named, as they failed.
_MAX_TASKS = 3


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
@as_json
@with_api
def list_newest(state: str | None, limit: int, cursor: str | None, as_json: bool, api: Api) -> None:
    """List payloads, newest first."""
    given = {"limit": str(limit), "state": state, "cursor": cursor}
    page = api.call("GET", "/payloads", **{name: value for name, value in given.items() if value})
    if as_json:
        show_json(page)
        return
    show_rows(
        ("payload", "state", "age", "instances", "last error"),
        (
            (
                row["payload_id"],
                _coloured(row["state"], row["state"]),
                f"{_age(row['received_at']):>6}",
                f"{row['file_count']:>9}",
                row["last_error"] or "",
            )
            for row in page["payloads"]
        ),
    )
    if page["next"] is not None:
        click.echo(f"more: --cursor {page['next']}", err=True)


@payloads.command(short_help="Show what happened to a payload.")
@click.argument("payload_id")
@as_json
@with_api
def show(payload_id: str, as_json: bool, api: Api) -> None:
    """Show what happened to a payload: from whom, which workflows, errors, what to do.

    With --json also its workflow request, which names each instance.
    """
    found = api.call("GET", f"/payloads/{segment(payload_id)}")
    if as_json:
        show_json(found)
    else:
        show_fields(_story(found))


def _story(row: dict[str, Any]) -> Iterator[tuple[str, Cell]]:
    yield "payload", row["payload_id"]
    yield "state", _coloured(row["state"], f"{row['state']}: {_meaning(row)}")
    yield "received", _when(row["received_at"])
    yield "source", row["source"]
    if row.get("caller"):
        yield "caller", row["caller"]
    yield "destination", row["destination"]
    yield "instances", f"{row['file_count']}"
    yield "workflows", _workflows(row)
    yield "attempts", f"{row['attempts']}"
    if row["opened_at"]:
        yield "opened", _when(row["opened_at"])
    if row["refused_at"]:
        times = f", {row['refusals']} times so far" if row["refusals"] > 1 else ""
        yield "refused", _when(row["refused_at"]) + times
    if row["last_error"]:
        yield "last error", row["last_error"]
    yield from _progress(row)
    yield "correlation id", row["correlation_id"]
    if row["trace_id"]:
        yield "trace id", row["trace_id"]
    if row["state"] in _REPLAYABLE:
        yield "to replay", f"stowgate payloads replay {row['payload_id']}"


def _meaning(row: dict[str, Any]) -> str:
    match row["state"]:
        case PayloadState.OPENED:
            return "the workflow request was published"
        case PayloadState.FAILED:
            return "no workflow request could be published"
        case PayloadState.REFUSED:
            return "the Workflow Manager refused the workflow request"
    if row["opened_at"] and row["refusals"]:
        return "the workflow request will be published again"
    if not row["attempts"]:
        return "waiting for a worker"
    if row["last_error"] is None:
        return "a worker is processing it"
    return "a worker will try again"


def _workflows(row: dict[str, Any]) -> str:
    if row["workflows"] is None:
        return "not selected yet"
    route = _ROUTES.get(row["route"], row["route"])
    return f"{', '.join(row['workflows'])} ({route})" if row["workflows"] else route


def _progress(row: dict[str, Any]) -> Iterator[tuple[str, Cell]]:
    """Yield what the Workflow Manager reports, if its API is configured."""
    label = "Workflow Manager"
    error, instances = row.get("workflow_instances_error"), row.get("workflow_instances")
    if error is not None:
        yield label, f"unknown: {error}"
    elif instances == []:
        yield label, "has started no workflow"
    for number, instance in enumerate(instances or []):
        yield "" if number else label, _workflow_instance(instance)


def _workflow_instance(instance: dict[str, Any]) -> str:
    name = instance["workflow_name"] or instance["workflow_id"] or "a workflow"
    tasks = instance["tasks"]
    counts = Counter(task["status"] or "unknown" for task in tasks)
    shown = f"{name}: {instance['status'] or 'unknown'}"
    if counts:
        shown += f"; tasks: {', '.join(f'{n} {status}' for status, n in counts.items())}"
    failed = [task for task in tasks if task["status"] == "Failed"]
    for task in failed[:_MAX_TASKS]:
        shown += f"; {task['task_id']} failed: {task['reason']}"
    return shown


def _coloured(state: str, text: str) -> Text:
    return Text(text, _COLOURS.get(state, ""))


def _when(text: str) -> str:
    return f"{local_time(datetime.fromisoformat(text))}, {_age(text)} ago"


def _age(text: str) -> str:
    return duration((utc_now() - datetime.fromisoformat(text)).total_seconds())


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
