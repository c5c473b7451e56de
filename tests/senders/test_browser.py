"""dicomweb-client in a page in Chromium, of another origin than Stowgate."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from engines import start_process, temporary_folder
from instances import new_instance
from issuer import AUDIENCE, ISSUER, Key
from service import Service, running
from snippets import snippet

ANSWER_SECONDS = 60
MAX_BODY_BYTES = 1 << 20

# A client that is installed first is a fixture, and may take minutes.
pytestmark = pytest.mark.timeout(180, func_only=True)

# What a page's script returns, or the error that ends it, is told to the page's own server.
PAGE = """<!doctype html>
<script type="importmap">{"imports": {"dicomweb-client": "/dicomweb-client.es.js"}}</script>
<script type="module">
let told = {};
try {
  told = await (await import("/script.js")).default();
} catch (error) {
  told = { error: String(error), status: error.status };
}
await fetch("/told", { method: "POST", body: JSON.stringify(told) });
</script>
"""
TYPES = {".js": "text/javascript", ".dcm": "application/dicom"}


class Site:
    """Serves the page and its `files`; the same at two names, which are two origins."""

    def __init__(self, **files: bytes) -> None:
        self.files = files
        self.told: queue.Queue[Any] = queue.Queue()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                body = site.files.get(name)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Type", TYPES.get(Path(name).suffix, "text/html"))
                self.end_headers()
                self.wfile.write(body or b"")

            def do_POST(self) -> None:
                site.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server.server_port}"
        self.other_origin = f"http://localhost:{self.server.server_port}"


Visit = Callable[[str, str, str], Any]
"""Opens the page of an origin with the script /store.js and one that uses it; returns what this one
told."""


@pytest.fixture(scope="module")
def site(npm_folder: Path) -> Iterator[Site]:
    library = npm_folder / "node_modules/dicomweb-client/build/dicomweb-client.es.js"
    site = Site(
        **{
            "": PAGE.encode(),
            "dicomweb-client.es.js": library.read_bytes(),
            "0.dcm": new_instance(),
            "1.dcm": new_instance(),
        }
    )
    thread = threading.Thread(target=site.server.serve_forever)
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()
    thread.join()


@pytest.fixture
def visit(chromium: Path, site: Site) -> Iterator[Visit]:
    with ExitStack() as stack:

        def visit(origin: str, store: str, script: str) -> Any:
            folder = temporary_folder(stack)
            site.files |= {"store.js": store.encode(), "script.js": script.encode()}
            command = [
                *(str(chromium), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-dev-shm-usage", "--disable-background-networking"),
                *("--disable-component-update", f"--user-data-dir={folder}/profile", origin),
            ]
            start_process(command, {"HOME": str(folder)}, folder, stack)
            try:
                return site.told.get(timeout=ANSWER_SECONDS)
            except queue.Empty:
                raise AssertionError((folder / "output").read_text(errors="replace")) from None

        yield visit


@pytest.fixture(scope="module")
def key() -> Key:
    return Key("viewer")


@pytest.fixture(scope="module")
def open_to_pages(
    tmp_path_factory: pytest.TempPathFactory, site: Site, key: Key
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "issuer.pem").write_bytes(key.pem())
    with running(
        "run",
        folder,
        STOWGATE_CORS_ORIGINS=site.origin,
        STOWGATE_CORS_HEADERS="traceparent,sentry-trace,baggage",
        STOWGATE_AUTH="jwt",
        STOWGATE_JWT_KEYS=str(folder / "issuer.pem"),
        STOWGATE_JWT_ISSUER=ISSUER,
        STOWGATE_JWT_AUDIENCE=AUDIENCE,
        STOWGATE_MAX_BODY_BYTES=str(MAX_BODY_BYTES),
    ) as service:
        yield service


# What dicomweb-client makes of a preflight that the browser was not content with.
REFUSED = {"error": "Error: request failed", "status": 0}

STORE_TWO = """
import { store } from "/store.js";

export default async () => store([await fetch("/0.dcm"), await fetch("/1.dcm")]);
"""

ASK = """
const dicom = { "Content-Type": "application/dicom" };
const token = { Authorization: "Bearer TOKEN" };
const headers = {
  ...dicom,
  ...token,
  "Idempotency-Key": "once",
  "sentry-trace": "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
  baggage: "sentry-environment=production",
  traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
  "X-Correlation-ID": "6f1d1a4e-7a3c-4b7e-9c39-0d5c4b5a2f11",
};

