"""The command `stowgate`, run as operators do."""

import subprocess
from pathlib import Path

from service import STOWGATE, environment


def run_stowgate(
    *arguments: str | Path, data: Path | None = None, **settings: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, *map(str, arguments)],
        env=environment(data or Path("unused"), settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
