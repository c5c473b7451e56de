"""The figures of the overview: what is read, the intervals and bars, the verdict, and words."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from busy_day import BusyDay

from api.page.activity import MAX_NAMES, Activity, Count, Report
from api.page.plots import SPANS, Plots, plots_of, start_of
from api.page.verdict import Level, verdict
from api.page.words import counted, duration, moment, sentence, size
from shared.record_store import Records
from shared.records import State
from shared.refusals import PayloadState, Refusal, RefusalReason

NOW = datetime(2026, 11, 23, 12, 34, 56, tzinfo=UTC)
HOURS = timedelta(hours=1)

Read = Callable[[], Report]


@pytest.fixture
def day(tmp_path: Path) -> BusyDay:
    return BusyDay(tmp_path, NOW)


@pytest.fixture
def read(day: BusyDay) -> Read:
    activity = Activity(Records(day.store), day.refusals, clock=lambda: NOW)
    return lambda: activity.read(NOW - 7 * 24 * HOURS)


def test_a_report_has_the_state_and_the_size_of_each_post(day: BusyDay, read: Read) -> None:
    opened = day.opened(NOW - HOURS, 2.5)
    refused = day.refused(NOW - 2 * HOURS, RefusalReason.REJECTED)
    failed = day.failed(NOW - 3 * HOURS, "it failed")
    pending = day.record(NOW - 4 * HOURS, State.PENDING)
    day.write(pending)

    report = read()

    assert [(post.payload_id, post.state) for post in report.posts] == [
        (opened.payload_id, PayloadState.OPENED),
        (refused.payload_id, PayloadState.REFUSED),
        (failed.payload_id, PayloadState.FAILED),
        (pending.payload_id, PayloadState.PENDING),
    ]
    assert report.posts[0].opened_after_seconds == pytest.approx(2.5, abs=0.01)
    assert report.posts[2].opened_after_seconds is None
    assert report.posts[0].size is not None
    assert report.posts[0].size.size_bytes == opened.size_bytes
    assert report.complete_since is None
    assert report.oldest_waiting == pending.received_at
    assert [report.waiting, report.failed, report.refused] == [Count(1)] * 3


def test_a_replayed_payload_waits_and_needs_no_attention(day: BusyDay, read: Read) -> None:
    refused = day.refused(NOW - HOURS, RefusalReason.REJECTED)
    day.refusals.request_replay(refused.payload_id, 1, NOW)
    failed = day.failed(NOW - HOURS, "it failed")
    day.write(day.record(NOW, State.PENDING, payload_id=failed.payload_id))

    report = read()

    assert report.waiting == Count(2)
    assert report.failed == report.refused == Count(0)
    assert report.troubles == ()
    assert report.oldest_waiting == refused.received_at


def test_a_refused_replay_counts_again(day: BusyDay, read: Read) -> None:
    refused = day.refused(NOW - HOURS, RefusalReason.REJECTED)
    day.refusals.note_replayed(refused.payload_id, 1, NOW)
    before = read()
    day.refusals.note(Refusal(refused.payload_id, 1, RefusalReason.REJECTED, NOW))

    assert before.refused == Count(0)
    assert read().refused == Count(1)


def test_only_what_waits_for_long_or_has_an_error_needs_attention(day: BusyDay, read: Read) -> None:
    day.write(day.record(NOW - timedelta(minutes=1), State.PENDING))
    slow = day.record(NOW - timedelta(minutes=6), State.PENDING)
    tried = day.record(NOW - timedelta(minutes=2), State.PENDING, last_error="the broker is away")
    day.write(slow)
    day.write(tried)

    troubles = read().troubles

    assert {t.payload_id for t in troubles} == {slow.payload_id, tried.payload_id}


def test_what_is_damaged_or_foreign_does_not_hide_the_rest(day: BusyDay, read: Read) -> None:
    made = [day.failed(NOW - n * HOURS, "it failed") for n in range(3)]
    damaged = next(iter(day.store.list("failed/"))).key
    day.store.put(damaged, BytesIO(b"{"), 1, "application/json")
    day.store.create("failed/copy of a record.json", b"{}", "application/json")

    report = read()

    assert report.failed == Count(3)
    assert len(report.troubles) == len(made) - 1


def test_a_report_of_more_than_it_lists_says_since_when_it_is_complete(
    day: BusyDay, read: Read
) -> None:
    for seconds in range(MAX_NAMES + 50):
        day.opened(NOW - timedelta(seconds=seconds), 0.1)
    for seconds in range(10):
        day.failed(NOW - timedelta(minutes=5 * seconds), "it failed")

    report = read()

    assert report.complete_since == NOW - timedelta(seconds=MAX_NAMES - 1)
    assert min(post.received_at for post in report.posts) >= report.complete_since
    assert not report.failed.is_more


def shown(day: BusyDay, read: Read, span: str = "6h") -> Plots:
    return plots_of(read(), span, day.now)


@pytest.mark.parametrize("span", SPANS)
def test_the_intervals_end_with_the_current_one(day: BusyDay, read: Read, span: str) -> None:
    plots = shown(day, read, span)

    assert plots.start == start_of(span, NOW)
    assert plots.intervals[0].start == plots.start
    assert plots.intervals[-1].start <= NOW < plots.intervals[-1].end == plots.end
    assert all(len(plot.columns) == len(plots.intervals) for plot in plots.plots)


def test_each_post_is_in_its_interval(day: BusyDay, read: Read) -> None:
    made = [
        day.opened(datetime(2026, 11, 23, 12, 30, tzinfo=UTC), 1.0),
        day.opened(datetime(2026, 11, 23, 12, 29, 59, tzinfo=UTC), 3.0),
        day.opened(datetime(2026, 11, 23, 12, 15, tzinfo=UTC), 1.0),
    ]

    plots = shown(day, read)

    assert [i.posts for i in plots.intervals[-3:]] == [0, 2, 1]
    assert plots.intervals[-2].median == pytest.approx(2.0, abs=0.01)
    assert plots.intervals[-2].slowest == pytest.approx(3.0, abs=0.01)
    assert plots.instances == sum(record.file_count for record in made)
    assert plots.size_bytes == sum(record.size_bytes or 0 for record in made)
    assert plots.known_since is plots.sized_since is None


def test_bars_lie_on_each_other_and_within_the_plot(day: BusyDay, read: Read) -> None:
    for _ in range(7):
        day.opened(NOW, 0.5)
    day.failed(NOW, "it failed")
    day.refused(NOW, RefusalReason.REJECTED)

    plots = shown(day, read)

    bars = plots.plots[0].columns[-1].bars
    assert [bar.kind for bar in bars] == ["failed", "refused", "opened"]
    assert bars[0].y + bars[0].height == pytest.approx(100)
    assert all(upper.y + upper.height == pytest.approx(lower.y) for lower, upper in pairwise(bars))
    for plot in plots.plots:
        for column in plot.columns:
            assert all(bar.y >= 0 and bar.y + bar.height <= 100.01 for bar in column.bars)


def test_sizes_count_only_since_all_are_known(day: BusyDay, read: Read) -> None:
    records = [day.opened(NOW - timedelta(seconds=10 * n), 0.1) for n in range(150)]

    first, second = shown(day, read, "1h"), shown(day, read, "1h")

    assert first.sized_since is not None
    assert first.instances == sum(record.file_count for record in records[:100])
    assert "at least" in first.plots[2].summary
    assert first.plots[2].unknown_until > 0
    assert second.sized_since is None
    assert second.instances == sum(record.file_count for record in records)


NOTHING = Report((), None, Count(0), Count(0), Count(0), None, ())
HEALTHY = {"object_store": None, "free_space": None, "broker": None}


@pytest.mark.parametrize(
    ("faults", "report", "level", "words"),
    [
        ({}, NOTHING, Level.GOOD, "Everything is getting through"),
        ({"object_store": "away"}, None, Level.BAD, "Uploads are refused"),
        ({"free_space": "full"}, NOTHING, Level.BAD, "Uploads are refused"),
        ({}, None, Level.BAD, "could not be read"),
        ({"broker": "away"}, NOTHING, Level.WARNING, "Not available: Broker"),
        (
            {"broker": "away"},
            Report((), None, Count(0), Count(1), Count(0), None, ()),
            Level.BAD,
            "1 payload needs attention",
        ),
        (
            {},
            Report((), None, Count(0), Count(2), Count(1000, is_more=True), None, ()),
            Level.BAD,
            "At least 1,002 payloads need attention",
        ),
        (
            {},
            Report((), None, Count(1), Count(0), Count(0), NOW - timedelta(minutes=4), ()),
            Level.GOOD,
            "Everything",
        ),
        (
            {},
            Report((), None, Count(2), Count(0), Count(0), NOW - timedelta(minutes=12), ()),
            Level.WARNING,
            "2 payloads wait",
        ),
        (
            {},
            Report((), NOW, Count(1000, is_more=True), Count(0), Count(0), NOW, ()),
            Level.WARNING,
            "At least 1,000 payloads wait",
        ),
    ],
)
def test_the_verdict_is_the_most_serious_finding(
    faults: dict[str, str | None], report: Report | None, level: Level, words: str
) -> None:
    found = verdict("ready", {**HEALTHY, **faults}, report, NOW)

    assert found.level is level
    assert words in found.headline


@pytest.mark.parametrize(("status", "faults"), [("stopping", HEALTHY), ("unknown", {})])
def test_the_verdict_says_that_the_replica_stops_or_knows_nothing_yet(
    status: str, faults: dict[str, str | None]
) -> None:
    assert verdict(status, faults, NOTHING, NOW).level is Level.WARNING


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (2_500_000_000, "2.5 GB"),
        (10**18, "1000 PB"),
    ],
)
def test_sizes_have_units(size_bytes: int, words: str) -> None:
    assert size(size_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 ms"),
        (0.0123, "12 ms"),
        (0.9996, "1 s"),
        (2.345, "2.35 s"),
        (9.96, "10 s"),
        (59.96, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (90_000, "1 d 1 h"),
        (86_400 + 60, "1 d"),
    ],
)
def test_durations_have_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_counts_errors_and_times_are_in_words() -> None:
    assert (counted(1, "payload"), counted(1200, "payload")) == ("1 payload", "1,200 payloads")
    assert sentence("it failed: x") == "It failed: x."
    assert sentence("It failed.") == "It failed."
    assert str(moment(NOW)) == (
        '<time datetime="2026-11-23T12:34:56.000000Z" title="2026-11-23 12:34:56 UTC">'
        "2026-11-23 12:34:56 UTC</time>"
    )
