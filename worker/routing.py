"""Chooses the workflows of a payload: ordered rules, of which the first that matches wins."""

from collections.abc import Callable
from dataclasses import dataclass

from shared.records import IngestRecord


@dataclass(frozen=True)
class Route:
    """`rule` names the rule that matched. Without workflows, the Workflow Manager chooses."""

    rule: str
    workflows: tuple[str, ...]


def _workflow_in_url(record: IngestRecord) -> tuple[str, ...] | None:
    return None if record.workflow is None else (record.workflow,)


def _workflows_of_vae(record: IngestRecord) -> tuple[str, ...] | None:
    """A VAE without workflows leaves the choice to the Workflow Manager, by the VAE's name."""
    return record.vae_workflows or None


def _left_to_workflow_manager(_: IngestRecord) -> tuple[str, ...] | None:
    return ()


_RULES: tuple[tuple[str, Callable[[IngestRecord], tuple[str, ...] | None]], ...] = (
    ("workflow-in-url", _workflow_in_url),
    ("workflows-of-vae", _workflows_of_vae),
    ("left-to-workflow-manager", _left_to_workflow_manager),
)


def resolve(record: IngestRecord) -> Route:
    for name, rule in _RULES:
        workflows = rule(record)
        if workflows is not None:
            return Route(name, workflows)
    raise AssertionError("the last rule always matches")
