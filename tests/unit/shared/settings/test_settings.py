"""Settings: their values, and the one-line errors."""

import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from api.settings import ApiSettings, UrlSettings, guard_listen
from cli.settings import ALL_SETTINGS, ClientSettings
from shared.settings.loader import BadSetting, SettingsSection, declared, doubtful_variables, load
from shared.settings.parsers import Address
from shared.settings.services import CommonSettings
from worker.settings import WorkerSettings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("STOWGATE_")]:
        monkeypatch.delenv(name)


def _reader_of(variable: str) -> type[SettingsSection]:
    """Return a section that reads the variable."""
    return next(s for s in ALL_SETTINGS if variable in {d.variable for d in declared(s)})


@pytest.mark.parametrize("section", [WorkerSettings, ClientSettings])
def test_a_process_does_not_fail_on_a_setting_that_it_does_not_read(
    section: type[SettingsSection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOWGATE_AUTH", "basic")
    monkeypatch.setenv("STOWGATE_MAX_PARTS", "many")
    with pytest.raises(BadSetting):
        load(ApiSettings)

    load(section)


def test_each_setting_is_declared_once() -> None:
    own = [
        name
        for section in (CommonSettings, UrlSettings, *ALL_SETTINGS)
        for name in vars(section).get("__annotations__", {})
    ]

    assert len(own) == len(set(own))


def test_the_defaults_are_those_of_the_embedded_run() -> None:
    settings = load(ApiSettings)

    assert (settings.object_store, settings.broker) == ("folder", "memory")
    assert settings.listen == Address("127.0.0.1", 8080)
    assert settings.data == Path("data").absolute()


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("STOWGATE_LISTEN", "8080", "host:port"),
        ("STOWGATE_LISTEN", "127.0.0.1:70000", "host:port"),
        ("STOWGATE_WORKER_LISTEN", "::1:8080", "host:port"),
        ("STOWGATE_OBJECT_STORE", "s3", "http://host:port"),
        ("STOWGATE_OBJECT_STORE", "http://", "http://host:port"),
        ("STOWGATE_OBJECT_STORE", "http://host:port", "http://host:port"),
        ("STOWGATE_OBJECT_STORE", "http://host/bucket", "http://host:port"),
        ("STOWGATE_OBJECT_STORE", "http://me:word@host:9000", "http://host:port"),
        ("STOWGATE_OBJECT_STORE", "http://me:wo/rd@host:9000", "http://host:port"),
        ("STOWGATE_OBJECT_STORE", "http://me:wo\nrd@host:9000", "http://host:port"),
        ("STOWGATE_OBJECT_STORE", "me:word@host:9000", "http://host:port"),
        ("STOWGATE_OBJECT_STORE_REGION", "eu central", "visible ASCII"),
        ("STOWGATE_PUBLIC_URL", "http://me:word@host/", "http://host:port"),
        ("STOWGATE_PUBLIC_URL", "http://host name/", "http://host:port"),
        ("STOWGATE_PUBLIC_URL", "https://krankenhaus-łódź.example", "hosts as xn--"),
        ("STOWGATE_PUBLIC_URL", "http://host/ü", "in ASCII: other letters as %XX"),
        *(
            ("STOWGATE_PUBLIC_URL", f"http://host/a{bad}b", "http://host:port")
            for bad in ("<", ">", '"', "^", "`", "{", "|", "}", "%", "%zz")
        ),
        ("STOWGATE_BUCKET", "Upper", "bucket name"),
        ("STOWGATE_BUCKET", "ab", "bucket name"),
        ("STOWGATE_PUBLIC_URL", "ftp://host", "https://host:port"),
        ("STOWGATE_AUTH", "ldap", "none or basic or jwt"),
        ("STOWGATE_ALLOW_ANYONE", "yes", "true or false"),
        ("STOWGATE_JWT_KEYS", "http://issuer.example/keys", "http:// on loopback only"),
        ("STOWGATE_JWT_KEYS", "https://me:word@issuer.example/keys", "https://host/path"),
        ("STOWGATE_JWT_KEYS", "https:///keys", "https://host/path"),
        ("STOWGATE_JWT_ALGORITHMS", "none", "a comma-separated list from RS256"),
        ("STOWGATE_JWT_ALGORITHMS", "RS256,HS256", "a comma-separated list from RS256"),
        ("STOWGATE_CORS_ORIGINS", "*", "https://viewer.example"),
        ("STOWGATE_CORS_ORIGINS", "null", "https://viewer.example"),
        ("STOWGATE_CORS_ORIGINS", "https://viewer.example/", "without a slash"),
        ("STOWGATE_CORS_ORIGINS", "https://Viewer.example", "in lower case"),
        ("STOWGATE_CORS_ORIGINS", "https://viewer.example:443", "default port"),
        ("STOWGATE_CORS_ORIGINS", "https://viewer.example,https://*.example", "or *"),
        ("STOWGATE_CORS_HEADERS", "*", "traceparent,baggage,sentry-trace"),
        ("STOWGATE_CORS_HEADERS", "traceparent,,baggage", "names of header fields"),
        ("STOWGATE_CORS_HEADERS", "X-Tr\u00e4ger", "names of header fields"),
        ("STOWGATE_CORS_HEADERS", "X-A: b", "names of header fields"),
        ("STOWGATE_LOG", "xml", "console or json"),
        ("STOWGATE_MAX_PARTS", "0", "from 1 to 36000"),
        ("STOWGATE_MAX_PARTS", "36001", "from 1 to 36000"),
        ("STOWGATE_MAX_BODY_BYTES", "0", "1 or more"),
        ("STOWGATE_STOP_SECONDS", "4", "from 5 to 3600"),
        ("STOWGATE_BROKER_CONFIRM_SECONDS", "0", "from 1 to 3600"),
        ("STOWGATE_MAX_PARTS", "many", "whole number"),
        ("STOWGATE_MAX_BODY_BYTES", "1" * 19, "up to 18 digits"),
        ("STOWGATE_API_THREADS", "1", "from 2 to 256"),
        ("STOWGATE_MAX_UPLOADS", "0", "from 1 to 254"),
        ("STOWGATE_MAX_UPLOADS", "39", "at most 38"),
        ("STOWGATE_STATE_BUCKET", "monaideploy", "must differ from STOWGATE_BUCKET"),
        ("STOWGATE_BUCKET", "spool", "another name"),
        ("STOWGATE_STATE_BUCKET", "workflow-requests", "another name"),
        ("STOWGATE_PUBLIC_URL", "https://host/dicomweb", "before /dicomweb"),
        ("STOWGATE_TRUSTED_PROXIES", "17", "from 0 to 16"),
        ("STOWGATE_TRUSTED_PROXIES", "proxy.example", "addresses or networks"),
        ("STOWGATE_TRUSTED_PROXIES", "10.0.0.1/8", "without host bits"),
    ],
)
def test_an_invalid_value_is_reported_with_variable_value_and_remedy(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, right: str
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(BadSetting) as caught:
        load(_reader_of(variable))

    line = str(caught.value)
    # A password in a URL must not appear in a log.
    assert line.startswith(f"{variable} is '{re.sub('(?s)^.*@', '…@', value)}'")
    assert right in line
    assert "\n" not in line


def test_a_key_that_is_not_valid_in_a_header_is_rejected_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_ACCESS_KEY", "geheim\u00e4")

    with pytest.raises(BadSetting, match=r"ACCESS_KEY is \(a secret\).*visible ASCII") as caught:
        load(ApiSettings)

    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["rabbit:secret@host", "amqp://:secret@/vhost", "amqp://me:secret@host/a/b"],
)
def test_an_invalid_secret_is_not_repeated(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("STOWGATE_BROKER", value)

    with pytest.raises(BadSetting, match="STOWGATE_BROKER is \\(a secret\\)") as caught:
        load(ApiSettings)

    assert "secret@" not in str(caught.value)
    assert "amqp://user:password@host:port/vhost" in str(caught.value)


def test_an_s3_store_needs_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOWGATE_OBJECT_STORE", "http://127.0.0.1:9000")

    with pytest.raises(BadSetting, match="STOWGATE_OBJECT_STORE_SECRET_KEY"):
        load(ApiSettings)


@pytest.mark.parametrize(
    ("address", "is_refused"),
    [
        ("127.0.0.1:0", False),
        ("127.9.9.9:0", False),
        ("[::1]:0", False),
        ("localhost:0", False),
        ("0.0.0.0:0", True),
        ("[::]:0", True),
        ("10.0.0.1:0", True),
        ("stowgate.example:0", True),
    ],
)
def test_an_api_without_authentication_listens_on_loopback_only(
    monkeypatch: pytest.MonkeyPatch, address: str, is_refused: bool
) -> None:
    monkeypatch.setenv("STOWGATE_LISTEN", address)
    with pytest.raises(BadSetting, match="STOWGATE_AUTH") if is_refused else nullcontext():
        guard_listen(load(ApiSettings))

    monkeypatch.setenv("STOWGATE_ALLOW_ANYONE", "true")
    guard_listen(load(ApiSettings))
    monkeypatch.setenv("STOWGATE_ALLOW_ANYONE", "false")
    monkeypatch.setenv("STOWGATE_AUTH", "basic")
    monkeypatch.setenv("STOWGATE_USERS", "users")
    guard_listen(load(ApiSettings))


def test_algorithms_are_a_comma_separated_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOWGATE_JWT_ALGORITHMS", "RS256, ES256")

    assert load(ApiSettings).jwt_algorithms == ("RS256", "ES256")


def test_a_path_prefix_is_decoded_like_a_wsgi_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOWGATE_PUBLIC_URL", "https://pacs.example/the%20site/")

    assert load(ApiSettings).path_prefix == "/the site"


def test_a_value_can_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "broker"
    secret.write_text("amqp://user:password@host:5672/vhost\n")
    monkeypatch.setenv("STOWGATE_BROKER_FILE", str(secret))

    assert load(ApiSettings).broker == "amqp://user:password@host:5672/vhost"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "No such file or directory"),
        ("", "Is a directory"),
        ("text/in", "Not a directory"),
        ("text", "it is not UTF-8"),
    ],
)
def test_an_unreadable_file_of_a_setting_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    path = str(tmp_path / name)
    monkeypatch.setenv("STOWGATE_LISTEN_FILE", path)

    with pytest.raises(BadSetting) as caught:
        load(ApiSettings)

    assert str(caught.value) == (
        f"STOWGATE_LISTEN_FILE is {path!r}, but must name a readable file: {why}"
    )


