"""The house's rules, held against the code itself."""

import ast
import re
from pathlib import Path

import pytest

from shared.settings.loader import declared

ROOT = Path(__file__).resolve().parents[3]
MAY_IMPORT = {
    "shared": {"shared"},
    "api": {"api", "shared"},
    "worker": {"worker", "shared"},
    "cli": {"api", "cli", "shared", "worker"},
}


def _modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_it_may(room: str) -> None:
    for path in _modules(room):
        assert _imports(path) & set(MAY_IMPORT) <= MAY_IMPORT[room], path


def test_only_adapters_import_the_engines_libraries() -> None:
    for room in MAY_IMPORT:
        for path in _modules(room):
            if "adapters" not in path.parts:
                assert not _imports(path) & {"minio", "pika"}, path


def test_the_readme_lists_every_setting_with_its_default_and_what_it_is_for() -> None:
    rows = re.findall(
        r"^\| `(STOWGATE_\w+)` \| (?:`([^`]*)`|none) \| (.*) \|$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    assert rows == [
        (setting.variable, setting.default or "", setting.doc) for setting in declared()
    ]
