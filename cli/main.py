"""The command `stowgate`."""

import importlib
import sys

import click

from shared.errors import StoreUnfit
from shared.settings.loader import BadSetting

_MODULES = {
    "run": "cli.serve",
    "api": "cli.serve",
    "worker": "cli.serve",
    "send": "cli.send",
    "vae": "cli.vae",
    "payloads": "cli.payloads",
    "user": "cli.user",
    "check": "cli.check",
}


class _Commands(click.Group):
    """Imports a command when it is used: who lists payloads need not wait for a server's parts."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(importlib.import_module(_MODULES[cmd_name]), cmd_name)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="stowgate")
def stowgate() -> None:
    """Takes DICOM over HTTP (STOW-RS), keeps it, and opens MONAI Deploy workflow requests.

    Settings are STOWGATE_ environment variables; `stowgate check` tries them.

    \b
    Completion in bash: eval "$(_STOWGATE_COMPLETE=bash_source stowgate)"
    """


def main() -> None:
    try:
        stowgate()
    except (BadSetting, StoreUnfit) as error:
        click.echo(f"stowgate: {error}", err=True)
        sys.exit(1)
