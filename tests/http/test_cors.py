"""CORS for pages of other origins. tests/senders/ tests it in a browser."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
from instances import new_instance
from issuer import AUDIENCE, ISSUER, Key
from service import Service, running

PAGE = "https://viewer.example"
LOCAL_PAGE = "http://[::1]:3000"
ASKED = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
}
READABLE = {"Accept-Post", "Allow", "Link", "Retry-After", "X-Correlation-ID", "X-Payload-ID"}
DICOM = {"Content-Type": "application/dicom"}


@pytest.fixture(scope="module")
def open_to_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(
        "run",
        tmp_path_factory.mktemp("pages"),
        STOWGATE_CORS_ORIGINS=f"{PAGE}, {LOCAL_PAGE}",
        STOWGATE_MAX_BODY_BYTES="100000",
    ) as service:
        yield service


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Requires tokens of an issuer that is down."""
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    with running(
        "run",
        tmp_path_factory.mktemp("guarded"),
        STOWGATE_CORS_ORIGINS=PAGE,
        STOWGATE_AUTH="jwt",
        STOWGATE_JWT_KEYS=f"http://127.0.0.1:{port}/keys",
        STOWGATE_JWT_ISSUER=ISSUER,
        STOWGATE_JWT_AUDIENCE=AUDIENCE,
    ) as service:
        yield service


def preflight(service: Service, path: str, origin: str) -> requests.Response:
    return requests.options(service.url + path, headers={"Origin": origin, **ASKED}, timeout=60)


def words(answer: requests.Response, header: str) -> set[str]:
    return {word.strip() for word in answer.headers[header].split(",")}


def lets_read(answer: requests.Response, origin: str) -> bool:
    return (
        answer.headers.get("Access-Control-Allow-Origin") == origin
        and words(answer, "Access-Control-Expose-Headers") >= READABLE
        and "Origin" in words(answer, "Vary")
    )


@pytest.mark.parametrize("path", ["/dicomweb/studies", "//dicomweb/studies/", "/payloads/x", "/no"])
def test_a_preflight_succeeds_without_credentials_on_every_path(
    guarded: Service, path: str
) -> None:
    answer = preflight(guarded, path, PAGE)

    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    assert words(answer, "Access-Control-Allow-Methods") == {"DELETE", "GET", "POST", "PUT"}
    assert words(answer, "Access-Control-Allow-Headers") == {
        "Accept",
        "Authorization",
        "Content-Type",
        "Idempotency-Key",
        "X-Correlation-ID",
    }
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert "Origin" in words(answer, "Vary")


def test_a_page_may_send_the_configured_headers(tmp_path: Path) -> None:
    settings = {"STOWGATE_CORS_ORIGINS": PAGE, "STOWGATE_CORS_HEADERS": "traceparent, sentry-trace"}
    with running("run", tmp_path, **settings) as service:
        answer = preflight(service, "/dicomweb/studies", PAGE)

    assert words(answer, "Access-Control-Allow-Headers") == {
        *("Accept", "Authorization", "Content-Type", "Idempotency-Key", "X-Correlation-ID"),
        *("traceparent", "sentry-trace"),
    }


def test_options_without_preflight_headers_requires_authentication(guarded: Service) -> None:
    answer = requests.options(f"{guarded.url}/payloads", headers={"Origin": PAGE}, timeout=60)

    assert "Access-Control-Allow-Methods" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    [
        "https://viewer.example.attacker.example",
        "https://other.viewer.example",
        "http://viewer.example",
        "https://viewer.example:8443",
        "http://::3000",
        "http://1:3000",
        f"{PAGE}, {LOCAL_PAGE}",
        "null",
        "*",
        "",
    ],
)
def test_another_origin_gets_no_cors_header_but_vary(open_to_pages: Service, origin: str) -> None:
    headers = {"Origin": origin}
    for answer in (
        preflight(open_to_pages, "/dicomweb/studies", origin),
        requests.post(f"{open_to_pages.url}/dicomweb/studies", headers=headers, timeout=60),
        requests.get(f"{open_to_pages.url}/payloads", timeout=60),
    ):
        assert not [name for name in answer.headers if name.startswith("Access-Control-")]
        assert "Origin" in words(answer, "Vary")


