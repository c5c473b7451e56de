"""Whether Stowgate is as fast beside its store's limit, in the same run, as when last measured.

    make bench-guard

Compares ratios, which a slow machine does not change much, and leaves room for noise. Exits 1 with
a sentence for each that fell.
"""

import json
import statistics
import sys
from pathlib import Path

import click
from bench import LOADS, measure, warm_up
from report import RAW, Figures
from subjects import distributed, embedded, engines, raw_puts

_ROUNDS = 5
_LOADS = ("100 × 0.5 MB", "500 × 20 KB", "1 × 0.5 MB, serial")

# Share of the last measured ratio; anything below exceeds the noise.
_FLOOR = 0.6

_MEASURED = Path(__file__).resolve().parents[1] / "docs" / "performance.json"


@click.command()
def main() -> None:
    before = Figures(json.loads(_MEASURED.read_text())["measurements"])
    found = []
    with (
        engines() as (endpoint, broker_url),
        raw_puts(endpoint) as raw,
        distributed(endpoint, broker_url) as on_engines,
        embedded() as alone,
    ):
        for subject in (raw, on_engines, alone):
            warm_up(subject)
        for number in range(_ROUNDS):
            for load in LOADS:
                if load.name in _LOADS:
                    found += [
                        vars(measure(number, load, subject)) for subject in (raw, on_engines, alone)
                    ]
    now = Figures(found)
    fallen = 0
    for name in now.loads:
        for subject in now.subjects[1:]:
            was, ratio = (
                statistics.median(figures.ratios(name, subject, RAW, "mb_per_second"))
                for figures in (before, now)
            )
            fell = ratio < _FLOOR * was
            fallen += fell
            verdict = "FELL" if fell else "holds"
            click.echo(f"{verdict}  {name}, {subject}: {ratio:.2f} of raw PUT, was {was:.2f}")
    sys.exit(1 if fallen else 0)


if __name__ == "__main__":
    main()
