"""Chromium, and Stowgate with a busy day, for the tests of the operator's page."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from busy_day import BusyDay
from clients import from_debian, had_by_one_of, had_chromium, npm_packages, on_this_machine
from playwright.sync_api import Browser, Page, expect, sync_playwright
from service import Service, running

AXE = Path("node_modules/axe-core/axe.min.js")

Visit = Callable[..., Page]
"""Opens a page of a new browser profile, whose options are those of Playwright's `new_context`."""


@pytest.fixture(scope="session")
def chromium() -> Path:
    return had_chromium()


@pytest.fixture(scope="session")
def nginx() -> Path:
    return had_by_one_of(
        "nginx",
        lambda: on_this_machine("nginx"),
        lambda: from_debian("nginx-light", "nginx"),
    )


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core, which checks a page for accessibility."""
    locked = Path(__file__).resolve().parent
    folder = had_by_one_of(
        "axe-core (npm)",
        lambda: npm_packages(on_this_machine("npm"), locked),
        lambda: npm_packages(from_debian("npm", "npm"), locked),
    )
    return (folder / AXE).read_text("utf-8")


# Not of the session: while Playwright runs, its event loop keeps other tests from asyncio.run.
@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-quic", "--disable-background-networking"],
        )
        expect.set_options(timeout=20_000)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """A visit fails the test if a script fails, or the policy of the page blocks something."""
    with ExitStack() as stack:
        faults: list[str] = []

        def visit(url: str, **options: object) -> Page:
            context = browser.new_context(**{"locale": "en-GB", **options})  # type: ignore[arg-type]
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on(
                "console",
                lambda message: (
                    faults.append(message.text)
                    if message.type == "error" and "Failed to load resource" not in message.text
                    else None
                ),
            )
            page.on("dialog", lambda dialog: faults.append(f"a dialog: {dialog.message}"))
            page.goto(url)
            return page

        yield visit
        assert not faults


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, BusyDay]]:
    """Stowgate without a worker, so that what waits goes on waiting."""
    data = tmp_path_factory.mktemp("hospital")
    day = BusyDay(data, datetime.now(UTC))
    day.fill()
    day.add_troubles()
    day.add_vaes()
    with running("api", data) as service:
        yield service, day
