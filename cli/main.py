"""The command `stowgate`."""

import sys

import click

from cli.check import check
from cli.failed import failed
from cli.payloads import payloads
from cli.send import send
from cli.serve import api, run, worker
from cli.user import user
from cli.vae import vae
from shared.config import BadSetting


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="stowgate")
def stowgate() -> None:
    """Takes DICOM over HTTP (STOW-RS), keeps it, and opens MONAI Deploy workflow requests.

    Settings are STOWGATE_ environment variables; `stowgate check` tries them.

    \b
    Completion in bash: eval "$(_STOWGATE_COMPLETE=bash_source stowgate)"
    """


for command in (run, api, worker, send, vae, payloads, failed, user, check):
    stowgate.add_command(command)


def main() -> None:
    try:
        stowgate()
    except BadSetting as error:
        click.echo(f"stowgate: {error}", err=True)
        sys.exit(1)
