"""What a pass of the relay costs: flat with opened records, growing with pending ones only.

    make bench-relay ARGS="[--opened 100000] [--store folder|http://host:port]"

An S3 store takes its keys from STOWGATE_OBJECT_STORE_ACCESS_KEY and ..._SECRET_KEY.
"""

import os
import secrets
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import click
from prometheus_client import CollectorRegistry
from records_made import RECEIVED_AT, record

from shared.adapters.folder.store import FolderObjectStore
from shared.adapters.queues import Published
from shared.adapters.s3.store import MinioObjectStore
from shared.ids import PayloadIds
from shared.ports import ObjectStore
from shared.record_store import Records
from shared.records import State, encode, newest_first
from shared.runtime.metrics import WorkerMetrics
from worker.relay import Relay

_LOOKS = 9


@click.command()
@click.option("--opened", default=100_000, show_default=True)
@click.option("--store", "where", default="folder", show_default=True)
def main(opened: int, where: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = _store(where, Path(folder))
        store.prepare()
        print(f"{'opened':>8} {'pending':>8}   first pass       later passes, median")
        for opened_records, pending in ((0, 0), (opened, 0), (opened, 100), (opened, 1000)):
            _fill(store, State.OPENED, opened_records)
            _fill(store, State.PENDING, pending)
            first, later = _measure(store)
            print(f"{opened_records:>8} {pending:>8}   {first:>8.1f} ms   {later:>12.1f} ms")


def _store(where: str, folder: Path) -> ObjectStore:
    if where == "folder":
        return FolderObjectStore(folder / "state")
    return MinioObjectStore.connect(
        where,
        access_key=os.environ["STOWGATE_OBJECT_STORE_ACCESS_KEY"],
        secret_key=os.environ["STOWGATE_OBJECT_STORE_SECRET_KEY"],
        region="us-east-1",
        bucket=f"stowgate-bench-{secrets.token_hex(4)}",
        threads=16,
    )


def _fill(store: ObjectStore, state: State, count: int) -> None:
    """Bring the number of records in that place up to `count`."""
    there = sum(1 for _ in store.list(f"{state}/"))
    mint = PayloadIds("bench").mint

    def write(number: int) -> None:
        made = replace(
            record(),
            payload_id=mint(RECEIVED_AT + timedelta(seconds=number)),
            due_at=RECEIVED_AT + timedelta(days=36500),
            state=state,
        )
        data = encode(made)
        key = f"{state}/{newest_first(made.payload_id)}"
        store.put(key, BytesIO(data), len(data), "application/json")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(there, count)))


def _measure(store: ObjectStore) -> tuple[float, float]:
    """Milliseconds of a new relay's first pass, which reads what is pending, and of later ones."""
    relay = Relay(
        records=Records(store),
        announce=lambda _: Published(),
        backlog=lambda: 0,
        metrics=WorkerMetrics(CollectorRegistry()),
    )
    passes = []
    for _ in range(_LOOKS):
        started = time.perf_counter()
        relay.run_once()
        passes.append((time.perf_counter() - started) * 1000)
    return passes[0], statistics.median(passes[1:])


if __name__ == "__main__":
    main()