def test_the_value_of_a_secrets_file_variable_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_SECRET_KEY_FILE", "hidden-word")

    with pytest.raises(BadSetting, match="SECRET_KEY_FILE must name a readable file") as caught:
        load(ApiSettings)

    assert "hidden-word" not in str(caught.value)


def test_an_ipv6_address_is_given_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOWGATE_LISTEN", "[::1]:8080")

    address = load(ApiSettings).listen

    assert address == Address("::1", 8080)
    assert str(address) == "[::1]:8080"


def test_an_unknown_variable_is_reported_with_the_nearest_known_one() -> None:
    environ = {
        "STOWGATE_BUKET": "x",
        "STOWGATE_BUCKET": "x",
        "STOWGATE_BROKER_FILE": "x",
        "STOWGATE_TEST_BROKER": "x",
        "PATH": "x",
    }

    (sentence,) = doubtful_variables(environ, ALL_SETTINGS)

    assert "STOWGATE_BUKET" in sentence
    assert "STOWGATE_BUCKET" in sentence


def test_an_unknown_variable_without_a_similar_one_has_no_suggestion() -> None:
    (sentence,) = doubtful_variables({"STOWGATE_BOGUS": "x"}, ALL_SETTINGS)

    assert sentence == "STOWGATE_BOGUS is set, but no setting has that name"


def test_a_setting_given_both_plainly_and_as_a_file_is_reported_with_both_names() -> None:
    environ = {
        "STOWGATE_CLIENT_PASSWORD": "hidden-word",
        "STOWGATE_CLIENT_PASSWORD_FILE": "/run/secrets/password",
        "STOWGATE_BUCKET_FILE": "/run/bucket",
        "STOWGATE_LOG": "",
        "STOWGATE_LOG_FILE": "/run/log",
        "STOWGATE_BROKER": "memory",
        "STOWGATE_BROKER_FILE": "",
    }

    assert doubtful_variables(environ, ALL_SETTINGS) == [
        "STOWGATE_CLIENT_PASSWORD and STOWGATE_CLIENT_PASSWORD_FILE are both set: the file is "
        "used, and STOWGATE_CLIENT_PASSWORD is ignored; remove one of them"
    ]
