"""docs/senders.md says nothing that no test runs."""

import ast
import re
from pathlib import Path

from ages import GO, JAVA, NODE, NPM, PYPI
from snippets import PAGE, snippets


def _run_here() -> set[tuple[object, ...]]:
    """Section, language and number of every call of `snippet` in this folder."""
    run: set[tuple[object, ...]] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "snippet":
                named = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                run.add((*named, 1)[:3])
    return run


def test_every_snippet_of_the_page_is_run_by_a_test() -> None:
    assert set(snippets()) == _run_here()


def test_the_ages_of_the_page_are_those_that_are_tried() -> None:
    section = (
        PAGE.read_text(encoding="utf-8").partition("### Tested releases")[2].partition("###")[0]
    )
    rows = re.findall(r"^\| (.+) \| (\d.+) \|$", section, re.MULTILINE)

    assert {client: tuple(ages.split(", ")) for client, ages in rows} == {
        **{client: tuple(ages) for client, ages in PYPI.items()},
        "dicomweb-client (npm)": NPM,
        "Node": NODE,
        "Go": GO,
        "`HttpURLConnection` and `HttpClient` of Java": tuple(JAVA),
    }
