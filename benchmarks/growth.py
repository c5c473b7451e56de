"""What becomes of time and memory as the work grows: instances, bytes, records, workers."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
from engines import ObjectStoreEndpoint
from loads import Load
from processes import measured
from records_made import RECEIVED_AT, record
from subjects import Subject, backlog, distributed, embedded

from shared.ids import PayloadIds
from shared.records import State, encode, newest_first

_SMALL = 18432
_HALF_A_MEGABYTE = 1 << 19
_RECORDS = 100_000


@dataclass(frozen=True)
class Growth:
    """`seconds` is a POST's, or the median of several; MiB are at the peak of one process."""

    what: str
    seconds: float
    opened_seconds: float | None = None
    api_peak_mib: float | None = None
    worker_peak_mib: float | None = None


def grow(endpoint: ObjectStoreEndpoint, broker_url: str) -> Iterator[Growth]:
    with distributed(endpoint, broker_url) as subject:
        subject.send(Load("to begin with", 1, 3, 1, _SMALL))
        for instances in (100, 1_000, 10_000):
            name = f"{instances:,} instances of 20 KB in one POST"
            yield _one_post(subject, Load(name, 1, 1, instances, _SMALL))
        for gigabytes in (1, 4):
            name = f"{gigabytes} GiB in one POST, instances of 1 GiB"
            yield _one_post(subject, Load(name, 1, 1, gigabytes, 1 << 30))
    yield from _with_records()
    for workers in (1, 2):
        yield _told(
            Growth(
                f"40 payloads of 50 × 20 KB, waiting for {workers} worker{'s' * (workers > 1)}",
                backlog(endpoint, broker_url, workers, Load("backlog", 2, 20, 50, _SMALL)),
            )
        )


def _one_post(subject: Subject, load: Load) -> Growth:
    with measured(subject.process_ids) as cost:
        seconds, (answer,) = subject.send(load)
        assert subject.opened is not None
        assert answer.payload_id is not None
        opened_at = subject.opened([answer.payload_id])[answer.payload_id]
    return _told(
        Growth(
            load.name, seconds, opened_at - answer.at, cost.peak_mib["api"], cost.peak_mib["worker"]
        )
    )


def _with_records() -> Iterator[Growth]:
    """Single POSTs, with nothing and with many opened records in the store."""
    load = Load("single", 1, 60, 1, _HALF_A_MEGABYTE)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for count in (0, _RECORDS):
            _fill(data / "stowgate" / "opened", count)
            with embedded(data) as subject:
                subject.send(load)
                _, answers = subject.send(load)
            median = sorted(answer.seconds for answer in answers)[len(answers) // 2]
            yield _told(Growth(f"one 0.5 MB, p50, with {count:,} records in the store", median))
        shutil.rmtree(data / "stowgate")


def _fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mint = PayloadIds("stowgate").mint
    for _ in range(count):
        made = replace(record(), payload_id=mint(RECEIVED_AT), state=State.OPENED)
        (folder / newest_first(made.payload_id)).write_bytes(encode(made))


def _told(growth: Growth) -> Growth:
    click.echo(f"  {growth}", err=True)
    return growth
