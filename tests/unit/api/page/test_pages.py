"""The operator's page without a browser: markup, headers, permission, forms."""

import base64
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from answering import Answering, serving
from busy_day import BusyDay
from flask.testing import FlaskClient
from observed_store import CALLS, Hook, ObservedStore
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs
from werkzeug.test import TestResponse

from api.auth.basic import user_line
from api.http.routes import PAGE_ROUTES, Scope
from api.main import compose
from api.page.activity import MAX_REQUESTS, Activity
from api.page.views import PAGE_PAYLOADS
from api.settings import ApiSettings
from shared.errors import StoreUnavailable
from shared.ports import ObjectStore
from shared.record_store import Records
from shared.records import State
from shared.refusals import PayloadState, RefusalReason
from shared.runtime.backends import open_backends
from shared.settings.loader import load

OWN = {"Origin": "http://localhost"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
NOW = datetime.now(UTC)
PINGS = 2


@dataclass
class Page:
    """The page over a folder store, and the requests that its calls would be to an S3 store."""

    client: FlaskClient
    day: BusyDay
    calls: Counter[str]
    hooks: dict[str, Hook]
    instances: ObjectStore

    def get(self, path: str, **headers: str) -> TestResponse:
        return self.client.get(path, headers={"Accept": "text/html", **headers})

    def post(self, path: str, data: dict[str, str] | None = None, **headers: str) -> TestResponse:
        given = {"Accept": "text/html", **OWN, **headers}
        return self.client.post(path, data=data, headers=given)

    def instance_of(self, payload_id: str) -> None:
        """Without an object in the store, a refused payload cannot be replayed."""
        self.instances.create(f"{payload_id}/dcm/1/2/3.dcm", b"DICM", "application/dicom")


Open = Callable[..., Page]


@pytest.fixture
def open_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    def open_page(**given: str) -> Page:
        for name, value in {"STOWGATE_DATA": str(tmp_path), **given}.items():
            monkeypatch.setenv(name, value)
        settings = load(ApiSettings)
        day = BusyDay(tmp_path, NOW)
        calls: Counter[str] = Counter()
        names: Counter[str] = Counter()
        hooks: dict[str, Hook] = {}

        def count(call: str) -> Hook:
            def hook(key: str) -> None:
                calls[call] += 1
                if call == "list":
                    names[key.partition("/")[0]] = 0
                if call in hooks:
                    hooks[call](key)

            return hook

        def count_name(key: str) -> None:
            place = key.partition("/")[0]
            if names[place] and names[place] % 1000 == 0:
                calls["list"] += 1
            names[place] += 1

        backends = open_backends(settings, store_threads=4)
        backends.instances.prepare()
        observed = {call: count(call) for call in CALLS}
        backends = replace(
            backends,
            state=ObservedStore(backends.state, before=observed, after={"list": count_name}),
            instances=ObservedStore(backends.instances, before=observed),
        )
        app = compose(settings, backends, CollectorRegistry())
        return Page(app.test_client(), day, calls, hooks, backends.instances)

    return open_page


@pytest.fixture
def page(open_page: Open) -> Page:
    return open_page()


class Markup(HTMLParser):
    """Collects the elements of a page, with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def attributes(self, name: str) -> list[str]:
        return [found[name] or "" for _, found in self.elements if name in found]


def paths_of(page: Page) -> Iterator[str]:
    """The path of every view of the page, with ids and names that exist."""
    page.day.add_vaes()
    failed = page.day.failed(NOW - timedelta(minutes=3), "it failed")
    for route in PAGE_ROUTES:
        if route.method == "GET" and route.endpoint != "page.static":
            path = route.path.replace("<payload_id>", failed.payload_id)
            yield path.replace("<name>", "CT")


def test_each_view_has_headers_that_keep_out_scripts_and_frames(page: Page) -> None:
    for path in paths_of(page):
        answer = page.get(path)

        assert answer.status_code == 200, path
        assert answer.content_type == "text/html; charset=utf-8"
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Set-Cookie" not in answer.headers


def test_no_view_has_inline_code_and_all_its_links_are_relative(page: Page) -> None:
    for path in paths_of(page):
        markup = Markup(page.get(path).text)

        for tag, attributes in markup.elements:
            assert "style" not in attributes, path
            assert not [name for name in attributes if name.startswith("on")], path
            assert tag != "style"
            assert tag != "script" or attributes.get("src"), path
        for name in ("href", "src", "action", "data-store", "data-payload"):
            links = markup.attributes(name)
            assert not [link for link in links if re.match("/|[a-z]+:", link)], path


def test_the_links_of_a_view_lead_to_views(page: Page) -> None:
    page.day.add_troubles()
    for path in paths_of(page):
        for target in Markup(page.get(path).text).attributes("href"):
            if target.startswith("#") or "ui" not in target.split("/"):
                continue
            steps = path.rpartition("/")[0].split("/")
            while target.startswith("../"):
                target, steps = target.removeprefix("../"), steps[:-1]
            assert page.get("/".join([*steps, target])).status_code == 200, (path, target)


def test_the_overview_is_also_served_with_a_slash_at_the_end(page: Page) -> None:
    answer = page.get("/ui/")

    assert answer.status_code == 200
    assert 'href="../ui/static/page.css' in answer.text


def test_hostile_values_in_a_record_do_not_become_markup(page: Page) -> None:
    changes = {
        "source": HOSTILE,
        "destination": HOSTILE,
        "workflows": (HOSTILE,),
        "route": HOSTILE,
        "last_error": HOSTILE,
    }
    made = page.day.record(NOW - timedelta(minutes=1), State.FAILED, **changes)
    page.day.write(made)

    for path in ("/ui", "/ui/payloads", f"/ui/payloads/{made.payload_id}"):
        answer = page.get(path)

        assert answer.status_code == 200
        assert "&lt;script&gt;alert(1)" in answer.text
        assert not [t for t, a in Markup(answer.text).elements if "onerror" in a or t == "img-x"]
        assert "<script>alert" not in answer.text
        assert "<img src=x" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/?span={}",
        "/ui/payloads?id={}",
        "/ui/payloads?state={}",
        "/ui/payloads?cursor={}",
        "/ui/payloads?replayed={}&not_replayed={}&more={}",
        "/ui/payloads/{}",
        "/ui/vaes?removed={}",
        "/ui/vaes/{}",
        "/ui/static/{}",
        "/ui/nothing/{}",
    ],
)
def test_hostile_values_in_a_url_are_not_repeated(page: Page, path: str) -> None:
    answer = page.get(path.replace("{}", "%3Cscript%3Ealert(1)"))

    assert answer.status_code in (200, 400, 404)
    assert "alert(1)" not in answer.text


@pytest.mark.parametrize("path", ["/ui/vaes/{}", "/ui/vaes/{}/remove"])
def test_a_name_that_is_not_valid_is_neither_repeated_nor_logged(page: Page, path: str) -> None:
    with capture_logs() as lines:
        answer = page.post(path.replace("{}", "DOE%5EJANE"), {"workflows": ""})

    assert answer.status_code == 404
    assert "JANE" not in answer.text
    assert "JANE" not in repr(lines)


def test_hostile_values_in_a_form_do_not_become_markup(page: Page) -> None:
    answer = page.post("/ui/new-vae", {"virtualAeTitle": HOSTILE, "workflows": HOSTILE})

    assert answer.status_code == 400
    assert "&lt;script&gt;alert(1)" in answer.text
    assert "<script>alert" not in answer.text
    assert "<img src=x" not in answer.text


class HostileWorkflowManager(Answering):
    """Answers with names that are valid there, and markup here."""

    def do_GET(self) -> None:
        instance = {
            "id": "4d3c2b1a-0000-4000-8000-000000000001",
            "workflow_id": "w-1",
            "workflow_name": HOSTILE,
            "status": "Failed",
            "input_metadata": {"patient": "DOE^JANE"},
            "tasks": [{"task_id": "segment", "task_type": HOSTILE, "status": "Failed"}],
        }
        self.answer(200, json.dumps([instance]).encode())


def test_the_progress_in_the_workflow_manager_is_shown_as_text(open_page: Open) -> None:
    with serving(HostileWorkflowManager) as url:
        page = open_page(STOWGATE_WORKFLOW_MANAGER_URL=url)
        made = page.day.opened(NOW, 0.5)
        text = page.get(f"/ui/payloads/{made.payload_id}").text

    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text
    assert '<th scope="row">segment</th>' in text
    assert "DOE" not in text


def test_a_silent_workflow_manager_is_reported(open_page: Open) -> None:
    page = open_page(STOWGATE_WORKFLOW_MANAGER_URL="http://127.0.0.1:9")
    made = page.day.opened(NOW, 0.5)

    answer = page.get(f"/ui/payloads/{made.payload_id}")

    assert answer.status_code == 200
    assert "The Workflow Manager at http://127.0.0.1:9" in answer.text


def test_views_of_a_silent_store_block_four_threads_at_most(page: Page) -> None:
    goes_on = threading.Event()
    entered = threading.Semaphore(0)

    def hold(_: str) -> None:
        entered.release()
        goes_on.wait(60)

    page.hooks["list"] = hold
    with ThreadPoolExecutor(5) as pool, ExitStack() as stack:
        stack.callback(goes_on.set)
        held = [pool.submit(page.get, "/ui/payloads") for _ in range(4)]
        for _ in held:
            assert entered.acquire(timeout=30)
        refused = pool.submit(page.get, "/ui/payloads").result(30)
        goes_on.set()

        assert [one.result(60).status_code for one in held] == [200] * 4
    assert refused.status_code == 429
    assert refused.headers["Retry-After"]
    assert "try again" in refused.text


def test_the_number_of_store_requests_does_not_depend_on_the_number_of_records(page: Page) -> None:
    for number in range(1200):
        page.day.opened(NOW - timedelta(minutes=20, milliseconds=number), 0.5)
    for number in range(30):
        page.day.failed(NOW - timedelta(minutes=30, seconds=number), "it failed")
        page.day.refused(NOW - timedelta(minutes=40, seconds=number), RefusalReason.REJECTED)
        page.day.write(page.day.record(NOW - timedelta(minutes=50), State.PENDING))
    for number in range(1500):
        page.day.replayed(NOW - timedelta(hours=1, seconds=number))
    page.calls.clear()

    first = page.get("/ui?span=1h")
    requests = page.calls.copy()

    assert "The figures cover the newest 1,000 payloads" in first.text
    assert requests["list"] == 6
    assert requests.total() - requests["check_room"] == MAX_REQUESTS + PINGS
    assert requests.total() - requests["check_room"] <= 130


def test_a_later_view_reads_only_what_is_new(page: Page) -> None:
    for number in range(40):
        page.day.opened(NOW - timedelta(minutes=number), 0.5)
    page.get("/ui?span=1h")
    page.day.opened(NOW, 0.5)
    page.calls.clear()

    page.get("/ui?span=1h")

    assert page.calls["get"] == 1


@pytest.mark.parametrize(
    ("state", "listings"),
    [("", 6), ("opened", 4), ("pending", 1 + 1 + 3 * PAGE_PAYLOADS), ("failed", 1), ("refused", 3)],
)
def test_a_list_takes_a_bounded_number_of_requests(page: Page, state: str, listings: int) -> None:
    for number in range(60):
        page.day.failed(NOW - timedelta(minutes=number), "it failed")
        page.day.opened(NOW - timedelta(minutes=number), 0.5)
        page.day.refused(NOW - timedelta(minutes=number), RefusalReason.REJECTED)
        page.day.write(page.day.record(NOW - timedelta(minutes=number), State.PENDING))
    for number in range(2500):
        page.day.replayed(NOW - timedelta(seconds=number))
    for number in range(60):
        waiting = page.day.refused(NOW - timedelta(minutes=number), RefusalReason.REJECTED)
        page.day.refusals.request_replay(waiting.payload_id, 1, NOW)
    page.calls.clear()

    answer = page.get(f"/ui/payloads?state={state}" if state else "/ui/payloads")

    assert 0 < answer.text.count('scope="row"') <= PAGE_PAYLOADS
    assert page.calls["list"] <= listings
    assert page.calls["get"] <= 4 * (PAGE_PAYLOADS + 1)


def test_a_list_continues_behind_many_payloads_of_another_state(page: Page) -> None:
    refused = page.day.refused(NOW - timedelta(days=1), RefusalReason.REJECTED)
    for number in range(1500):
        page.day.replayed(NOW - timedelta(seconds=number))
    shown, link = [], "/ui/payloads?state=refused"

    while link:
        text = page.get(link).text
        shown.append(refused.payload_id in text)
        older = re.search('rel="next" href="[^"]*(/ui/payloads[^"]*)"', text)
        link = unescape(older[1]) if older else ""

    assert shown == [False, True]
    assert "None of the newest is refused" in page.get("/ui/payloads?state=refused").text


def test_figures_of_payloads_whose_refusals_were_not_listed_are_not_shown(page: Page) -> None:
    old = page.day.refused(NOW - timedelta(hours=2), RefusalReason.REJECTED)
    for number in range(1000):
        page.day.replayed(NOW - timedelta(hours=1, seconds=number))

    posts = Activity(Records(page.day.store), page.day.refusals).read(NOW).posts

    assert old.payload_id not in [post.payload_id for post in posts]


def test_a_payload_takes_a_handful_of_store_requests(page: Page) -> None:
    made = page.day.refused(NOW, RefusalReason.REJECTED)
    page.calls.clear()

    page.get(f"/ui/payloads/{made.payload_id}")

    assert page.calls.total() <= 8


def test_the_overview_says_that_the_store_is_away(page: Page) -> None:
    def fail(_: str) -> None:
        raise StoreUnavailable("the object store at s3.example does not answer")

    page.hooks["ping"] = fail

    answer = page.get("/")

    assert answer.status_code == 200
    assert "Uploads are refused" in answer.text
    assert "s3.example does not answer" in answer.text
    assert page.calls["list"] == 0


def test_the_overview_says_that_the_store_cannot_be_read(page: Page) -> None:
    def fail(_: str) -> None:
        raise StoreUnavailable("the object store at s3.example does not answer")

    page.hooks["list"] = fail

    answer = page.get("/")

    assert answer.status_code == 200
    assert "The object store could not be read" in answer.text


def test_a_list_says_in_html_that_the_store_is_away(page: Page) -> None:
    def fail(_: str) -> None:
        raise StoreUnavailable("the object store at s3.example does not answer")

    page.hooks["list"] = fail

    answer = page.get("/ui/payloads")

    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert answer.content_type == "text/html; charset=utf-8"
    assert "s3.example does not answer" in answer.text


def test_an_error_stays_json_for_a_client_that_prefers_it(page: Page) -> None:
    answer = page.get("/ui/vaes/NONE", Accept="application/json")

    assert answer.status_code == 404
    assert answer.content_type == "application/problem+json"


def test_a_setting_turns_the_page_off(open_page: Open) -> None:
    page = open_page(STOWGATE_PAGE="false")

    for path in paths_of(page):
        answer = page.get(path)
        assert answer.status_code == 404, path
        assert answer.content_type == "application/problem+json"
    assert page.get("/ui/static/page.css").status_code == 404
    assert page.get("/payloads").status_code == 200


# --- Permission ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    users = {
        "reader": [Scope.READ],
        "sender": [Scope.STORE],
        "operator": [Scope.READ, Scope.ADMIN, Scope.STORE],
    }
    file = tmp_path_factory.mktemp("users") / "users"
    lines = [user_line(name, scopes, "password") for name, scopes in users.items()]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def guarded(open_page: Open, users: Path) -> Page:
    return open_page(STOWGATE_AUTH="basic", STOWGATE_USERS=str(users))


def basic(name: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:password".encode()).decode()}


def test_a_browser_without_a_login_is_asked_for_one(guarded: Page) -> None:
    answer = guarded.get("/")

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert "user name and password" in answer.text
    assert 'aria-label="Pages"' not in answer.text


def test_a_reader_sees_no_form_that_changes(guarded: Page) -> None:
    guarded.day.add_troubles()
    for path in paths_of(guarded):
        answer = guarded.get(path, **basic("reader"))
        if path == "/ui/new-vae":
            assert answer.status_code == 403
            continue
        posts = [a for t, a in Markup(answer.text).elements if a.get("method") == "post"]
        assert answer.status_code == 200
        assert "reader" in answer.text
        assert not posts or "disabled" in answer.text, path
        assert 'id="send"' not in answer.text


def test_an_operator_sees_the_forms(guarded: Page) -> None:
    made = guarded.day.failed(NOW, "it failed")

    assert "Replay" in guarded.get(f"/ui/payloads/{made.payload_id}", **basic("operator")).text
    assert 'id="send"' in guarded.get("/ui/send", **basic("operator")).text


def test_a_sender_without_the_scope_read_does_not_see_the_page(guarded: Page) -> None:
    answer = guarded.get("/", **basic("sender"))

    assert answer.status_code == 403
    assert "read" in answer.text


def test_a_change_needs_the_scope_admin(guarded: Page) -> None:
    guarded.day.add_vaes()
    made = guarded.day.failed(NOW, "it failed")
    changes = [route for route in PAGE_ROUTES if route.method == "POST"]
    callers: list[tuple[int, dict[str, str]]] = [
        (401, {}),
        (403, basic("reader")),
        (403, basic("sender")),
    ]

    for route in changes:
        path = route.path.replace("<payload_id>", made.payload_id).replace("<name>", "CT")
        for status, headers in callers:
            given = {**OWN, **headers}
            answer = guarded.client.post(path.replace("<state>", "failed"), headers=given)
            assert answer.status_code == status, path

    assert len(changes) == 5
    assert guarded.get("/ui/vaes/CT", **basic("reader")).status_code == 200
    assert list(guarded.day.store.list("pending/")) == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:81"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "https://viewer.example"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
    ],
)
def test_a_form_of_another_origin_changes_nothing(open_page: Open, headers: dict[str, str]) -> None:
    page = open_page(STOWGATE_CORS_ORIGINS="https://viewer.example")
    page.day.add_vaes()

    answer = page.client.post("/ui/vaes/CT/remove", headers={**OWN, **headers})

    assert answer.status_code == 403
    assert "was not sent by this page" in answer.text
    assert page.get("/ui/vaes/CT").status_code == 200


@pytest.mark.parametrize("path", ["/ui/vaes/CT/remove", "/payloads/none/replay"])
def test_a_sandboxed_page_changes_nothing_at_a_host_with_an_underscore(
    open_page: Open, path: str
) -> None:
    """Without TLS, browsers send no Sec-Fetch-Site."""
    page = open_page(STOWGATE_ALLOW_ANYONE="true")
    page.day.add_vaes()

    answer = page.client.post(path, headers={"Origin": "null", "Host": "pacs_server"})

    assert answer.status_code == 403


def test_a_form_of_a_host_with_an_underscore_changes(open_page: Open) -> None:
    page = open_page(STOWGATE_ALLOW_ANYONE="true")
    page.day.add_vaes()

    origin = {"Origin": "http://pacs_server:8080", "Host": "pacs_server:8080"}
    answer = page.client.post("/ui/vaes/CT/remove", headers=origin)

    assert answer.status_code == 303


def test_a_form_without_an_origin_changes_nothing(page: Page) -> None:
    page.day.add_vaes()

    assert page.client.post("/ui/vaes/CT/remove").status_code == 403


@pytest.mark.parametrize("origin", ["http://localhost", "https://pacs.example", "http://LOCALHOST"])
def test_a_form_of_this_page_or_of_the_public_url_changes(open_page: Open, origin: str) -> None:
    page = open_page(STOWGATE_PUBLIC_URL="https://pacs.example:443/stow")
    page.day.add_vaes()

    answer = page.post("/ui/vaes/CT/remove", Origin=origin.lower())

    assert answer.status_code == 303


# --- Changes -------------------------------------------------------------------------------------


def test_replay_returns_a_failed_payload_to_pending(page: Page) -> None:
    made = page.day.failed(NOW, "it failed")

    answer = page.post(f"/ui/payloads/{made.payload_id}/replay")
    shown = page.get(f"/ui/payloads/{made.payload_id}?replayed=1")

    assert answer.status_code == 303
    assert answer.headers["Location"] == f"../../../ui/payloads/{made.payload_id}?replayed=1"
    assert '<span class="state pending">' in shown.text
    assert "will be opened again" in shown.text


def test_a_replay_of_an_opened_payload_is_refused_with_the_reason(page: Page) -> None:
    made = page.day.opened(NOW, 0.5)

    answer = page.post(f"/ui/payloads/{made.payload_id}/replay")

    assert answer.status_code == 409
    assert "only failed or refused payloads can be replayed" in answer.text


@pytest.mark.parametrize("state", ["failed", "refused"])
def test_replay_of_all_counts_what_was_replayed(page: Page, state: str) -> None:
    for number in range(3):
        at = NOW - timedelta(minutes=number)
        page.day.failed(at, "it failed")
        made = page.day.refused(at, RefusalReason.REJECTED)
        if number:
            page.instance_of(made.payload_id)

    answer = page.post(f"/ui/replay/{state}")

    done = "replayed=3&not_replayed=0" if state == "failed" else "replayed=2&not_replayed=1"
    assert answer.headers["Location"] == f"../../ui/payloads?state={state}&{done}"
    assert (
        "1 payload could not be replayed"
        in page.get("/ui/payloads?state=refused&replayed=2&not_replayed=1").text
    )


def test_replay_of_all_continues_at_the_older_ones(page: Page) -> None:
    for number in range(101):
        page.day.failed(NOW - timedelta(seconds=number), "it failed")

    first = page.post("/ui/replay/failed")
    more = re.search("more=([0-9a-f-]+)", first.headers["Location"])
    assert more
    shown = page.get(f"/ui/payloads?state=failed&replayed=100&not_replayed=0&more={more[1]}")
    second = page.post(f"/ui/replay/failed?cursor={more[1]}")

    assert "replayed=100" in first.headers["Location"]
    assert "Continue with the older ones" in shown.text
    assert "replayed=1&" in second.headers["Location"]


@pytest.mark.parametrize("state", [PayloadState.OPENED, PayloadState.PENDING, "lost"])
def test_replay_of_all_is_refused_for_other_states(page: Page, state: str) -> None:
    assert page.post(f"/ui/replay/{state}").status_code == 400


def test_a_vae_is_added_changed_and_removed(page: Page) -> None:
    form = {
        "virtualAeTitle": "CT2",
        "workflows": "lung-nodules\r\nliver\r\n",
        "acceptedModalities": "CT, PT",
        "maxInstanceBytes": "1000000",
        "source": "",
    }
    added = page.post("/ui/new-vae", form)
    shown = page.get("/ui/vaes/CT2")
    changed = page.post("/ui/vaes/CT2", {**form, "workflows": "", "maxRequestsPerMinute": "5"})
    vae = page.client.get("/config/vae/CT2").json
    removed = page.post("/ui/vaes/CT2/remove")

    assert (added.status_code, added.headers["Location"]) == (303, "../ui/vaes/CT2?done=added")
    assert "lung-nodules\nliver" in shown.text
    assert changed.status_code == 303
    assert vae is not None
    assert vae["workflows"] == []
    assert vae["acceptedModalities"] == ["CT", "PT"]
    assert vae["maxInstanceBytes"] == 1_000_000
    assert vae["maxRequestsPerMinute"] == 5
    assert removed.headers["Location"] == "../../../ui/vaes?removed=CT2"
    assert page.get("/ui/vaes/CT2").status_code == 404


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("virtualAeTitle", "", "an AE title is 1 to 15"),
        ("virtualAeTitle", "x" * 16, "an AE title is 1 to 15"),
        ("workflows", "a b", "item 0: a workflow id is"),
        ("acceptedModalities", "ct", "a modality is"),
        ("acceptedSopClasses", "CT", "a UID is"),
        ("maxInstanceBytes", "many", "Not a valid integer"),
        ("maxRequestsPerMinute", "0", "Must be greater than or equal to 1"),
        ("name", "plug-ins", "reserved"),
    ],
)
def test_an_invalid_vae_is_shown_again_with_the_reason(
    page: Page, field: str, value: str, words: str
) -> None:
    answer = page.post("/ui/new-vae", {"virtualAeTitle": "CT2", field: value})

    assert answer.status_code == 400
    assert words in answer.text
    assert 'role="alert"' in answer.text


def test_a_used_ae_title_is_refused_with_the_reason(page: Page) -> None:
    page.day.add_vaes()

    answer = page.post("/ui/new-vae", {"virtualAeTitle": "CT", "name": "other"})

    assert answer.status_code == 409
    assert "AE title CT is already in use" in answer.text
    assert 'value="other"' in answer.text


def test_a_body_that_is_not_a_form_is_refused(page: Page) -> None:
    answer = page.client.post("/ui/new-vae", data=b"\xff&&=", headers=OWN)

    assert answer.status_code == 400


# --- Files and paths -----------------------------------------------------------------------------


def test_static_files_need_no_login_and_are_revalidated(guarded: Page) -> None:
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        answer = guarded.get(f"/ui/static/{name}")
        again = guarded.get(f"/ui/static/{name}", **{"If-None-Match": answer.headers["ETag"]})

        assert answer.status_code == 200
        assert answer.content_type.startswith(kind)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert again.status_code == 304
    assert guarded.get("/ui/static/views.py").status_code == 404
    assert guarded.get("/ui/static/..%2Fviews.py").status_code == 404


def test_the_page_is_served_below_the_path_of_the_public_url(open_page: Open) -> None:
    page = open_page(STOWGATE_PUBLIC_URL="https://pacs.example/stow")

    def get(target: str) -> TestResponse:
        environ = {"RAW_URI": target, "REMOTE_ADDR": "127.0.0.1"}
        return page.client.get(target, environ_overrides=environ)

    assert get("/stow/").status_code == get("/stow/ui").status_code == get("/ui").status_code == 200
    assert get("/stow").headers["Location"] == "/stow/ui"
    assert "https://pacs.example/stow/dicomweb/studies" in get("/stow/ui/help").text


def test_the_help_has_the_code_of_each_sender(page: Page) -> None:
    text = page.get("/ui/help").text

    assert "dicomweb_client import DICOMwebClient" in text
    assert "dcm4che stowrs" in text
    assert "What each sender does" not in text
