"""What a program prints, for tests of what is built and run by other programs."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class CommandFailed(Exception):
    """A command did not end with 0; the text holds the end of what it said."""


def output_of(
    *command: str | Path, seconds: float = 60, environment: Mapping[str, str] | None = None
) -> str:
    """Run a program in the checkout, and return what it printed. Raises `CommandFailed`, and
    `TimeoutExpired`."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    if done.returncode != 0:
        raise CommandFailed(f"{' '.join(map(str, command))} ended with:\n{done.stdout[-5000:]}")
    return done.stdout
