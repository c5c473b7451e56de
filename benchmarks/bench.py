"""How fast Stowgate is, beside the limit of its store and beside Orthanc, in one run.

    make bench [ROUNDS=5]

Each round measures every load with every subject, one after the other, so that what disturbs the
machine disturbs all. What Stowgate's worker has left to do of one load is waited for before the
next is measured.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click
from engines import Engines, NotToBeHad, ObjectStoreEndpoint
from loads import Answered, Load
from processes import measured
from subjects import Subject, distributed, embedded, orthanc, raw_puts

HALF_A_MEGABYTE = 1 << 19

LOADS = (
    Load("100 × 0.5 MB", 1, 1, 100, HALF_A_MEGABYTE),
    Load("1 × 0.5 MB, serial", 1, 60, 1, HALF_A_MEGABYTE),
    Load("1 × 0.5 MB, 8 senders", 8, 30, 1, HALF_A_MEGABYTE),
    Load("2,000 × 0.5 MB", 1, 1, 2000, HALF_A_MEGABYTE),
    Load("one of 1 GB", 1, 1, 1, 1 << 30),
    Load("500 × 20 KB", 1, 1, 500, 18432),
    Load("32 senders, 20 × 0.5 MB", 32, 1, 20, HALF_A_MEGABYTE),
)


@dataclass(frozen=True)
class Measurement:
    """One load on one subject in one round. Latencies are of POSTs; `out` is from a POST's first
    byte to its workflow request, and `out_mb_per_second` the rate at which requests come out."""

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
    latencies = [(times[a.payload_id] - a.at) * 1000 for a in answers if a.payload_id]
    return {
        "out_p50_ms": percentile(latencies, 50),
        "out_p95_ms": percentile(latencies, 95),
        "out_mb_per_second": load.size_bytes / (max(times.values()) - began_at) / 1e6,
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that this share of all does not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


@contextmanager
def subjects(endpoint: ObjectStoreEndpoint, broker_url: str) -> Iterator[list[Subject]]:
    with ExitStack() as stack:
        found = [stack.enter_context(raw_puts(endpoint))]
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
@click.option("--only", default="", help="loads whose name has this in it")
@click.option("--to", type=click.Path(path_type=Path), help="a JSON file for what was measured")
def main(rounds: int, only: str, to: Path | None) -> None:
    engines = Engines(lambda line: click.echo(line, err=True))
    engines.start(["object store", "broker"])
    endpoint, broker_url = engines.address("object store"), engines.address("broker")
    assert isinstance(endpoint, ObjectStoreEndpoint)
    assert isinstance(broker_url, str)
    loads = [load for load in LOADS if only in load.name]
    found: list[Measurement] = []
    try:
        for number in range(rounds):
            with subjects(endpoint, broker_url) as all_subjects:
                for load in loads:
                    turn = number % len(all_subjects)
                    for subject in (*all_subjects[turn:], *all_subjects[:turn]):
                        measurement = measure(number, load, subject)
                        found.append(measurement)
                        click.echo(_line(measurement), err=True)
    finally:
        engines.close()
    print_table(loads, found)
    if to is not None:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("gunicorn", "minio", "pika", "pydicom")},
            "engines": engines.describe(),
        }
        to.write_text(json.dumps({"about": about, "measurements": [asdict(m) for m in found]}))


def _line(m: Measurement) -> str:
    peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in m.peak_mib.items())
    cpu = ", ".join(f"{name} {s:.2f}" for name, s in m.cpu_seconds.items())
    out = f"  out p95 {m.out_p95_ms:.0f} ms, {m.out_mb_per_second:.0f} MB/s" if m.out_p95_ms else ""
    away = f"  turned away {m.turned_away}" if m.turned_away else ""
    return (
        f"{m.round} {m.load:<24} {m.subject:<28} {m.mb_per_second:6.1f} MB/s "
        f"{m.posts_per_second:6.1f}/s p50 {m.p50_ms:7.1f} p95 {m.p95_ms:7.1f} ms  "
        f"CPU {cpu}  peak {peaks}{out}{away}"
    )


def print_table(loads: Sequence[Load], found: Sequence[Measurement]) -> None:
    for load in loads:
        of_load = [m for m in found if m.load == load.name]
        for subject in dict.fromkeys(m.subject for m in of_load):
            rates = [m.mb_per_second for m in of_load if m.subject == subject]
            p50s = [m.p50_ms for m in of_load if m.subject == subject]
            click.echo(
                f"{load.name:<24} {subject:<28} {statistics.median(rates):7.1f} MB/s "
                f"({min(rates):.0f} to {max(rates):.0f})  p50 {statistics.median(p50s):7.1f} ms"
            )


if __name__ == "__main__":
    main()
