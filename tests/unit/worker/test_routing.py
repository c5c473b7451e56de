"""The ordered rules that choose a payload's workflows."""

from dataclasses import replace

import pytest
from records_made import record

from worker.routing import Route, resolve


@pytest.mark.parametrize(
    ("workflow", "vae_workflows", "route"),
    [
        ("w-1", ("w-2",), Route("workflow-in-url", ("w-1",))),
        ("w-1", None, Route("workflow-in-url", ("w-1",))),
        (None, ("w-2", "w-3"), Route("workflows-of-vae", ("w-2", "w-3"))),
        (None, (), Route("left-to-workflow-manager", ())),
        (None, None, Route("left-to-workflow-manager", ())),
    ],
)
def test_the_first_rule_that_matches_wins(
    workflow: str | None, vae_workflows: tuple[str, ...] | None, route: Route
) -> None:
    assert resolve(replace(record(), workflow=workflow, vae_workflows=vae_workflows)) == route
