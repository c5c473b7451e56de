"""The first line of the overview: does everything get through, and if not, what is to be done."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from api.page.activity import LONG_WAIT, Count, Report
from api.page.words import counted, duration

DEPENDENCIES = {
    "object_store": ("Object store", "Uploads are refused until it answers."),
    "free_space": ("Free space", "Uploads are refused until there is room."),
    "broker": ("Broker", "Uploads succeed. Their workflow requests wait for it."),
    "workflow_manager_queue": (
        "Workflow Manager queue",
        "Uploads succeed. Their workflow requests wait for it.",
    ),
    "workflow_manager_refusals": (
        "Workflow Manager refusals",
        "Refused requests are not seen until it is back.",
    ),
}
"""By name the dependency in words, and what its failure means."""


class Level(StrEnum):
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True)
class Verdict:
    level: Level
    headline: str
    explanation: str


def verdict(
    status: str, faults: Mapping[str, str | None], report: Report | None, now: datetime
) -> Verdict:
    """Return the most serious finding.

    Args:
        status: That of `Readiness`.
        faults: The fault of each dependency, or None.
        report: None if the object store could not be read.
    """
    down = [name for name, fault in faults.items() if fault is not None]
    if "object_store" in down:
        return Verdict(Level.BAD, "Uploads are refused", "The object store does not answer.")
    if "free_space" in down:
        return Verdict(Level.BAD, "Uploads are refused", "The object store has too little room.")
    if report is None:
        return Verdict(
            Level.BAD,
            "The object store could not be read",
            "Uploads are probably refused. The figures are missing until it can be read.",
        )
    stuck = report.failed.number + report.refused.number
    if stuck:
        count = Count(stuck, report.failed.is_more or report.refused.is_more)
        return Verdict(
            Level.BAD,
            f"{_at_least(count)} need{'s' if stuck == 1 else ''} attention",
            "Correct the causes below, then replay.",
        )
    if down:
        words = " and ".join(DEPENDENCIES[n][0] if n in DEPENDENCIES else n for n in down)
        return Verdict(
            Level.WARNING, f"Not available: {words}", DEPENDENCIES.get(down[0], ("", ""))[1]
        )
    oldest = report.oldest_waiting
    # Only the newest are listed: behind so many, older ones wait too.
    if oldest is not None and (report.waiting.is_more or now - oldest > LONG_WAIT):
        listed = "oldest of the newest 1,000" if report.waiting.is_more else "oldest"
        waited = duration((now - oldest).total_seconds())
        return Verdict(
            Level.WARNING,
            f"{_at_least(report.waiting)} wait{'s' if report.waiting.number == 1 else ''}",
            f"The {listed} has waited for {waited}. Is a worker running?",
        )
    if status == "stopping":
        return Verdict(Level.WARNING, "This replica is stopping", "Another one takes over.")
    if status == "unknown":
        return Verdict(
            Level.WARNING, "The services are being checked", "Look again in a few seconds."
        )
    return Verdict(
        Level.GOOD,
        "Everything is getting through",
        "Uploads are accepted, and their workflow requests are opened.",
    )


def _at_least(count: Count) -> str:
    words = counted(count.number, "payload")
    return f"At least {words}" if count.is_more else words
