"""Fuzz every reader of hostile input, and report the findings.

    python tests/fuzz/run.py --cases 50000 --seed 1     run; exit status 1 on findings
    python tests/fuzz/run.py --case "records:1234" --seed 1     rerun one case
    python tests/fuzz/run.py --target records FILE      rerun the saved input of a finding

Seed, target and number identify a case, which is the same on every machine.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from targets import Target, all_targets

CHUNK_CASES = 500
FINDINGS_FOLDER = Path(".cache") / "fuzz"

# Limits on processor time. Quadratic time exceeds them at any size.
MAX_CASE_SECONDS = 1.0
MAX_SECONDS_PER_BYTE = 20e-6

# Limits on the growth of peak memory in one case, and on the address space of the process.
MAX_CASE_MEMORY_BYTES = 64 << 20
MAX_PROCESS_MEMORY_BYTES = 2 << 30


class OverTime(BaseException):
    """The case exceeded its processor time. No `except Exception` may catch this."""


@dataclass(frozen=True)
class Case:
    target: str
    seed: int
    number: int

    def make(self, target: Target) -> bytes:
        return target.make(random.Random(f"{self.seed}/{self.target}/{self.number}"))


@dataclass(frozen=True)
class Defect:
    case: Case
    message: str
    where: str
    data: bytes = field(repr=False)

    @property
    def path(self) -> Path:
        name = self.case.target.replace(" ", "-")
        return FINDINGS_FOLDER / f"{name}-{self.case.seed}-{self.case.number}.bin"


@dataclass
class Tally:
    cases: int = 0
    accepted: int = 0
    worst_seconds: float = 0.0
    peak_bytes: int = 0
    defects: list[Defect] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.cases += other.cases
        self.accepted += other.accepted
        self.worst_seconds = max(self.worst_seconds, other.worst_seconds)
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.defects += other.defects


def run_cases(target: Target, seed: int, numbers: Iterable[int]) -> Tally:
    """Run these cases in this process. The caller must be its main thread."""
    tally = Tally()
    for number in numbers:
        case = Case(target.name, seed, number)
        run_input(target, case, case.make(target), tally)
    tally.peak_bytes = peak_bytes()
    return tally


def run_input(target: Target, case: Case, data: bytes, tally: Tally) -> None:
    """Run one input, and add the result to `tally`."""
    tally.cases += 1
    try:
        result = _measured(target, data, tally)
        if result is not None:
            target.verify(data, result)
            tally.accepted += 1
    except (Exception, OverTime) as error:  # noqa: BLE001 - any exception at all is a finding
        tally.defects.append(_defect(case, data, error))


def _measured(target: Target, data: bytes, tally: Tally) -> object:
    allowed_seconds = MAX_CASE_SECONDS + MAX_SECONDS_PER_BYTE * len(data)
    peak_before = peak_bytes()
    before = signal.signal(signal.SIGPROF, _end_case)
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, allowed_seconds)
    try:
        result: object = target.run(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        tally.worst_seconds = max(tally.worst_seconds, time.process_time() - started)
    grown_bytes = peak_bytes() - peak_before
    if grown_bytes > MAX_CASE_MEMORY_BYTES:
        raise MemoryError(f"the peak grew by {grown_bytes >> 20} MiB")
    return result


def _end_case(_: int, __: FrameType | None) -> None:
    raise OverTime("the case exceeded its processor time")


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _defect(case: Case, data: bytes, error: BaseException) -> Defect:
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return Defect(case, message, f"{Path(where.filename).name}:{where.lineno}", data)


def _target(name: str) -> Target:
    return next(target for target in all_targets() if target.name == name)


def _limit_process() -> None:
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_PROCESS_MEMORY_BYTES,) * 2)


def _run_chunk(chunk: tuple[str, int, int, int]) -> tuple[str, Tally]:
    name, seed, start, stop = chunk
    return name, run_cases(_target(name), seed, range(start, stop))


def _chunks(cases: int, seed: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield chunks of all targets in turn, so that an aborted run has covered every target."""
    queues = []
    for target in all_targets():
        own = max(cases * target.share // 100, 1)
        queues.append(
            [
                (target.name, seed, start, min(start + CHUNK_CASES, own))
                for start in range(0, own, CHUNK_CASES)
            ]
        )
    for turn in itertools.zip_longest(*queues):
        yield from (chunk for chunk in turn if chunk is not None)


def run_all(cases: int, seed: int, processes: int) -> dict[str, Tally]:
    tallies = {target.name: Tally() for target in all_targets()}
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_limit_process
    ) as pool:
        for name, tally in pool.map(_run_chunk, _chunks(cases, seed)):
            tallies[name].add(tally)
    return tallies


def report(tallies: dict[str, Tally], elapsed_seconds: float) -> None:
    print(
        f"{'target':<16}{'cases':>9}{'accepted':>10}{'refused':>9}{'worst ms':>10}{'findings':>10}"
    )
    total = Tally()
    for name, tally in tallies.items():
        print(_row(name, tally))
        total.add(tally)
    print(_row("all", total))
    rate = total.cases / elapsed_seconds if elapsed_seconds else 0
    print(f"{rate:.0f} cases/s; peak {total.peak_bytes >> 20} MiB per process")
    for kind in _by_kind(total.defects):
        for defect in kind[:3]:
            defect.path.parent.mkdir(parents=True, exist_ok=True)
            defect.path.write_bytes(defect.data)
            case = defect.case
            print(f"FINDING {case.target} #{case.number} seed {case.seed}: {defect.message}")
            print(f"  at {defect.where}, input in {defect.path}")
        if len(kind) > 3:
            print(f"  and {len(kind) - 3} more at {kind[0].where}")


def _row(name: str, tally: Tally) -> str:
    refused = tally.cases - tally.accepted - len(tally.defects)
    worst_ms = tally.worst_seconds * 1000
    return (
        f"{name:<16}{tally.cases:>9}{tally.accepted:>10}{refused:>9}{worst_ms:>10.1f}"
        f"{len(tally.defects):>10}"
    )


def _by_kind(defects: list[Defect]) -> list[list[Defect]]:
    kinds: dict[tuple[str, str], list[Defect]] = {}
    for defect in defects:
        kinds.setdefault((defect.case.target, defect.where), []).append(defect)
    return list(kinds.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuzz every reader of hostile input.")
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", metavar="TARGET:NUMBER", help="rerun one case of the seed")
    parser.add_argument("--target", help="the target of FILE")
    parser.add_argument("file", type=Path, nargs="?", help="rerun one input")
    options = parser.parse_args(arguments)

    print(f"SEED={options.seed}", flush=True)
    started = time.monotonic()
    if options.case:
        name, _, number = options.case.partition(":")
        tallies = {name: run_cases(_target(name), options.seed, [int(number)])}
    elif options.file:
        tally = Tally()
        case = Case(options.target, options.seed, 0)
        run_input(_target(options.target), case, options.file.read_bytes(), tally)
        tallies = {options.target: tally}
    else:
        try:
            tallies = run_all(options.cases, options.seed, options.processes)
        except BrokenProcessPool:
            print(
                "FINDING a process died; run with --processes 1 under a debugger", file=sys.stderr
            )
            return 1
    report(tallies, time.monotonic() - started)
    return 1 if any(tally.defects for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
