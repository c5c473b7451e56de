"""Takes the screenshots of the operator's page: all views, at three widths, light and dark.

They go to `.cache/screenshots`, and those that the documentation shows to `docs`.
"""

import re
import shutil
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from busy_day import BusyDay
from clients import from_debian, had_by_one_of, on_this_machine
from engines import temporary_folder
from instances import new_instance
from playwright.sync_api import Browser, Page, sync_playwright
from service import Service, running

ROOT = Path(__file__).resolve().parents[2]
ALL = ROOT / ".cache" / "screenshots"

WIDTHS = (1280, 768, 390)
SCHEMES = ("light", "dark")

IN_DOCS = {
    "overview-1280-light": "page-overview",
    "overview-390-dark": "page-phone",
    "payload-768-light": "page-payload",
    "sent-1280-dark": "page-send",
}
"""By name of the screenshot its name in `docs`."""

# One on a phone shows what fits on its screen.
PHONE_HEIGHT = 844


def take(browser: Browser, service: Service, day: BusyDay, files: Path) -> None:
    refused = next(iter(day.refusals.outcomes()))[0]
    views = {
        "overview": "ui",
        "payloads": "ui/payloads",
        "refused": "ui/payloads?state=refused",
        "payload": f"ui/payloads/{refused}",
        "vaes": "ui/vaes",
        "vae": "ui/vaes/MR",
        "new-vae": "ui/new-vae",
        "sent": "ui/send",
        "help": "ui/help",
        "error": "ui/vaes/NONE",
    }
    for scheme in SCHEMES:
        for width in WIDTHS:
            context = browser.new_context(
                viewport={"width": width, "height": PHONE_HEIGHT},
                color_scheme="dark" if scheme == "dark" else "light",
                timezone_id="Europe/Berlin",
                locale="en-GB",
            )
            page = context.new_page()
            # The first views of a process read what later ones know.
            for _ in range(5):
                page.goto(f"{service.url}/ui")
            for name, path in views.items():
                page.goto(f"{service.url}/{path}")
                if name == "sent":
                    send(page, files)
                title = f"{name}-{width}-{scheme}"
                is_cut = title in IN_DOCS and width == WIDTHS[-1]
                page.screenshot(path=ALL / f"{title}.png", full_page=not is_cut)
            context.close()


def send(page: Page, files: Path) -> None:
    page.locator("[data-folder]").set_input_files(files)
    page.get_by_role("button", name="Send").click()
    page.get_by_text(re.compile("stored. The list says why")).wait_for()


def main() -> None:
    shutil.rmtree(ALL, ignore_errors=True)
    ALL.mkdir(parents=True)
    chromium = had_by_one_of(
        "chromium",
        lambda: on_this_machine("chromium"),
        lambda: from_debian("chromium", "chromium"),
    )
    with ExitStack() as stack:
        data = temporary_folder(stack)
        day = BusyDay(data, datetime.now(UTC))
        day.fill()
        day.add_troubles()
        day.add_vaes()
        files = data / "study"
        files.mkdir()
        for number in range(1, 5):
            (files / f"IM{number:04}.dcm").write_bytes(new_instance())
        (files / "IM0005.dcm").write_bytes(new_instance()[:-100])
        (files / "README.txt").write_text("no DICOM")
        service = stack.enter_context(running("api", data))
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        take(browser, service, day, files)
        browser.close()
    for name, shown in IN_DOCS.items():
        shutil.copy(ALL / f"{name}.png", ROOT / "docs" / f"{shown}.png")


if __name__ == "__main__":
    main()
