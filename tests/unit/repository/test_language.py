"""The words of code and docs: patterns that readers stumbled over."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

BANNED = {
    r"(?<!there )\bis no (?!longer|more|less|other|reason|need|loss|case|way)": "is not a valid …",
    r"\bthat is none\b|\bis none that\b": "is not a valid …",
    r"\bin whole\b|\bcame whole\b|\barrive whole\b|\bis whole\b": "complete",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bwho(ever)? asks\b|\bwho may\b": "the caller; permission",
    r"\bis taken\b|\bare taken\b": "is accepted",
    r"\ball the same\b": "say when, or leave it out",
    r"\bmeanwhile\b": "say when, or leave it out",
    r"\bby then\b": "say when, or leave it out",
    r"\bas many as\b|\bso long that\b": "a number, or a name",
    r"\bfor good\b": "permanently",
    r"\berror of this service\b": "internal server error",
    r"\bstands? still\b|\bstood still\b": "pause",
    r"\bfences?\b": "tombstone",
    r"\bhourglass\b": "watchdog",
    r"\bhands? back\b|\bhanded back\b": "return to the queue",
}


def _texts() -> dict[str, str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    kept = (name for name in listed if name.endswith((".md", ".py", ".yaml", ".yml", "Makefile")))
    return {
        name: (ROOT / name).read_text("utf-8")
        for name in kept
        if (ROOT / name).is_file() and name != Path(__file__).relative_to(ROOT).as_posix()
    }


@pytest.mark.parametrize("pattern", BANNED)
def test_no_text_has_a_pattern_that_readers_stumble_over(pattern: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in _texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line, re.IGNORECASE)
    ]

    assert not found, f"write: {BANNED[pattern]}"
