"""The tables and plots of docs/performance.md, made of what was measured and of nothing else."""

import json
import statistics
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from processes import ENGINES

_DOCS = Path(__file__).resolve().parents[1] / "docs"
_BEGIN, _END = "<!-- measured: make bench -->", "<!-- end of what was measured -->"

RAW, _RAW_PAYLOAD, _ORTHANC = "raw PUT", "raw payload", "Orthanc"
_BESIDE = (RAW, _RAW_PAYLOAD, "raw service", "raw embedded", _ORTHANC)


class Figures:
    """The measurements by load and subject, in the order in which they were taken."""

    def __init__(self, measurements: Sequence[dict[str, Any]]) -> None:
        self._measurements = measurements
        self.loads = list(dict.fromkeys(m["load"] for m in measurements))
        found = {m["subject"] for m in measurements}
        beside = [name for name in _BESIDE if name in found]
        self.subjects = beside + sorted(found.difference(beside))

    def of(self, load: str, subject: str, figure: str) -> list[float]:
        """One value for each turn."""
        return self._of(load, subject, figure)

    def _of(self, load: str, subject: str, figure: str) -> list[Any]:
        return [
            m[figure]
            for m in self._measurements
            if (m["load"], m["subject"]) == (load, subject) and m[figure] is not None
        ]

    def _by_part(self, load: str, subject: str, figure: str) -> list[dict[str, float]]:
        """The values of each part of a subject, for each turn that has any."""
        return [parts for parts in self._of(load, subject, figure) if parts]

    def ratios(
        self, load: str, subject: str, to: str, figure: str, to_figure: str = ""
    ) -> list[float]:
        """Within each turn; of two different figures, where `to_figure` names the other one's."""
        pairs = zip(
            self.of(load, subject, figure), self.of(load, to, to_figure or figure), strict=False
        )
        return [mine / theirs for mine, theirs in pairs]

    def total(
        self, load: str, subject: str, figure: str, without: Collection[str] = ()
    ) -> list[float]:
        """Of a figure that each part of a subject has: the sum, for each turn."""
        return [
            sum(value for part, value in parts.items() if part not in without)
            for parts in self._by_part(load, subject, figure)
        ]

    def peak(self, load: str, subject: str) -> str:
        parts: dict[str, float] = {}
        for measured in self._by_part(load, subject, "peak_mib"):
            for name, mib in measured.items():
                if name in ENGINES:
                    continue
                parts[name] = max(parts.get(name, 0.0), mib)
        return ", ".join(f"{mib:.0f}" for mib in parts.values())


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Markdown, line by line."""
    about = ", ".join(f"{name} {value}" for name, value in report["about"].items())
    yield f"Measured: {about}."
    yield ""
    yield (
        "Medians of all turns, with the minimum and the maximum in brackets. Ratios compare two "
        "subjects within each turn, by MB/s unless the column names another figure. CPU is in ms "
        "per instance: of the subject's own processes, and of all, with MinIO and RabbitMQ, but "
        "not the sender. Peaks are in MiB, of API and worker if there are two. Requests out: the "
        "time from the first byte of a POST to its workflow request, and the rate at which "
        "requests are published, in MB/s of their instances. Its ratio to Orthanc compares this "
        "rate with the rate at which Orthanc receives."
    )
    figures = Figures(report["measurements"])
    for load in figures.loads:
        yield ""
        yield f"### {load}"
        yield ""
        yield (
            "| | MB/s | instances/s | to Orthanc | to raw payload | p50 ms | p50 to Orthanc "
            "| p95 ms | CPU ms | all CPU ms | peak MiB | requests out p95 ms | out MB/s "
            "| out to Orthanc |"
        )
        yield f"|---|{'---:|' * 13}"
        for subject in figures.subjects:
            yield _row(figures, load, subject)
    if report["growth"]:
        yield ""
        yield "### As the work grows"
        yield ""
        yield "| | seconds | until opened | API peak MiB | worker peak MiB |"
        yield "|---|---:|---:|---:|---:|"
        for growth in report["growth"]:
            cells = (
                f"{growth['seconds']:.3f}",
                *(
                    "" if value is None else f"{value:.1f}"
                    for value in (
                        growth["opened_seconds"],
                        growth["api_peak_mib"],
                        growth["worker_peak_mib"],
                    )
                ),
            )
            yield f"| {growth['what']} | {' | '.join(cells)} |"


def _row(figures: Figures, load: str, subject: str) -> str:
    def beside(to: str, figure: str, to_figure: str = "") -> str:
        if subject == to:
            return ""
        return _spread(figures.ratios(load, subject, to, figure, to_figure), "{:.2f}")

    instances = figures.of(load, subject, "instances_per_second")
    seconds = figures.of(load, subject, "seconds")
    own_cpu, all_cpu = (
        [
            total / (rate * took) * 1000
            for total, rate, took in zip(
                figures.total(load, subject, "cpu_seconds", without),
                instances,
                seconds,
                strict=False,
            )
        ]
        for without in (ENGINES, ())
    )
    cells = [
        _spread(figures.of(load, subject, "mb_per_second"), "{:.0f}"),
        _spread(instances, "{:.0f}"),
        *(beside(to, "mb_per_second") for to in (_ORTHANC, _RAW_PAYLOAD)),
        _median(figures.of(load, subject, "p50_ms")),
        beside(_ORTHANC, "p50_ms"),
        _median(figures.of(load, subject, "p95_ms")),
        _median(own_cpu),
        _median(all_cpu),
        figures.peak(load, subject),
        _median(figures.of(load, subject, "out_p95_ms")),
        _median(figures.of(load, subject, "out_mb_per_second")),
        beside(_ORTHANC, "out_mb_per_second", "mb_per_second"),
    ]
    return f"| {subject} | {' | '.join(cells)} |"


def _median(values: Sequence[float]) -> str:
    if not values:
        return ""
    median = statistics.median(values)
    return f"{median:.1f}" if median < 100 else f"{median:.0f}"


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    shown = form.format(statistics.median(values))
    if len(values) == 1:
        return shown
    return f"{shown} ({form.format(min(values))}-{form.format(max(values))})"


def write_report(report: dict[str, Any]) -> None:
    """Write docs/performance.json and the plots, and the tables into docs/performance.md."""
    (_DOCS / "performance.json").write_text(json.dumps(report, indent=1) + "\n")
    page = _DOCS / "performance.md"
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    measured = "\n".join(tables(report))
    page.write_text(f"{before}{_BEGIN}\n\n{measured}\n\n{_END}{after}")
    draw(report, _DOCS)


def draw(report: dict[str, Any], folder: Path) -> None:
    from matplotlib import pyplot  # only where something is drawn

    pyplot.rcParams["svg.hashsalt"] = "stowgate"
    figures = Figures(report["measurements"])
    panels = (
        (
            "mb_per_second",
            "MB/s, more is better",
            [load for load in figures.loads if not load.startswith("1 ×")],
        ),
        (
            "p50_ms",
            "p50 of a POST in ms, less is better",
            [load for load in figures.loads if load.startswith("1 ×")],
        ),
    )
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 6), width_ratios=[2, 1], layout="constrained")
    for axis, (name, title, loads) in zip(axes, panels, strict=True):
        _bars(axis, figures, name, loads)
        axis.set_title(title, loc="left", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(folder / "performance.svg", metadata={"Date": None})
    pyplot.close(figure)


_COLOURS = ("#9aa5b1", "#b6c0ca", "#d3dae1", "#e6eaee", "#c0a36e", "#1f6f8b", "#5fb3c9", "#2f9e6e")


def _bars(axis: Any, figures: Figures, name: str, loads: Sequence[str]) -> None:
    height = 0.8 / len(figures.subjects)
    for place, subject in enumerate(figures.subjects):
        for row, load in enumerate(loads):
            values = figures.of(load, subject, name)
            if not values:
                continue
            median = statistics.median(values)
            position = row + (place - (len(figures.subjects) - 1) / 2) * height
            axis.barh(
                position,
                median,
                height * 0.9,
                xerr=[[median - min(values)], [max(values) - median]],
                color=_COLOURS[place % len(_COLOURS)],
                error_kw={"linewidth": 0.8},
                label=subject if row == 0 else None,
            )
    axis.set_yticks(range(len(loads)), loads, fontsize=9)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
