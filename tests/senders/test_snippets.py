"""docs/senders.md says nothing that no test runs."""

import ast
from pathlib import Path

from snippets import snippets


def _run_here() -> set[tuple[object, ...]]:
    """Section, language and number of every call of `snippet` in this folder."""
    run = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "snippet":
                named = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                run.add((*named, 1)[:3])
    return run


def test_every_snippet_of_the_page_is_run_by_a_test() -> None:
    assert set(snippets()) == _run_here()
