"""`stowgate user`: a line for the file of users."""

import sys

import click

from api.auth.basic import check_user, user_line
from api.auth.watched_file import Malformed
from api.http.routes import Scope

_LEAST_CHARACTERS = 8


@click.command(short_help="Print the line of a user for STOWGATE_USERS.")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice([str(scope) for scope in Scope]),
    help="What the user may do; may be repeated.",
)
@click.option(
    "--vae",
    "vaes",
    metavar="AET[/WORKFLOW]",
    multiple=True,
    help="An AE title to store to, for its own workflows, or with another one that the user may "
    "name in the URL; may be repeated.",
)
@click.option(
    "--source",
    help="The user's name for the Workflow Manager, which a workflow's data_origins may list; "
    "without it, the address that the user sends from.",
)
def user(name: str, scopes: tuple[str, ...], vaes: tuple[str, ...], source: str | None) -> None:
    """Print the line of the user NAME for the file STOWGATE_USERS, with the password hashed.

    The password is asked for, or read from the standard input where that is not a terminal. Without
    --vae the user may store to any, and name any workflow.
    """
    try:
        check_user(name, vaes, source)
    except Malformed as error:
        raise click.ClickException(str(error)) from error
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if len(password) < _LEAST_CHARACTERS:
        raise click.ClickException(f"the password must have {_LEAST_CHARACTERS} characters or more")
    if not password.isascii():
        click.echo(
            "Warning: the password has characters other than ASCII. Some clients send them in "
            "another character set than UTF-8, and are then refused with 401.",
            err=True,
        )
    click.echo(user_line(name, map(Scope, dict.fromkeys(scopes)), password, vaes, source))
