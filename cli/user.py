"""`stowgate user`: prints a line for the users file."""

import sys

import click

from api.auth.basic import check_user, user_line
from api.auth.watched_file import Malformed
from api.http.routes import Scope

_MIN_CHARACTERS = 8


@click.command(short_help="Print the line of a user for STOWGATE_USERS.")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice([str(scope) for scope in Scope]),
    help="A permission of the user; can be repeated.",
)
@click.option(
    "--vae",
    "vaes",
    metavar="AET[/WORKFLOW]",
    multiple=True,
    help="An AE title that the user may store to, with its own workflows, or with the given "
    "workflow in the URL; can be repeated.",
)
@click.option(
    "--source",
    help="The user's source name for the Workflow Manager, which a workflow's data_origins may "
    "list; default: the address that the user sends from.",
)
def user(name: str, scopes: tuple[str, ...], vaes: tuple[str, ...], source: str | None) -> None:
    """Print the line of the user NAME for the file STOWGATE_USERS, with the password hashed.

    The password comes from a prompt, or from standard input if that is not a terminal. Without
    --vae the user may store to any VAE, and name any workflow.
    """
    try:
        check_user(name, vaes, source)
    except Malformed as error:
        raise click.ClickException(str(error)) from error
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if len(password) < _MIN_CHARACTERS:
        raise click.ClickException(f"the password must have at least {_MIN_CHARACTERS} characters")
    if not password.isascii():
        click.echo(
            "Warning: the password contains characters other than ASCII. Clients that send them in "
            "another character set than UTF-8 are refused with 401.",
            err=True,
        )
    click.echo(user_line(name, map(Scope, dict.fromkeys(scopes)), password, vaes, source))
