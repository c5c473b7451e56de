"""What tracing costs: CPU and time of the same loads, with tracing off and on in one run, and with
no trace sampled.

    make bench-tracing ARGS="[--rounds 7] [--before FOLDER]"

`--before` is another checkout, such as one without tracing, which is measured too.
"""

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
from collector import keeping
from loads import Load, send
from processes import measured
from service import Service, running, wait_for

_LOADS = (Load("200 × 20 KB", 4, 50, 1, 18_432), Load("4 × 50 × 20 KB", 4, 1, 50, 18_432))


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--before", type=click.Path(exists=True, path_type=Path))
def main(rounds: int, before: Path | None) -> None:
    with ExitStack() as stack:
        url, bodies = stack.enter_context(keeping())
        on = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
        settings = {"off": {}, "on": on, "sampled out": {**on, "OTEL_TRACES_SAMPLER": "always_off"}}
        if before is not None:
            settings = {"before": {"PYTHONPATH": str(before)}, **settings}
        services = {}
        for name, variables in settings.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            services[name] = stack.enter_context(running("run", folder, **variables))
        for service in services.values():
            _measure(service, _LOADS[0])
        for load in _LOADS:
            figures: dict[str, list[tuple[float, float]]] = {name: [] for name in services}
            for number in range(rounds):
                turn = list(services)[number % len(services) :]
                for name in [*turn, *(other for other in services if other not in turn)]:
                    figures[name].append(_measure(services[name], load))
            _print(load, figures)
        assert bodies, "nothing was exported"


def _measure(service: Service, load: Load) -> tuple[float, float]:
    """Return milliseconds of CPU per POST until all requests are opened, and of time per POST."""
    with measured(lambda: {"all": service.process_ids()}) as cost:
        seconds, answers = send(f"{service.url}/dicomweb/studies", load)
        requests = service.data / "workflow-requests"
        names = [f"{answer.payload_id}.json" for answer in answers]
        wait_for(lambda: all((requests / name).exists() for name in names), 120)
    posts = load.all_posts
    return 1000 * cost.cpu_seconds["all"] / posts, 1000 * seconds / posts


def _print(load: Load, figures: dict[str, list[tuple[float, float]]]) -> None:
    first = next(iter(figures))
    for number, what in enumerate(("CPU per POST", "time per POST")):
        print(f"{load.name}, {what}")
        for name, found in figures.items():
            values = [pair[number] for pair in found]
            ratios = [
                pair[number] / base[number]
                for pair, base in zip(found, figures[first], strict=True)
            ]
            print(
                f"  {name:<12}{statistics.median(values):>8.2f} ms   "
                f"{statistics.median(ratios):.3f} of {first} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
