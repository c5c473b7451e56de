"""How fast Stowgate is, beside the limit of its store and beside Orthanc, in one run.

    make bench [ROUNDS=3]

Each round measures every load with every subject, one after the other, the short ones several times
in turn, so that what disturbs the machine disturbs all. What Stowgate's worker has left to do of
one load is waited for before the next is measured. What is done once for a process, or for a
connection, is not measured.
"""

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

import click
from engines import NotToBeHad, ObjectStoreEndpoint
from growth import Growth, grow
from loads import Answered, Load
from processes import Cost, measured
from report import tables, write_report
from subjects import (
    Subject,
    distributed,
    embedded,
    engines,
    orthanc,
    raw_embedded,
    raw_payloads,
    raw_puts,
    raw_service,
)

HALF_A_MEGABYTE = 1 << 19

LOADS = (
    Load("100 × 0.5 MB", 1, 1, 100, HALF_A_MEGABYTE),
    Load("1 × 0.5 MB, serial", 1, 60, 1, HALF_A_MEGABYTE),
    Load("1 × 0.5 MB, 8 senders", 8, 150, 1, HALF_A_MEGABYTE),
    Load("2,000 × 0.5 MB", 1, 1, 2000, HALF_A_MEGABYTE),
    Load("one of 1 GB", 1, 1, 1, 1 << 30),
    Load("500 × 20 KB", 1, 1, 500, 18432),
    Load("32 senders, 20 × 0.5 MB", 32, 1, 20, HALF_A_MEGABYTE),
    Load("5 × 100 × 0.5 MB, serial", 1, 5, 100, HALF_A_MEGABYTE),
    Load("2 senders, 5 × 100 × 0.5 MB", 2, 5, 100, HALF_A_MEGABYTE),
)

_TO_BEGIN_WITH = Load("to begin with", 8, 1, 4, HALF_A_MEGABYTE)

# ext4 gives a deleted file's inode away again after a minute, and until then looks past it for each
# new file: what is removed behind one round would slow down the next.
_CALM_SECONDS = 65.0

ALONE = Load("1 × 0.5 MB, alone", 1, 1, 1, HALF_A_MEGABYTE)
_ALONE_TIMES = 30

# These take a second or two, in which the machine is now one thing and now another: in each round
# all subjects have several turns of them.
_SHORT = {"100 × 0.5 MB", "1 × 0.5 MB, serial"}
_TURNS = 4


@dataclass(frozen=True)
class Measurement:
    """One load on one subject in one turn of a round. Latencies are of POSTs; `out` is from a
    POST's first byte to its workflow request, and `out_mb_per_second` the rate at which requests
    come out."""

    round: int
    load: str
    subject: str
    seconds: float
    mb_per_second: float
    instances_per_second: float
    posts_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    turned_away: int
    cpu_seconds: dict[str, float]
    peak_mib: dict[str, float]
    out_p50_ms: float | None = None
    out_p95_ms: float | None = None
    out_mb_per_second: float | None = None


def measure(number: int, load: Load, subject: Subject) -> Measurement:
    os.sync()
    with measured(subject.process_ids) as cost:
        began_at = time.time()
        seconds, answers = subject.send(load)
        out = _requests_out(subject, load, answers, began_at)
    return _measurement(number, load, subject, seconds, answers, cost, out)


def warm_up(subject: Subject) -> None:
    measure(0, _TO_BEGIN_WITH, subject)


def measure_alone(
    number: int, load: Load, all_subjects: Sequence[Subject]
) -> Iterator[Measurement]:
    """Single POSTs, one to each subject in turn, each when all that came of the one before is
    done."""
    os.sync()
    posts: dict[str, list[_PostAlone]] = {subject.name: [] for subject in all_subjects}
    costs = [Cost() for _ in all_subjects]
    for _ in range(_ALONE_TIMES):
        for subject, cost in zip(all_subjects, costs, strict=True):
            with measured(subject.process_ids) as of_one:
                posts[subject.name].append(_post_alone(load, subject))
            cost.add(of_one)
    for subject, cost in zip(all_subjects, costs, strict=True):
        seconds, answers, waited = zip(*posts[subject.name], strict=True)
        out = _out_latencies([after for after in waited if after is not None])
        sent = replace(load, posts=_ALONE_TIMES)
        yield _measurement(number, sent, subject, sum(seconds), answers, cost, out)


class _PostAlone(NamedTuple):
    seconds: float
    answer: Answered
    seconds_until_opened: float | None


def _post_alone(load: Load, subject: Subject) -> _PostAlone:
    seconds, (answer,) = subject.send(load)
    if subject.opened is None or answer.payload_id is None:
        return _PostAlone(seconds, answer, None)
    opened_at = subject.opened([answer.payload_id])[answer.payload_id]
    return _PostAlone(seconds, answer, opened_at - answer.at)