async function post(headers, body) {
  const answer = await fetch("ADDRESS/dicomweb/studies", { method: "POST", headers, body });
  return { status: answer.status, ...Object.fromEntries(answer.headers), ...await answer.json() };
}

export default async () => {
  const image = await (await fetch("/0.dcm")).arrayBuffer();
  const stored = await post(headers, image);
  const status = new URL(stored.link.match(/<(.*)>/)[1], "ADDRESS");
  const payload = await fetch(status, { headers: token });
  return {
    stored,
    payload: await payload.json(),
    stranger: await post(dicom, image),
    large: await post({ ...dicom, ...token }, new Uint8Array(LARGE_BYTES)),
  };
};
"""


def _snippet(url: str, token: str | None = None) -> str:
    """With the token where the page says that it goes."""
    code = snippet("A page in a browser", "js", url=url)
    return f'{code}\nclient.headers = {{ Authorization: "Bearer {token}" }};' if token else code


def test_a_page_of_a_listed_origin_stores(
    visit: Visit, site: Site, open_to_pages: Service, key: Key
) -> None:
    store = _snippet(open_to_pages.url, key.token(scope="stowgate:store"))

    assert visit(site.origin, store, STORE_TWO) == 2
    (payload,) = open_to_pages.payloads_with(site.files["1.dcm"])
    assert open_to_pages.payloads_with(site.files["0.dcm"]) == {payload}


def test_a_page_of_a_listed_origin_reads_the_headers_and_why_it_is_refused(
    visit: Visit, site: Site, open_to_pages: Service, key: Key
) -> None:
    token = key.token(scope="stowgate:store stowgate:read")
    script = ASK.replace("ADDRESS", open_to_pages.url).replace("TOKEN", token)

    told = visit(site.origin, "", script.replace("LARGE_BYTES", str(32 << 20)))

    assert "error" not in told, told
    stored, stranger, large = told["stored"], told["stranger"], told["large"]
    assert stored["status"] == 200
    assert stored["x-payload-id"] == told["payload"]["payload_id"]
    assert stored["x-correlation-id"] == told["payload"]["correlation_id"]
    assert (stranger["status"], stranger["www-authenticate"]) == (401, 'Bearer realm="stowgate"')
    assert "token" in stranger["detail"]
    assert large["status"] == 413
    assert f"{MAX_BODY_BYTES} bytes" in large["detail"]


def test_a_page_of_another_origin_stores_and_reads_nothing(
    visit: Visit, site: Site, open_to_pages: Service, key: Key
) -> None:
    before = open_to_pages.payloads_with(site.files["0.dcm"])
    store = _snippet(open_to_pages.url, key.token(scope="stowgate:store"))

    assert visit(site.other_origin, store, STORE_TWO) == REFUSED
    assert open_to_pages.payloads_with(site.files["0.dcm"]) == before


def test_without_the_setting_a_page_stores_nothing(
    visit: Visit, site: Site, stowgate: Service
) -> None:
    assert visit(site.origin, _snippet(stowgate.url), STORE_TWO) == REFUSED
    assert not stowgate.payloads_with(site.files["0.dcm"])


WITHOUT_PREFLIGHT = """
export default async () => {
  const image = await (await fetch("/0.dcm")).arrayBuffer();
  const types = [
    "",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    'multipart/related; type="application/dicom"; boundary=x',
    "application/dicom",
  ];
  for (const type of types) {
    const request = { method: "POST", mode: "no-cors", body: new Blob([image], { type }) };
    await fetch("ADDRESS/dicomweb/studies", request);
    navigator.sendBeacon("ADDRESS/dicomweb/studies", request.body);
  }
  return "sent";
};
"""


def test_what_a_page_sends_without_a_preflight_is_stored_for_no_origin(
    visit: Visit, site: Site, stowgate: Service
) -> None:
    refused = stowgate.metric("stowgate_posts_total", status="415")

    script = WITHOUT_PREFLIGHT.replace("ADDRESS", stowgate.url)

    assert visit(site.other_origin, "", script) == "sent"
    assert stowgate.metric("stowgate_posts_total", status="415") >= refused + 6
    assert not stowgate.payloads_with(site.files["0.dcm"])
