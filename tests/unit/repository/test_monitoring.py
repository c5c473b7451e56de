"""Alerts and dashboard, compared with the metrics and with the runbook."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from engines import MISSING, NotToBeHad, install_debian_package, program

ROOT = Path(__file__).resolve().parents[3]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "stowgate.rules.yml"
RULE_TESTS = PROMETHEUS / "stowgate.rules.test.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "stowgate.json"
RUNBOOK = "docs/operations.md"

# Of the samples of a histogram.
_OF_A_SAMPLE = re.compile(r"_(bucket|sum|count)$")


def _metrics() -> set[str]:
    """The metrics in `docs/metrics.md`, which `tests/http/test_metrics.py` holds to the code."""
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    return set(re.findall(r"^\| `(stowgate_\w+)` \|", page, re.MULTILINE))


def _unknown(expressions: list[str]) -> set[str]:
    named = {name for text in expressions for name in re.findall(r"\bstowgate_\w+", text)}
    metrics = _metrics()
    return {name for name in named if not {name, _OF_A_SAMPLE.sub("", name)} & metrics}


def _alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def _anchors() -> set[str]:
    text = re.sub(r"^```.*?^```$", "", (ROOT / RUNBOOK).read_text("utf-8"), flags=re.M | re.S)
    return {
        re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)
    }


def _panels() -> list[dict[str, Any]]:
    found = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    return [panel for panel in found if panel["type"] != "row"]


@pytest.fixture(scope="module")
def promtool() -> str:
    try:
        try:
            return program("promtool")
        except NotToBeHad:
            install_debian_package("prometheus")
            return program("promtool")
    except NotToBeHad as why:
        if os.environ.get("CI"):
            pytest.fail(f"{MISSING}promtool: {why}", pytrace=False)
        pytest.skip(f"{MISSING}promtool: {why}")


@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", RULES.name),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", RULE_TESTS.name),
    ],
    ids=" ".join,
)
def test_promtool_accepts(promtool: str, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [promtool, *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_names_an_existing_section_of_the_runbook() -> None:
    anchors = _anchors()

    for name, rule in _alerts().items():
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (page, anchor in anchors) == (RUNBOOK, True), name
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert rule["annotations"]["summary"], name


def test_each_alert_names_existing_metrics() -> None:
    assert _unknown([rule["expr"] for rule in _alerts().values()]) == set()


def test_each_alert_fires_in_a_test_of_promtool() -> None:
    fired = set(re.findall(r'alertname="(\w+)"', RULE_TESTS.read_text("utf-8")))

    assert fired == set(_alerts())


def test_each_panel_names_existing_metrics() -> None:
    expressions = [target["expr"] for panel in _panels() for target in panel["targets"]]

    assert _unknown(expressions) == set()


def test_each_panel_answers_a_question_of_the_runbook() -> None:
    runbook = " ".join((ROOT / RUNBOOK).read_text("utf-8").split())
    titles = [panel["title"] for panel in _panels()]

    assert [title for title in titles if f"*{title}*" not in runbook] == []
    asked = re.findall(r"\*([^*]+\?)\*", runbook)
    assert set(asked) == set(titles)


def test_the_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