@pytest.mark.parametrize("origin", [PAGE, LOCAL_PAGE])
def test_a_page_can_read_the_response_to_its_upload(open_to_pages: Service, origin: str) -> None:
    url = f"{open_to_pages.url}/dicomweb/studies"
    answer = requests.post(url, new_instance(), headers={"Origin": origin, **DICOM}, timeout=60)

    assert answer.status_code == 200
    assert lets_read(answer, origin)


def test_a_page_can_read_an_error(open_to_pages: Service) -> None:
    headers, url = {"Origin": PAGE}, open_to_pages.url
    vae: dict[str, Any] = {
        "virtualAeTitle": "SELDOM",
        "workflows": ["w"],
        "maxRequestsPerMinute": 1,
    }
    assert requests.post(f"{url}/config/vae", json=vae, headers=headers, timeout=60).ok
    seldom, studies = f"{url}/dicomweb/vae/SELDOM/studies", f"{url}/dicomweb/studies"
    assert requests.post(seldom, headers=headers, timeout=60).status_code == 204

    for status, answer in {
        400: requests.post(f"{studies}/none", headers=headers, timeout=60),
        404: requests.get(f"{url}/nowhere", headers=headers, timeout=60),
        405: requests.delete(studies, headers=headers, timeout=60),
        409: requests.post(studies, b"no DICOM", headers=headers | DICOM, timeout=60),
        413: requests.post(studies, bytes(100_001), headers=headers | DICOM, timeout=60),
        415: requests.post(studies, "text", headers=headers, timeout=60),
        429: requests.post(seldom, headers=headers, timeout=60),
    }.items():
        assert answer.status_code == status
        assert lets_read(answer, PAGE), status


def test_a_page_can_read_401_and_503_of_authentication(
    guarded: Service,
) -> None:
    url, token = f"{guarded.url}/dicomweb/studies", Key("any").token()
    none = requests.post(url, headers={"Origin": PAGE}, timeout=60)
    some = requests.post(
        url, headers={"Origin": PAGE, "Authorization": f"Bearer {token}"}, timeout=60
    )

    assert (none.status_code, some.status_code) == (401, 503)
    assert "WWW-Authenticate" in words(none, "Access-Control-Expose-Headers")
    assert lets_read(none, PAGE)
    assert lets_read(some, PAGE)


def test_without_the_setting_no_origin_is_allowed(stowgate: Service) -> None:
    for answer in (
        preflight(stowgate, "/dicomweb/studies", PAGE),
        requests.get(f"{stowgate.url}/payloads", headers={"Origin": PAGE}, timeout=60),
    ):
        assert not [name for name in answer.headers if name.startswith("Access-Control-")]
        assert "Vary" not in answer.headers


def administer(service: Service, title: str, **headers: str) -> int:
    """Send what a page can send without a preflight and without reading the response."""
    vae = f'{{"virtualAeTitle": "{title}", "workflows": ["w"]}}'
    given = {"Content-Type": "text/plain", **headers}
    added = requests.post(f"{service.url}/config/vae", vae, headers=given, timeout=60)
    return added.status_code


@pytest.mark.parametrize(
    "said",
    [
        {"Origin": "https://other.example"},
        {"Origin": "null"},
        {"Origin": "https://other.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_an_unlisted_origin_cannot_administer(
    stowgate: Service, said: dict[str, str]
) -> None:
    assert administer(stowgate, "BY-A-PAGE", **said) == 403
    assert "BY-A-PAGE" not in stowgate.get("/config/vae").text
    replay = f"{stowgate.url}/payloads/{uuid4()}/replay"
    assert requests.post(replay, headers=said, timeout=60).status_code == 403


def test_a_listed_page_a_same_origin_page_and_other_clients_may_administer(
    open_to_pages: Service,
) -> None:
    for number, said in enumerate(
        [
            {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"},
            {"Origin": "https://pacs.example", "Sec-Fetch-Site": "same-origin"},
            {"Origin": open_to_pages.url},
            {},
        ]
    ):
        assert administer(open_to_pages, f"LISTED-{number}", **said) == 201
