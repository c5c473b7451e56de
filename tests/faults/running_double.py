"""The double of the Workflow Manager as it consumes a site's queue, and is told what to refuse."""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pika
from stowgate_site import Site
from workflow_manager_double import Intake, Verdict, Workflow, consume

REQUEUE_SECONDS = 0.05


class RunningDouble:
    """Accepts every request unless `workflows` are given, or `verdict` has one of its own.

    `lines` are what it printed, and `bodies` what it got.
    """

    def __init__(
        self,
        site: Site,
        workflows: Sequence[Workflow] | None = None,
        verdict: Callable[[], Verdict | None] = lambda: None,
    ) -> None:
        self.workflows = workflows
        self.verdict = verdict
        self.lines: list[str] = []
        self.bodies: list[bytes] = []
        self._site = site
        self._intake = Intake(workflows=lambda: self.workflows)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="workflow manager", daemon=True)

    def take(self, properties: Mapping[str, Any], body: bytes) -> tuple[Verdict, str]:
        self.bodies.append(body)
        verdict = self.verdict()
        if verdict is not None:
            return verdict, f"{verdict.value} as the test says"
        return self._intake.take(properties, body)

    def with_line(self, beginning: str) -> list[str]:
        return [line for line in self.lines if line.startswith(beginning)]

    def __enter__(self) -> "RunningDouble":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join(30)

    def _run(self) -> None:
        with pika.BlockingConnection(pika.URLParameters(self._site.broker_url)) as connection:
            consume(
                connection,
                self._site.name,
                self.take,
                self.lines.append,
                REQUEUE_SECONDS,
                self._stopping.is_set,
            )
