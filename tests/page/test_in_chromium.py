"""The operator's page in Chromium: each flow, for everyone, and against hostile pages."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from answering import Answering, serving
from busy_day import BusyDay
from engines import start_process, temporary_folder
from instances import new_instance
from playwright.sync_api import Page, Route, expect
from service import Service, running, wait_for

from api.auth.basic import user_line
from api.http.routes import Scope
from shared.ids import PayloadIds
from shared.records import State, newest_first

# A program that is installed first is a fixture, and may take minutes.
pytestmark = pytest.mark.timeout(180, func_only=True)

Hospital = tuple[Service, BusyDay]

Visit = Callable[..., Page]
"""As in the fixture of that name."""

VIEWS = ("ui", "ui/payloads", "ui/payloads?state=refused", "ui/vaes", "ui/vaes/MR", "ui/new-vae")
VIEWS_FOR_ALL = (*VIEWS, "ui/send", "ui/help", "ui/vaes/none")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running("run", tmp_path_factory.mktemp("embedded")) as service:
        yield service


def payload_path(day: BusyDay) -> str:
    return f"ui/payloads/{next(iter(day.refusals.outcomes()))[0]}"


# --- For everyone --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Visit, hospital: Hospital, axe: str, scheme: str) -> None:
    service, day = hospital
    page = visit(service.url, color_scheme=scheme, bypass_csp=True)
    for view in (*VIEWS_FOR_ALL, payload_path(day)):
        page.goto(f"{service.url}/{view}")
        for summary in page.locator("details > summary").all()[:2]:
            summary.click()
        page.evaluate(axe)
        # Only the colours differ between light and dark.
        rules = {} if scheme == "light" else {"runOnly": ["color-contrast"]}
        found = page.evaluate("rules => axe.run(rules)", rules)

        serious = [
            (one["id"], [node["html"] for node in one["nodes"]])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert not serious, view


@pytest.mark.parametrize("width", [320, 640, 800, 1040])
def test_nothing_needs_scrolling_to_the_side_on_a_phone_or_with_zoom(
    visit: Visit, hospital: Hospital, width: int
) -> None:
    """A width of 640 is that of a window of 1280 at 200 %, and 320 that at 400 %."""
    service, day = hospital
    page = visit(service.url, viewport={"width": width, "height": 700})
    for view in (*VIEWS_FOR_ALL, payload_path(day)):
        page.goto(f"{service.url}/{view}")
        widest = page.evaluate("document.scrollingElement.scrollWidth")

        assert widest <= width, view


def test_the_keyboard_reaches_the_content_and_every_control(
    visit: Visit, hospital: Hospital
) -> None:
    page = visit(f"{hospital[0].url}/ui/send")

    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    focused = []
    for _ in range(7):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.name || document.activeElement.type"))

    assert focused[:3] == ["destination", "workflow", "requests"]
    assert focused[3:5] == ["file", "file"]


def test_times_are_in_the_zone_of_the_viewer_with_utc_on_hover(
    visit: Visit, hospital: Hospital
) -> None:
    service, day = hospital
    received = day.now - timedelta(minutes=47)

    page = visit(f"{service.url}/{payload_path(day)}", timezone_id="Asia/Tokyo")
    time = page.locator("time").first

    expect(time).to_have_text((received + timedelta(hours=9)).strftime("%Y-%m-%d %H:%M:%S"))
    expect(time).to_have_attribute("title", received.strftime("%Y-%m-%d %H:%M:%S UTC"))


def test_the_page_works_without_a_script(visit: Visit, hospital: Hospital) -> None:
    service, day = hospital
    failed = day.failed(day.now - timedelta(hours=5), "it failed")

    page = visit(f"{service.url}/ui/payloads/{failed.payload_id}", java_script_enabled=False)
    expect(page.locator("time").first).to_have_text(re.compile(" UTC$"))
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_role("status")).to_have_text("Its workflow request will be opened again.")
    page.get_by_role("link", name="Send").click()
    expect(page.get_by_text("This needs JavaScript")).to_be_visible()


# --- Flows ---------------------------------------------------------------------------------------


def test_the_overview_leads_to_what_is_stuck_and_replays_it(
    visit: Visit, hospital: Hospital
) -> None:
    service, day = hospital
    failed = day.failed(day.now - timedelta(seconds=30), "the disk was full")

    page = visit(service.url)
    expect(page.get_by_role("heading", level=1)).to_contain_text("attention")
    trouble = page.locator("#troubles li", has_text=failed.payload_id)
    expect(trouble).to_contain_text("The disk was full.")
    trouble.get_by_role("link", name=failed.payload_id).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(failed.payload_id)
    page.get_by_role("button", name="Replay").click()

    expect(page.locator(".state")).to_have_text("pending")
    assert service.get("/payloads?state=pending").text.count(failed.payload_id) == 1


def test_all_failed_payloads_are_replayed_and_an_id_is_found(
    visit: Visit, hospital: Hospital
) -> None:
    service, day = hospital
    made = [day.failed(day.now - timedelta(days=2, hours=n), "it failed") for n in range(3)]

    page = visit(f"{service.url}/ui/payloads?state=failed")
    page.get_by_text("Replay all failed payloads…").click()
    page.get_by_role("button", name="Replay all").click()
    expect(page.get_by_role("status")).to_contain_text("will be opened again")
    page.get_by_label("Payload id").fill(f" {made[0].payload_id.upper()} ")
    page.get_by_role("button", name="Find").click()

    expect(page.locator(".state")).to_have_text("pending")
    day.failed(day.now - timedelta(hours=3), "it failed")


def test_the_list_is_filtered_and_paged(visit: Visit, hospital: Hospital) -> None:
    page = visit(f"{hospital[0].url}/ui/payloads")
    ids = page.locator("tbody th .id")
    first = ids.all_text_contents()
    page.get_by_role("link", name="Older").click()
    second = ids.all_text_contents()
    page.get_by_role("navigation", name="State").get_by_role("link", name="refused").click()

    assert len(first) == len(second) == 25
    assert not set(first) & set(second)
    expect(page.locator("tbody .state").first).to_have_text("refused")


def test_a_vae_is_added_changed_and_removed(visit: Visit, embedded: Service) -> None:
    page = visit(f"{embedded.url}/ui/vaes")
    page.get_by_role("link", name="Add a VAE").click()
    page.get_by_label("AE title").fill("<b>CT</b>")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("alert")).to_contain_text("an AE title is 1 to 15")
    expect(page.get_by_label("AE title")).to_have_value("<b>CT</b>")

    page.get_by_label("AE title").fill("CHEST")
    page.get_by_label("Workflows").fill("lung-nodules\nliver")
    page.get_by_label("Accepted modalities").fill("CT")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("status")).to_have_text("The VAE was added.")
    page.get_by_label("POSTs per minute").fill("60")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status")).to_contain_text("saved")
    vae = embedded.get("/config/vae/CHEST").json()
    page.get_by_text("Remove this VAE…").click()
    page.get_by_role("button", name="Remove CHEST").click()

    expect(page.get_by_role("status")).to_have_text("CHEST was removed.")
    assert vae["workflows"] == ["lung-nodules", "liver"]
    assert vae["maxRequestsPerMinute"] == 60
    assert embedded.get("/config/vae/CHEST").status_code == 404


def test_hostile_names_from_the_store_are_shown_as_text(visit: Visit, hospital: Hospital) -> None:
    service, day = hospital
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    made = day.record(
        day.now - timedelta(seconds=20),
        State.FAILED,
        source=hostile,
        destination=hostile,
        last_error=hostile,
    )
    day.write(made)

    page = visit(service.url)
    expect(page.locator("#troubles li", has_text=made.payload_id)).to_contain_text(hostile)
    page.goto(f"{service.url}/ui/payloads/{made.payload_id}")
    expect(page.locator("dd").first).to_have_text(hostile)

    assert page.locator("img").count() == 1
    page.get_by_role("button", name="Replay").click()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    (folder / "series").mkdir(parents=True)
    for number in range(3):
        (folder / "series" / f"{number}.dcm").write_bytes(new_instance())
    (folder / "broken.dcm").write_bytes(new_instance()[:-100])
    (folder / "notes.txt").write_text("not DICOM")
    return folder


def test_a_folder_is_sent_and_each_file_has_its_fate(
    visit: Visit, embedded: Service, study: Path
) -> None:
    page = visit(f"{embedded.url}/ui/send")
    page.locator("[data-folder]").set_input_files(study)
    expect(page.locator("[data-status]")).to_contain_text("4 files to send")
    expect(page.locator("[data-status]")).to_contain_text("1 other file left out")
    page.get_by_role("button", name="Send").click()

    expect(page.locator("[data-result]")).to_contain_text("3 files of 4 stored")
    expect(page.locator("tr", has_text="broken.dcm")).to_contain_text("not stored: ")
    expect(page.locator("tr", has_text="notes.txt")).to_contain_text("left out")
    stored = page.locator("tr", has_text="series/0.dcm")
    expect(stored).to_contain_text("stored, payload")
    stored.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Payload")
    payload_id = page.url.rpartition("/")[2]
    assert embedded.opened(payload_id)["file_count"] == 3


DROP = """bytes => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "dropped.dcm"));
  const event = new DragEvent("drop", { dataTransfer: data, cancelable: true });
  document.querySelector("[data-drop]").dispatchEvent(event);
}"""


def test_a_dropped_file_is_sent(visit: Visit, embedded: Service) -> None:
    page = visit(f"{embedded.url}/ui/send")
    page.evaluate(DROP, list(new_instance()))
    expect(page.locator("[data-status]")).to_contain_text("1 file to send")
    page.get_by_role("button", name="Send").click()

    expect(page.locator("tr", has_text="dropped.dcm")).to_contain_text("stored")


def test_files_are_sent_one_by_one_to_a_vae(visit: Visit, embedded: Service, study: Path) -> None:
    embedded.post("/config/vae", b'{"virtualAeTitle": "EACH"}', "application/json")

    page = visit(f"{embedded.url}/ui/send")
    page.get_by_label("Destination").select_option("EACH")
    page.get_by_label("Workflow", exact=False).first.fill("w-1")
    page.get_by_label("one for each file").check()
    page.locator("[data-files]").set_input_files(sorted((study / "series").iterdir()))
    page.get_by_role("button", name="Send").click()

    expect(page.locator("[data-result]")).to_have_text("All 3 files stored.")
    links = page.locator(".sent a")
    ids = {link.get_attribute("href") for link in links.all()}
    assert len(ids) == 3
    shown = embedded.opened(str(ids.pop()).rpartition("/")[2])
    assert (shown["destination"], shown["workflows"]) == ("EACH", ["w-1"])


def test_a_lost_connection_is_reported_and_the_retry_opens_nothing_twice(
    visit: Visit, embedded: Service, study: Path
) -> None:
    page = visit(f"{embedded.url}/ui/send")
    page.locator("[data-files]").set_input_files(sorted((study / "series").iterdir()))
    page.route("**/dicomweb/studies", lambda route: (route.fetch(), route.abort()))
    page.get_by_role("button", name="Send").click()
    expect(page.locator("[data-result]")).to_contain_text("0 files of 3 stored")
    before = len(embedded.get("/payloads?limit=200").json()["payloads"])
    page.unroute("**/dicomweb/studies")
    page.get_by_role("button", name="Send again what was not stored").click()

    expect(page.locator("[data-result]")).to_have_text("All 3 files stored.")
    assert len(embedded.get("/payloads?limit=200").json()["payloads"]) == before


def test_a_busy_service_gets_the_files_again_when_it_said(
    visit: Visit, embedded: Service, study: Path
) -> None:
    page = visit(f"{embedded.url}/ui/send")
    page.locator("[data-files]").set_input_files(sorted((study / "series").iterdir())[:1])
    keys: list[str | None] = []

    def busy_at_first(route: Route) -> None:
        keys.append(route.request.header_value("Idempotency-Key"))
        if len(keys) == 1:
            route.fulfill(status=503, headers={"Retry-After": "2"}, json={"detail": "busy"})
        else:
            route.continue_()

    page.route("**/dicomweb/studies", busy_at_first)
    page.get_by_role("button", name="Send").click()

    expect(page.locator(".sent .fate")).to_have_text("the service is busy; sent again in 2 s")
    expect(page.locator("[data-result]")).to_have_text("All 1 file stored.")
    assert keys == [keys[0]] * 2


def test_files_that_are_chosen_during_a_send_wait_for_its_end(
    visit: Visit, embedded: Service, study: Path
) -> None:
    page = visit(f"{embedded.url}/ui/send")
    held: list[Route] = []
    page.route("**/dicomweb/studies", lambda route: held.append(route))
    files = sorted((study / "series").iterdir())
    page.locator("[data-files]").set_input_files(files[:2])
    page.locator("[data-send]").click()
    expect(page.locator("[data-progress]")).to_be_visible()

    page.locator("[data-files]").set_input_files(files[2:])
    expect(page.locator(".sent tbody tr")).to_have_count(3)
    expect(page.locator("[data-send]")).to_be_disabled()
    expect(page.locator("[data-clear]")).to_be_hidden()
    held.pop().continue_()

    expect(page.locator("[data-result]")).to_have_text("All 2 files stored.")
    page.unroute("**/dicomweb/studies")
    page.locator("[data-send]").click()
    expect(page.locator("[data-result]")).to_have_text("All 1 file stored.")


def test_figures_are_live_and_what_would_move_others_waits(
    visit: Visit, hospital: Hospital
) -> None:
    service, day = hospital
    page = visit("about:blank")
    page.clock.install()
    page.goto(service.url)
    figure = page.locator(".tile .figure").first
    before = int(figure.inner_text().replace(",", ""))

    day.opened(datetime.now(UTC), 0.1)
    page.clock.run_for(16_000)
    expect(figure).to_have_text(f"{before + 1:,}")

    page.get_by_role("button", name="Pause").click()
    day.opened(datetime.now(UTC), 0.1)
    page.clock.run_for(60_000)
    expect(figure).to_have_text(f"{before + 1:,}")

    page.get_by_role("button", name="Resume").click()
    troubles = page.locator("#troubles li").count()
    failed = day.failed(datetime.now(UTC), "it failed")
    page.clock.run_for(16_000)
    expect(page.get_by_role("button", name="Show")).to_be_visible()
    assert page.locator("#troubles li").count() == troubles
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#troubles")).to_contain_text(failed.payload_id)


def test_a_refresh_puts_no_other_payload_under_a_button(visit: Visit, tmp_path: Path) -> None:
    day = BusyDay(tmp_path, datetime.now(UTC))
    for minutes in range(1, 7):
        day.failed(day.now - timedelta(minutes=minutes), "it failed")
    with running("api", tmp_path) as service:
        page = visit("about:blank")
        page.clock.install()
        page.goto(service.url)
        replay = page.locator("#troubles form").first
        action = replay.get_attribute("action")

        day.failed(datetime.now(UTC), "it failed")
        page.clock.run_for(16_000)

        expect(page.get_by_role("button", name="Show")).to_be_visible()
        assert replay.get_attribute("action") == action


def test_the_code_for_senders_has_the_address_in_the_browser(
    visit: Visit, hospital: Hospital
) -> None:
    url = hospital[0].url.replace("127.0.0.1", "localhost")

    page = visit(f"{url}/ui/help")
    page.get_by_text("stowgate send", exact=True).click()

    expect(page.locator(".code").first).to_contain_text(f"{url}/dicomweb/studies")
    expect(page.get_by_text(f"--url {url}").first).to_be_visible()


# --- Login and other origins ---------------------------------------------------------------------

PASSWORD = {"username": "operator", "password": "correct horse"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data = tmp_path_factory.mktemp("guarded")
    lines = [
        user_line("operator", list(Scope), PASSWORD["password"]),
        user_line("reader", [Scope.READ], PASSWORD["password"]),
    ]
    (data / "users").write_text("\n".join(lines))
    BusyDay(data, datetime.now(UTC)).add_vaes()
    with running("run", data, STOWGATE_AUTH="basic", STOWGATE_USERS=str(data / "users")) as service:
        yield service


def test_a_login_shows_the_page_and_sends(visit: Visit, guarded: Service, study: Path) -> None:
    page = visit(f"{guarded.url}/ui/send", http_credentials=PASSWORD)
    expect(page.locator(".caller")).to_contain_text("operator")
    page.locator("[data-files]").set_input_files(study / "series" / "0.dcm")
    page.get_by_role("button", name="Send").click()

    expect(page.locator("[data-result]")).to_have_text("All 1 file stored.")
    # Not sent without the password first.
    assert 'stowgate_posts_total{status="401"}' not in guarded.get("/metrics").text


def test_a_reader_is_offered_no_change(visit: Visit, guarded: Service) -> None:
    page = visit(f"{guarded.url}/ui/vaes/CT", http_credentials={**PASSWORD, "username": "reader"})

    expect(page.get_by_label("Workflows")).to_be_disabled()
    assert page.get_by_role("button").count() == 0
    page.get_by_role("link", name="Send").click()
    expect(page.get_by_text("you need the scope store")).to_be_visible()


FORM = """<!doctype html>
<form method="post" action="TARGET"></form>
<script>document.forms[0].submit();</script>
"""


@contextmanager
def other_site(target: str) -> Iterator[str]:
    """A page that sends a form to `target` at once; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(FORM.replace("TARGET", target).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_form_of_another_origin_cannot_use_the_remembered_password(
    visit: Visit, guarded: Service, host: str
) -> None:
    url = guarded.url
    page = visit(f"{url}/ui/vaes", http_credentials=PASSWORD)
    with (
        other_site(f"{url}/ui/vaes/CT/remove") as evil,
        page.expect_response("**/ui/vaes/CT/remove") as answered,
    ):
        page.goto(evil.replace("127.0.0.1", host))

    # The browser has sent the password, which would have been 401 otherwise.
    assert answered.value.status == 403
    assert answered.value.request.all_headers()["authorization"].startswith("Basic ")
    page.goto(f"{url}/ui/vaes/CT")
    expect(page.get_by_role("heading", level=1)).to_contain_text("CT")


# --- Around the page -----------------------------------------------------------------------------


def test_the_overview_of_100_000_records_says_what_it_covers(visit: Visit, tmp_path: Path) -> None:
    day = BusyDay(tmp_path, datetime.now(UTC))
    ids = PayloadIds("stowgate")
    day.opened(day.now, 0.5)
    folder = tmp_path / "stowgate" / "opened"
    sample = next(folder.iterdir())
    for number in range(100_000):
        name = newest_first(ids.mint(day.now - timedelta(seconds=number // 4 + 5)))
        if number % 50_000 == 0:
            sample = folder / f"../sample{number}"
            sample.write_bytes(b"{}")
        (folder / name).hardlink_to(sample)

    with running("api", tmp_path) as service:
        page = visit(service.url)

        expect(page.locator(".tile .figure").first).to_have_text("≥ 1,000")
        expect(page.locator("#notes")).to_contain_text("cover the newest 1,000 payloads")
        expect(page.locator(".hatch").first).to_be_attached()


def test_the_page_says_that_the_object_store_is_away(visit: Visit, tmp_path: Path) -> None:
    with running(
        "api",
        tmp_path,
        STOWGATE_OBJECT_STORE="http://127.0.0.1:9",
        STOWGATE_OBJECT_STORE_ACCESS_KEY="key",
        STOWGATE_OBJECT_STORE_SECRET_KEY="secret",
    ) as service:
        page = visit(service.url)
        expect(page.get_by_role("heading", level=1)).to_have_text("Uploads are refused")
        expect(page.locator("#engines .dot.down").first).to_be_visible()
        page.get_by_role("link", name="Payloads").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Service Unavailable")
        page.get_by_role("link", name="Help").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Connect a sender")


STACK_NGINX = Path(__file__).resolve().parents[2] / "deploy" / "nginx.conf"

NGINX = """
daemon off;
pid FOLDER/pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path FOLDER/body;
    proxy_temp_path FOLDER/proxy;
    fastcgi_temp_path FOLDER/fastcgi;
    uwsgi_temp_path FOLDER/uwsgi;
    scgi_temp_path FOLDER/scgi;
    server {
        listen 127.0.0.1:PORT;
        client_max_body_size 0;
        proxy_request_buffering off;
        location / { return 200 "another service"; }
        location /site/stow { proxy_pass http://API; HEADERS }
        location /strips/ { proxy_pass http://API/; HEADERS }
    }
}
"""
NGINX_HEADERS = "proxy_set_header Host $http_host;"


@pytest.mark.parametrize(
    ("prefix", "forwards_host"),
    [("/site/stow", False), ("/strips", True), ("", True)],
    ids=[
        "keeps the prefix, and has a public URL",
        "removes the prefix, and forwards Host",
        "that of the compose stack",
    ],
)
def test_the_page_works_behind_nginx_below_a_path(
    visit: Visit, nginx: Path, study: Path, tmp_path: Path, prefix: str, forwards_host: bool
) -> None:
    with serving(Answering) as taken:
        port = urlsplit(taken).port
    public = {} if forwards_host else {"STOWGATE_PUBLIC_URL": f"http://127.0.0.1:{port}{prefix}"}
    with ExitStack() as stack:
        service = stack.enter_context(running("run", tmp_path, **public))
        folder = temporary_folder(stack)
        configuration = _nginx(
            folder, port, urlsplit(service.url).netloc, has_prefix=bool(prefix), host=forwards_host
        )
        (folder / "nginx.conf").write_text(configuration)
        start_process([str(nginx), "-c", str(folder / "nginx.conf")], {}, folder, stack)
        site = f"http://127.0.0.1:{port}"
        wait_for(lambda: _answers(site))

        page = visit(f"{site}{prefix}/ui")
        page.get_by_role("link", name="VAEs").click()
        page.get_by_role("link", name="Add a VAE").click()
        page.get_by_label("AE title").fill("BEHIND")
        page.get_by_role("button", name="Add").click()
        expect(page.get_by_role("status")).to_have_text("The VAE was added.")
        page.get_by_role("link", name="Send").click()
        page.locator("[data-files]").set_input_files(study / "series" / "0.dcm")
        page.get_by_role("button", name="Send").click()
        page.locator(".sent a").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("Payload")
        page.get_by_role("link", name="Help").click()
        address = f"{site}{prefix}/dicomweb/studies"
        expect(page.locator(".code").first).to_contain_text(address)

        assert page.url.startswith(f"{site}{prefix}/ui/")


def _nginx(folder: Path, port: int | None, api: str, *, has_prefix: bool, host: bool) -> str:
    if has_prefix:
        text = NGINX.replace("HEADERS", NGINX_HEADERS if host else "")
        changes = {"FOLDER": str(folder), "PORT": str(port), "API": api}
    else:
        text = STACK_NGINX.read_text()
        changes = {
            "listen 80;": f"listen 127.0.0.1:{port};",
            "api:8080": api,
            "/tmp": str(folder),
            "worker_processes auto;": "worker_processes 1; daemon off;",
        }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False
