"""The settings of the worker."""

from dataclasses import dataclass

from shared.settings.loader import setting
from shared.settings.parsers import Address, address, whole_number
from shared.settings.services import CommonSettings

_OPENINGS = 4
_EMBEDDED_OPENINGS = 2
"""Default; more would compete with uploads for Python's global interpreter lock."""


@dataclass(frozen=True)
class WorkerSettings(CommonSettings):
    worker_listen: Address = setting(
        "127.0.0.1:8081",
        address,
        "address of the worker's health and metrics; `stowgate run` serves them on the API's port",
    )
    worker_threads: int | None = setting(
        None,
        whole_number(1, 64),
        f"payloads that one worker processes concurrently; default {_OPENINGS}, and "
        f"{_EMBEDDED_OPENINGS} with the `memory` broker, where it shares a process with the API",
    )
    relay_seconds: int = setting(
        "5", whole_number(1, 3600), "pause between two passes of the relay"
    )
    sweep_seconds: int = setting("600", whole_number(1, 86400), "pause between two sweeps")

    @property
    def openings(self) -> int:
        """Payloads that one worker processes concurrently."""
        return self.worker_threads or (_EMBEDDED_OPENINGS if self.broker == "memory" else _OPENINGS)

    @property
    def routines_end_seconds(self) -> float:
        """Part of `stop_seconds` for relay, sweeper and replays to end, after the payloads."""
        return 0.2 * self.stop_seconds
