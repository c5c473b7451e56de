"""`stowgate vae`: Virtual Application Entities of a running API."""

from typing import Any

import click

from cli.http import call, segment, show_json, show_rows, url_option


@click.group()
def vae() -> None:
    """Virtual Application Entities: AE titles in the URL, and the workflows they stand for."""


@vae.command("list")
@url_option
def list_all(url: str) -> None:
    """List all."""
    show_rows(
        ("name", "AE title", "workflows", "created"),
        (
            (
                row["name"],
                row["virtualAeTitle"],
                ", ".join(row["workflows"]) or "(the Workflow Manager chooses)",
                row["dateTimeCreated"],
            )
            for row in call("GET", f"{url}/config/vae")
        ),
    )


@vae.command()
@click.argument("ae_title")
@click.option("--name", help="Its name; the AE title if not given.")
@click.option("--workflow", "workflows", multiple=True, help="A workflow id; may be repeated.")
@url_option
def add(ae_title: str, name: str | None, workflows: tuple[str, ...], url: str) -> None:
    """Create one with that AE_TITLE."""
    body: dict[str, Any] = {"virtualAeTitle": ae_title, "workflows": list(workflows)}
    if name is not None:
        body["name"] = name
    show_json(call("POST", f"{url}/config/vae", body))


@vae.command()
@click.argument("name")
@url_option
def show(name: str, url: str) -> None:
    """Show one."""
    show_json(call("GET", f"{url}/config/vae/{segment(name)}"))


@vae.command()
@click.argument("name")
@url_option
def remove(name: str, url: str) -> None:
    """Remove one; payloads that were sent to it already keep their workflows."""
    show_json(call("DELETE", f"{url}/config/vae/{segment(name)}"))
