"""`stowgate vae`: Virtual Application Entities of a running API."""

import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import click

from cli.client import Api, Unusable, checked_url, segment, with_api
from cli.terminal import as_json, local_time, show_fields, show_json, show_rows

_ACCEPTED = "An accepted {}; can be repeated. Default: any."

_ACCEPTS = {
    "SOP classes": "acceptedSopClasses",
    "transfer syntaxes": "acceptedTransferSyntaxes",
    "modalities": "acceptedModalities",
}
_LIMITS = {
    "bytes per instance": "maxInstanceBytes",
    "requests per minute": "maxRequestsPerMinute",
}
_CHANGES = (
    ("created", "dateTimeCreated", "createdBy"),
    ("changed", "dateTimeUpdated", "updatedBy"),
)


@click.group(short_help="Administer Virtual Application Entities.")
def vae() -> None:
    """Administer Virtual Application Entities: AE titles in a URL, with their workflows."""


@vae.command("list")
@as_json
@with_api
def list_all(as_json: bool, api: Api) -> None:
    """List all Virtual Application Entities."""
    found = api.call("GET", "/config/vae")
    if as_json:
        show_json(found)
        return
    show_rows(
        ("name", "AE title", "created", "workflows"),
        (
            (
                row["name"],
                row["virtualAeTitle"],
                _when(row["dateTimeCreated"]),
                _workflows(row),
            )
            for row in found
        ),
    )


@vae.command()
@click.argument("ae_title")
@click.option("--name", help="Its name; default: the AE title.")
@click.option(
    "--workflow", "workflows", metavar="ID", multiple=True, help="A workflow; can be repeated."
)
@click.option("--sop-class", "sop_classes", multiple=True, help=_ACCEPTED.format("SOP Class UID"))
@click.option(
    "--transfer-syntax",
    "transfer_syntaxes",
    multiple=True,
    help=_ACCEPTED.format("Transfer Syntax UID"),
)
@click.option(
    "--modality", "modalities", multiple=True, help=_ACCEPTED.format("modality, such as CT,")
)
@click.option("--max-instance-bytes", type=int, help="Maximum size of an instance.")
@click.option("--max-requests-per-minute", type=int, help="Maximum POSTs per minute.")
@click.option(
    "--source",
    help="The sender's source name for the Workflow Manager, which a workflow's data_origins may "
    "list; default: that of the caller, or the address that it sends from.",
)
@as_json
@with_api
def add(
    ae_title: str,
    name: str | None,
    workflows: tuple[str, ...],
    sop_classes: tuple[str, ...],
    transfer_syntaxes: tuple[str, ...],
    modalities: tuple[str, ...],
    max_instance_bytes: int | None,
    max_requests_per_minute: int | None,
    source: str | None,
    as_json: bool,
    api: Api,
) -> None:
    """Create a Virtual Application Entity with this AE_TITLE."""
    body: dict[str, Any] = {"virtualAeTitle": ae_title, "workflows": list(workflows)}
    given = {
        "name": name,
        "acceptedSopClasses": sop_classes or None,
        "acceptedTransferSyntaxes": transfer_syntaxes or None,
        "acceptedModalities": modalities or None,
        "maxInstanceBytes": max_instance_bytes,
        "maxRequestsPerMinute": max_requests_per_minute,
        "source": source,
    }
    body |= {field: value for field, value in given.items() if value is not None}
    _show(api.call("POST", "/config/vae", body), as_json)
    if len(workflows) > 1:
        click.echo(
            "Note: if the condition of one of these workflows is false, the Workflow Manager "
            "starts none of them; see docs/workflows.md",
            err=True,
        )


@vae.command(short_help="Copy the VAEs of another Stowgate or an Informatics Gateway.")
@click.argument("source_url")
@click.option(
    "--without-plug-ins",
    is_flag=True,
    help="Copy also VAEs with plug-ins that Stowgate cannot run, without those plug-ins.",
)
@with_api
def copy(source_url: str, without_plug_ins: bool, api: Api) -> None:
    """Copy all VAEs of SOURCE_URL, another Stowgate or an Informatics Gateway.

    A VAE with plug-ins that Stowgate cannot run is not copied: a plug-in may remove patient data.
    Exits with 1 if some VAEs could not be copied; the copied ones remain.
    """
    source = Api(
        checked_url(source_url, "SOURCE_URL"),
        {},
        api.ca,
        "another Stowgate or an Informatics Gateway",
        f"let this host read {source_url}/config/vae without authentication during the copy",
    )
    listed = source.call("GET", "/config/vae")
    if not isinstance(listed, list) or not all(isinstance(found, dict) for found in listed):
        raise Unusable(f"{source_url}/config/vae is not a list of VAEs")
    plug_ins_here = api.call("GET", "/config/vae/plug-ins")
    refused = 0
    for found in listed:
        given = found.get("plugInAssemblies") or []
        missing = [name for name in given if name not in plug_ins_here]
        if missing and not without_plug_ins:
            refused += 1
            click.echo(
                f"not copied: {found.get('name')}: Stowgate cannot run its plug-ins "
                f"{', '.join(map(repr, missing))}, which may remove patient data or change "
                "instances in another way. Move that work into its workflows, and copy it with "
                "--without-plug-ins",
                err=True,
            )
            continue
        try:
            kept = [name for name in given if name not in missing]
            created = api.call("POST", "/config/vae", {**found, "plugInAssemblies": kept})
        except Unusable as error:
            refused += 1
            click.echo(f"not copied: {found.get('name')}: {error.message}", err=True)
        else:
            left_out = f" without {', '.join(map(repr, missing))}" if missing else ""
            click.echo(f"copied {created['name']}{left_out}")
    sys.exit(1 if refused else 0)


@vae.command(short_help="Show a Virtual Application Entity.")
@click.argument("name")
@as_json
@with_api
def show(name: str, as_json: bool, api: Api) -> None:
    """Show the Virtual Application Entity NAME.

    NAME is its AE title, unless it has another name.
    """
    _show(api.call("GET", f"/config/vae/{segment(name)}"), as_json)


@vae.command(short_help="Remove a Virtual Application Entity.")
@click.argument("name")
@as_json
@with_api
def remove(name: str, as_json: bool, api: Api) -> None:
    """Remove the Virtual Application Entity NAME.

    NAME is its AE title, unless it has another name. Payloads already sent to it keep their
    workflows.
    """
    removed = api.call("DELETE", f"/config/vae/{segment(name)}")
    if as_json:
        show_json(removed)
    else:
        click.echo(f"removed {removed['name']}")


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(row)
    else:
        show_fields(_fields(row))


def _fields(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "name", row["name"]
    yield "AE title", row["virtualAeTitle"]
    yield "workflows", _workflows(row)
    for label, field in _ACCEPTS.items():
        yield label, ", ".join(row.get(field) or ["any"])
    for label, field in _LIMITS.items():
        yield label, f"{row[field]:,}" if field in row else "no limit"
    if "source" in row:
        yield "source", row["source"]
    for label, at, by in _CHANGES:
        if at in row:
            yield label, _when(row[at]) + (f" by {row[by]}" if by in row else "")


def _workflows(row: dict[str, Any]) -> str:
    return ", ".join(row["workflows"]) or "(the Workflow Manager selects them)"


def _when(text: str) -> str:
    return local_time(datetime.fromisoformat(text))