def _measurement(
    number: int,
    load: Load,
    subject: Subject,
    seconds: float,
    answers: Sequence[Answered],
    cost: Cost,
    out: dict[str, float],
) -> Measurement:
    latencies = [answer.seconds * 1000 for answer in answers]
    return Measurement(
        round=number,
        load=load.name,
        subject=subject.name,
        seconds=seconds,
        mb_per_second=load.size_bytes / seconds / 1e6,
        instances_per_second=load.all_instances / seconds,
        posts_per_second=load.all_posts / seconds,
        p50_ms=percentile(latencies, 50),
        p95_ms=percentile(latencies, 95),
        p99_ms=percentile(latencies, 99),
        turned_away=sum(answer.turned_away for answer in answers),
        cpu_seconds=cost.cpu_seconds,
        peak_mib=cost.peak_mib,
        **out,
    )


def _requests_out(
    subject: Subject, load: Load, answers: Sequence[Answered], began_at: float
) -> dict[str, float]:
    if subject.opened is None:
        return {}
    times = subject.opened([answer.payload_id for answer in answers if answer.payload_id])
    return {
        **_out_latencies([times[a.payload_id] - a.at for a in answers if a.payload_id]),
        "out_mb_per_second": load.size_bytes / (max(times.values()) - began_at) / 1e6,
    }


def _out_latencies(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {
        "out_p50_ms": percentile(seconds, 50) * 1000,
        "out_p95_ms": percentile(seconds, 95) * 1000,
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that this share of all does not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


@contextmanager
def subjects(endpoint: ObjectStoreEndpoint, broker_url: str) -> Iterator[list[Subject]]:
    with ExitStack() as stack:
        found = [
            stack.enter_context(raw_puts(endpoint)),
            stack.enter_context(raw_payloads(endpoint)),
            stack.enter_context(raw_service(endpoint, broker_url)),
            stack.enter_context(raw_embedded()),
        ]
        try:
            found.append(stack.enter_context(orthanc()))
        except NotToBeHad as why:
            click.echo(f"without Orthanc: {why}", err=True)
        for processes in (1, 2):
            found.append(
                stack.enter_context(distributed(endpoint, broker_url, api_processes=processes))
            )
        found.append(stack.enter_context(embedded()))
        yield found


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", default="", help="loads whose name has this in it, and no growth")
@click.option("--write/--no-write", default=False, help="what docs/performance.md shows")
def main(rounds: int, only: str, write: bool) -> None:
    found: list[Measurement] = []
    growth: list[Growth] = []
    with engines() as (endpoint, broker_url):
        for number in range(rounds):
            found += _one_round(number, endpoint, broker_url, only)
            os.sync()
            time.sleep(_CALM_SECONDS)
        if not only:
            growth = list(grow(endpoint, broker_url))
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("gunicorn", "minio", "pika", "pydicom")},
        "rounds": rounds,
    }
    measurements = [asdict(m) for m in found]
    report = {"about": about, "measurements": measurements, "growth": [asdict(g) for g in growth]}
    for line in tables(report):
        click.echo(line)
    if write:
        write_report(report)


def _one_round(
    number: int, endpoint: ObjectStoreEndpoint, broker_url: str, only: str
) -> Iterator[Measurement]:
    with subjects(endpoint, broker_url) as all_subjects:
        for subject in all_subjects:
            warm_up(subject)
        turn = number % len(all_subjects)
        in_turn = (*all_subjects[turn:], *all_subjects[:turn])
        for load in LOADS:
            if only in load.name:
                for _ in range(_TURNS if load.name in _SHORT else 1):
                    for subject in in_turn:
                        yield _told(measure(number, load, subject))
        if only in ALONE.name:
            for _ in range(_TURNS):
                yield from map(_told, measure_alone(number, ALONE, in_turn))


def _told(m: Measurement) -> Measurement:
    peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in m.peak_mib.items())
    cpu = ", ".join(f"{name} {seconds:.2f}" for name, seconds in m.cpu_seconds.items())
    out = f"  out p95 {m.out_p95_ms:.0f} ms" if m.out_p95_ms else ""
    rate = f", {m.out_mb_per_second:.0f} MB/s" if m.out_mb_per_second else ""
    away = f"  turned away {m.turned_away}" if m.turned_away else ""
    click.echo(
        f"{m.round} {m.load:<28} {m.subject:<28} {m.mb_per_second:6.1f} MB/s "
        f"{m.posts_per_second:6.1f}/s p50 {m.p50_ms:7.1f} p95 {m.p95_ms:7.1f} ms  "
        f"CPU {cpu}  peak {peaks}{out}{rate}{away}",
        err=True,
    )
    return m


if __name__ == "__main__":
    main()
