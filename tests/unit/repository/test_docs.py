"""The paths and links of the documentation, compared with the repository."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_FILE = re.compile(r"`([\w./-]+\.(?:py|yaml|yml|conf))`")
_FOLDER = re.compile(r"`((?:api|benchmarks|cli|deploy|docs|shared|tests|worker)/[\w./-]*)`")


def _id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    text = _CODE_BLOCK.sub("", page.read_text("utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in _HEADING.findall(text)
    }


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Return `/` and the path of each file that is or may become part of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [f"/{name}" for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_each_file_that_a_page_names_exists(page: Path, tracked: list[str]) -> None:
    """A page may leave out leading folders, as in a table of tests."""
    named = set(_FILE.findall(page.read_text("utf-8")))

    assert not {name for name in named if not any(path.endswith(f"/{name}") for path in tracked)}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_each_folder_that_a_page_names_exists(page: Path) -> None:
    named = set(_FOLDER.findall(page.read_text("utf-8")))

    assert not {name for name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_each_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = set()
    for target, anchor in _LINK.findall(_CODE_BLOCK.sub("", page.read_text("utf-8"))):
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.add(f"{target}#{anchor}")

    assert not broken
