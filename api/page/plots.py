"""The plots of the overview: intervals of time, and bars for the template to draw."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import median

from api.page.activity import Post, Report
from api.page.words import counted, duration, number, size
from shared.refusals import PayloadState

SPANS = {
    "1h": (timedelta(hours=1), timedelta(minutes=5)),
    "6h": (timedelta(hours=6), timedelta(minutes=15)),
    "24h": (timedelta(hours=24), timedelta(hours=1)),
    "7d": (timedelta(days=7), timedelta(hours=6)),
}
"""By name the time that a view covers, and the length of an interval."""

SPAN_NAMES = {"1h": "1 hour", "6h": "6 hours", "24h": "24 hours", "7d": "7 days"}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# In the drawing an interval is 10 wide, and the plot is 100 high.
_STEP, _GAP, _HEIGHT = 10.0, 1.5, 100.0

# From bottom to top; the states that need an operator are at the bottom, so that they show.
_STACK = (
    PayloadState.FAILED,
    PayloadState.REFUSED,
    PayloadState.PENDING,
    PayloadState.OPENED,
)


@dataclass
class Interval:
    """The POSTs that were received from `start` until before `end`."""

    start: datetime
    end: datetime
    states: Counter[PayloadState] = field(default_factory=Counter)
    instances: int = 0
    size_bytes: int = 0
    opened_after: list[float] = field(default_factory=list)

    @property
    def posts(self) -> int:
        return sum(self.states.values())

    @property
    def median(self) -> float:
        return median(self.opened_after)

    @property
    def slowest(self) -> float:
        return max(self.opened_after)


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    kind: str


@dataclass(frozen=True)
class Column:
    """The bars of an interval, with their values in words."""

    start: datetime
    end: datetime
    bars: tuple[Bar, ...]
    words: str


@dataclass(frozen=True)
class Plot:
    """One plot. `labels` are those of its axis from top to bottom; `unknown_until` is the part of
    the width at the left, from 0 to 1, that the figures do not cover."""

    name: str
    title: str
    summary: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    width: float
    unknown_until: float


@dataclass(frozen=True)
class Plots:
    """The plots of a span. `known_since` is when the listed POSTs begin, and `sized_since` those
    whose size is known; each is None if that is the complete span."""

    start: datetime
    end: datetime
    intervals: tuple[Interval, ...]
    plots: tuple[Plot, ...]
    posts: int
    instances: int
    size_bytes: int
    known_since: datetime | None
    sized_since: datetime | None
    median_seconds: float | None
    slowest_seconds: float | None


@dataclass(frozen=True)
class Axis:
    """An axis from `lowest` to the result of `top` for the largest amount; logarithmic if `lowest`
    is not 0."""

    label: Callable[[float], str]
    top: Callable[[float], float]
    lowest: float = 0.0

    def share(self, amount: float, top: float) -> float:
        """Return the part of the axis, from 0 to 1, at which an amount lies."""
        if not self.lowest:
            return amount / top
        return math.log(max(amount, self.lowest) / self.lowest) / math.log(top / self.lowest)

    def amount(self, share: float, top: float) -> float:
        if not self.lowest:
            return share * top
        return float(self.lowest * (top / self.lowest) ** share)


def _next_round_number(amount: float) -> float:
    """Return the next 2, 4 or 10 times a power of ten, of which the half is round too."""
    power = 10.0 ** math.floor(math.log10(max(amount, 1.0)))
    return next(f * power for f in (2, 4, 10) if f * power >= amount * 0.999999)


def _next_round_duration(seconds: float) -> float:
    return next((one for one in _ROUND_SECONDS if one >= seconds), seconds)


_ROUND_SECONDS = (1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0, 86400.0, 864000.0)

_DURATION_AXIS = Axis(duration, _next_round_duration, lowest=0.01)


def start_of(span: str, now: datetime) -> datetime:
    """Return the start of a span that ends with the current interval."""
    length, step = SPANS[span]
    return _end(now, step) - length


def plots_of(report: Report, span: str, now: datetime) -> Plots:
    length, step = SPANS[span]
    end = _end(now, step)
    start = end - length
    intervals = [Interval(start + i * step, start + (i + 1) * step) for i in range(length // step)]
    posts = [post for post in report.posts if start <= post.received_at < end]
    sized_since = _sized_since(posts, report.complete_since)
    for post in posts:
        interval = intervals[(post.received_at - start) // step]
        interval.states[post.state] += 1
        if post.opened_after_seconds is not None:
            interval.opened_after.append(post.opened_after_seconds)
        if post.size and (sized_since is None or post.received_at >= sized_since):
            interval.instances += post.size.instances
            interval.size_bytes += post.size.size_bytes or 0
    known_since = _inside(report.complete_since, start)
    sized_since = _inside(sized_since, start)
    every = [s for interval in intervals for s in interval.opened_after]
    instances = sum(i.instances for i in intervals)
    size_bytes = sum(i.size_bytes for i in intervals)
    unknown, unsized = _share(known_since, start, length), _share(sized_since, start, length)
    words = SPAN_NAMES[span]
    at_least = "at least " if sized_since else ""
    half, slowest = (median(every), max(every)) if every else (None, None)
    plots = (
        _plot(
            "posts",
            "POSTs",
            f"{'at least ' if known_since else ''}{counted(len(posts), 'POST')} in {words}",
            intervals,
            lambda i: [(state, i.states[state]) for state in _STACK],
            Axis(number, _next_round_number),
            lambda i: ", ".join(f"{i.states[s]} {s}" for s in reversed(_STACK) if i.states[s]),
            unknown,
        ),
        _plot(
            "opened-after",
            "Time from POST to opened",
            "none was opened"
            if half is None or slowest is None
            else f"half within {duration(half)}, the slowest {duration(slowest)}",
            intervals,
            lambda i: (
                [("median", i.median), ("slowest", i.slowest - i.median)] if i.opened_after else []
            ),
            _DURATION_AXIS,
            lambda i: (
                f"half within {duration(i.median)}, the slowest {duration(i.slowest)}"
                if i.opened_after
                else ""
            ),
            unknown,
        ),
        _plot(
            "instances",
            "Instances",
            f"{at_least}{counted(instances, 'instance')} in {words}",
            intervals,
            lambda i: [("instances", i.instances)],
            Axis(number, _next_round_number),
            lambda i: counted(i.instances, "instance"),
            unsized,
        ),
        _plot(
            "bytes",
            "Bytes",
            f"{at_least}{size(size_bytes)} in {words}",
            intervals,
            lambda i: [("bytes", i.size_bytes)],
            Axis(size, _next_round_number),
            lambda i: size(i.size_bytes),
            unsized,
        ),
    )
    return Plots(
        start,
        end,
        tuple(intervals),
        plots,
        len(posts),
        instances,
        size_bytes,
        known_since,
        sized_since,
        half,
        slowest,
    )


def _end(now: datetime, step: timedelta) -> datetime:
    return _EPOCH + ((now - _EPOCH) // step + 1) * step


def _inside(since: datetime | None, start: datetime) -> datetime | None:
    return since if since is not None and since > start else None


def _share(since: datetime | None, start: datetime, length: timedelta) -> float:
    return 0.0 if since is None else min(1.0, (since - start) / length)


def _sized_since(posts: Sequence[Post], complete_since: datetime | None) -> datetime | None:
    """Return when the POSTs begin whose sizes are all known; None without a gap."""
    since = None
    for post in posts:
        if post.size is None:
            return since or post.received_at + timedelta(milliseconds=1)
        since = post.received_at
    return complete_since


def _plot(
    name: str,
    title: str,
    summary: str,
    intervals: Sequence[Interval],
    parts: Callable[[Interval], Sequence[tuple[str, float]]],
    axis: Axis,
    words: Callable[[Interval], str],
    unknown_until: float,
) -> Plot:
    top = axis.top(max((sum(a for _, a in parts(i)) for i in intervals), default=0.0))
    columns = []
    for index, interval in enumerate(intervals):
        bars, below, total = [], 0.0, 0.0
        for kind, amount in parts(interval):
            if amount <= 0:
                continue
            total += amount
            # One POST among thousands is still visible.
            height = max(_HEIGHT * axis.share(total, top) - below, 1.0)
            below += height
            bars.append(
                Bar(
                    round(index * _STEP + _GAP / 2, 2),
                    round(_HEIGHT - below, 2),
                    _STEP - _GAP,
                    round(height, 2),
                    str(kind),
                )
            )
        columns.append(Column(interval.start, interval.end, tuple(bars), words(interval)))
    return Plot(
        name,
        title,
        summary,
        tuple(axis.label(axis.amount(share, top)) for share in (1.0, 0.5, 0.0)),
        tuple(columns),
        len(intervals) * _STEP,
        unknown_until,
    )
