"""The settings of the worker."""

from dataclasses import dataclass

from shared.settings.loader import setting
from shared.settings.parsers import Address, address, whole_number
from shared.settings.services import CommonSettings

_OPENINGS = 4
_EMBEDDED_OPENINGS = 2
"""At a time, by default; more would wait for Python's lock, and have uploads wait for it."""


@dataclass(frozen=True)
class WorkerSettings(CommonSettings):
    worker_listen: Address = setting(
        "127.0.0.1:8081",
        address,
        "the worker's health and metrics; in `stowgate run` they are on the API's port",
    )
    worker_threads: int | None = setting(
        None,
        whole_number(1, 64),
        f"payloads that one worker opens at a time; by default {_OPENINGS}, and "
        f"{_EMBEDDED_OPENINGS} with the `memory` broker, as it shares a process with the API",
    )
    relay_seconds: int = setting(
        "5", whole_number(1, 3600), "pause between two passes of the relay"
    )
    sweep_seconds: int = setting("600", whole_number(1, 86400), "pause between two sweeps")

    @property
    def openings(self) -> int:
        """Payloads that a worker opens at a time."""
        return self.worker_threads or (_EMBEDDED_OPENINGS if self.broker == "memory" else _OPENINGS)

    @property
    def routines_end_seconds(self) -> float:
        """Of a stop, what the relay and its like have to end in after the payloads in hand."""
        return 0.2 * self.stop_seconds
