"""The snippets of docs/senders.md, as a test runs them: like one who pastes them.

A snippet finds Stowgate at the page's `ADDRESS`, which becomes the one of the test, and in its
working folder `image.dcm` and three files in `series/`; the fixture `desk` is such a folder.
"""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "senders.md"
ADDRESS = "http://127.0.0.1:8080"

_SECTION = re.compile(r"^## (?P<title>.+)\n(?P<text>(?:(?!## ).*\n?)*)", re.MULTILINE)
_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets() -> dict[tuple[str, str, int], str]:
    """All of the page by section, language, and number among those of that language there."""
    found: dict[tuple[str, str, int], str] = {}
    for section in _SECTION.finditer(PAGE.read_text(encoding="utf-8")):
        for block in _BLOCK.finditer(section["text"]):
            number = 1
            while (section["title"], block["language"], number) in found:
                number += 1
            found[section["title"], block["language"], number] = block["code"]
    return found


def snippet(section: str, language: str, number: int = 1, *, url: str) -> str:
    """The code of one, with `url` in place of the page's address.

    Call it with the first three as literals: a test looks in the source for who runs which.
    """
    return snippets()[section, language, number].replace(ADDRESS, url)
