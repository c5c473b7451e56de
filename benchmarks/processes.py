"""What processes cost: CPU seconds and peak memory, as Linux counts them."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

ENGINES = {"MinIO": "minio", "RabbitMQ": "beam.smp"}

ProcessIds = Callable[[], Mapping[str, Sequence[int]]]


@dataclass
class Cost:
    """By the name of a part: CPU seconds of all its processes, and MiB at the peak of the largest.

    The peak is of resident memory (VmHWM), pages of mapped files included.
    """

    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)

    def add(self, later: "Cost") -> None:
        for name, seconds in later.cpu_seconds.items():
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + seconds
            self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), later.peak_mib[name])


@contextmanager
def measured(process_ids: ProcessIds) -> Iterator[Cost]:
    """What these processes cost between the block's beginning and its end, when it is known."""
    groups = process_ids()
    cost = Cost()
    before = {name: _cpu_seconds(pids) for name, pids in groups.items()}
    for pids in groups.values():
        for pid in pids:
            # Linux, proc(5): sets the peak back to what is resident now.
            Path(f"/proc/{pid}/clear_refs").write_text("5")
    yield cost
    for name, pids in groups.items():
        cost.cpu_seconds[name] = _cpu_seconds(pids) - before[name]
        cost.peak_mib[name] = max(_peak_mib(pid) for pid in pids)


def engine_process_ids() -> dict[str, list[int]]:
    """Those of `ENGINES`; no others of their kind may run on this machine during a benchmark."""
    return {engine: _named(command) for engine, command in ENGINES.items()}


def _named(command: str) -> list[int]:
    """The first process with that name (Linux, proc(5): comm); health checks run later ones."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):  # It has just ended.
            if comm.read_text().strip() == command:
                found.append(int(comm.parent.name))
    return sorted(found)[:1]


def _cpu_seconds(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_SECOND


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) / 1024
