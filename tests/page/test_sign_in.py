"""The page with tokens: Apache with mod_auth_openidc signs a person in, as deploy/sign-in.conf has
it, at a double of the provider."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from answering import Answering, serving
from clients import from_debian, had_by_one_of, on_this_machine
from engines import NotToBeHad, start_process, temporary_folder
from instances import new_instance
from issuer import AUDIENCE, Key
from playwright.sync_api import Page, expect
from provider import providing
from service import running, wait_for

pytestmark = pytest.mark.timeout(180, func_only=True)

Visit = Callable[..., Page]
"""As in the fixture of that name."""

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "sign-in.conf"
MODULES = Path("/usr/lib/apache2/modules")
SERVER = """
ServerRoot FOLDER
ServerName 127.0.0.1
Listen 127.0.0.1:PORT
PidFile FOLDER/pid
ErrorLog /dev/stderr
Mutex file:FOLDER default
User www-data
Group www-data
LoadModule mpm_event_module MODULES/mod_mpm_event.so
LoadModule authn_core_module MODULES/mod_authn_core.so
LoadModule authz_core_module MODULES/mod_authz_core.so
LoadModule authz_user_module MODULES/mod_authz_user.so
LoadModule headers_module MODULES/mod_headers.so
LoadModule proxy_module MODULES/mod_proxy.so
LoadModule proxy_http_module MODULES/mod_proxy_http.so
LoadModule auth_openidc_module MODULES/mod_auth_openidc.so
"""


@pytest.fixture(scope="session")
def apache() -> Path:
    def here() -> Path:
        if not (MODULES / "mod_auth_openidc.so").exists():
            raise NotToBeHad("no mod_auth_openidc on this machine")
        return on_this_machine("apache2")

    return had_by_one_of(
        "Apache with mod_auth_openidc",
        here,
        lambda: from_debian("libapache2-mod-auth-openidc", "apache2"),
    )


def test_a_proxy_signs_a_person_in_and_passes_the_token_on(
    visit: Visit, apache: Path, tmp_path: Path
) -> None:
    (tmp_path / "image.dcm").write_bytes(new_instance())
    with serving(Answering) as taken:
        port = urlsplit(taken).port
    site = f"http://127.0.0.1:{port}"
    scopes = "stowgate:read stowgate:admin stowgate:store"
    with ExitStack() as stack:
        issuer = stack.enter_context(providing(Key("provider"), scopes))
        service = stack.enter_context(
            running(
                "run",
                tmp_path,
                STOWGATE_AUTH="jwt",
                STOWGATE_JWT_KEYS=f"{issuer}/jwks",
                STOWGATE_JWT_ISSUER=issuer,
                STOWGATE_JWT_AUDIENCE=AUDIENCE,
                STOWGATE_PUBLIC_URL=f"{site}/stow",
            )
        )
        folder = temporary_folder(stack)
        server = SERVER.replace("MODULES", str(MODULES)).replace("PORT", str(port))
        example = EXAMPLE.read_text()
        for old, new in {
            "https://issuer.example/realms/hospital": issuer,
            "https://pacs.example": site,
            "http://127.0.0.1:8080": service.url,
        }.items():
            assert old in example
            example = example.replace(old, new)
        example = re.sub('"exec:[^"]*"', "secret", example)
        (folder / "httpd.conf").write_text(server.replace("FOLDER", str(folder)) + example)
        command = [str(apache), "-X", "-f", str(folder / "httpd.conf")]
        start_process(command, {}, folder, stack)
        wait_for(lambda: _status(f"{site}/stow/health/live") == 200)

        page = visit(f"{site}/stow")
        expect(page.locator(".caller")).to_contain_text("anna")
        page.get_by_role("link", name="VAEs").click()
        page.get_by_role("link", name="Add a VAE").click()
        page.get_by_label("AE title").fill("SIGNED")
        page.get_by_role("button", name="Add").click()
        expect(page.get_by_role("status")).to_have_text("The VAE was added.")
        page.get_by_role("link", name="Send").click()
        page.locator("[data-files]").set_input_files(tmp_path / "image.dcm")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("[data-result]")).to_have_text("All 1 file stored.")

        # Without a session, senders get Stowgate's own answer, and forged tokens are refused.
        assert _status(f"{site}/stow/payloads") == 401
        assert _status(f"{site}/stow/payloads", Authorization="Bearer x") == 401


def test_without_a_proxy_the_page_says_how_to_come_in(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(Key("key").pem())
    with running(
        "api",
        tmp_path,
        STOWGATE_AUTH="jwt",
        STOWGATE_JWT_KEYS=str(tmp_path / "key.pem"),
        STOWGATE_JWT_ISSUER="https://issuer.example",
        STOWGATE_JWT_AUDIENCE=AUDIENCE,
    ) as service:
        answer = requests.get(service.url, headers={"Accept": "text/html"}, timeout=30)

    assert answer.status_code == 401
    assert "through a proxy that signs people in" in answer.text


def _status(url: str, **headers: str) -> int:
    try:
        return requests.get(url, headers=headers, allow_redirects=False, timeout=10).status_code
    except requests.ConnectionError:
        return 0
