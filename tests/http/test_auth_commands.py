"""Authentication in the commands of `stowgate`."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from instances import new_instance
from issuer import AUDIENCE, ISSUER, Key, issuing
from requests.auth import HTTPBasicAuth
from service import STOWGATE, Service, environment, running

from api.auth.basic import user_line
from api.http.routes import Scope

PASSWORD = "correct-horse-battery"


@pytest.fixture(scope="module")
def by_password(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("basic")
    lines = [user_line("all", list(Scope), PASSWORD), user_line("sender", [Scope.STORE], PASSWORD)]
    (folder / "users").write_text("\n".join(lines))
    with running(
        "run", folder, STOWGATE_AUTH="basic", STOWGATE_USERS=str(folder / "users")
    ) as service:
        yield service


def _run(*arguments: str, words: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, *arguments],
        env=environment(Path("unused"), settings),
        input=words,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_user_created_by_the_command_can_authenticate(tmp_path: Path) -> None:
    made = _run(
        *("user", "archive", "--scope", "store", "--scope", "read", "--vae", "AE-9/w-9"),
        words=f"{PASSWORD}\n",
    )
    assert made.returncode == 0, made.stderr
    assert PASSWORD not in made.stdout
    file = tmp_path / "users"
    file.write_text(made.stdout)

    with running("api", tmp_path, STOWGATE_AUTH="basic", STOWGATE_USERS=str(file)) as api:
        me = ("archive", PASSWORD)
        read = requests.get(f"{api.url}/payloads", auth=me, timeout=60)
        changed = requests.post(f"{api.url}/config/vae", auth=me, timeout=60)
        stored = requests.post(f"{api.url}/dicomweb/studies", auth=me, timeout=60)
        assert (read.status_code, changed.status_code, stored.status_code) == (200, 403, 403)


@pytest.mark.parametrize(
    ("arguments", "password", "words"),
    [
        (["a:b", "--scope", "read"], PASSWORD, "'a:b' is not a valid user name"),
        (["a", "--scope", "read"], "short", "at least 8 characters"),
        (["a", "--scope", "everything"], PASSWORD, "not one of 'store', 'read', 'admin'"),
        (["a"], PASSWORD, "Missing option '--scope'"),
    ],
)
def test_an_invalid_user_is_rejected_with_the_reason(
    arguments: list[str], password: str, words: str
) -> None:
    made = _run("user", *arguments, words=password)

    assert made.returncode > 0
    assert words in made.stderr
    assert made.stdout == ""
    assert password not in made.stderr


def test_a_password_beyond_ascii_causes_a_warning(tmp_path: Path) -> None:
    password = "p\u00e4ssw\u00f6rter"
    made = _run("user", "archive", "--scope", "read", words=f"{password}\n")

    assert made.returncode == 0
    (line,) = made.stderr.splitlines()
    assert line.startswith("Warning: the password contains characters other than ASCII.")
    assert password not in made.stderr
    file = tmp_path / "users"
    file.write_text(made.stdout)
    with running("api", tmp_path, STOWGATE_AUTH="basic", STOWGATE_USERS=str(file)) as api:
        me = HTTPBasicAuth(b"archive", password.encode())
        assert requests.get(f"{api.url}/payloads", auth=me, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "broken"),
    [
        (["a b"], "'a b' is not a valid user name: use 1 to 64 of A-Z a-z 0-9 . _ @ -, beginning"),
        (
            ["a", "--vae", "AE 1"],
            "'AE 1' is not a valid binding: a binding is an AE title, or an AE title, a slash",
        ),
        (["a", "--vae", "AE-1/"], "'AE-1/' is not a valid binding: a binding is an AE title"),
        (["a", "--source", "CT:1"], "'CT:1' is not a valid source: a source is 1 to 15"),
        (["a", "--source", ""], "'' is not a valid source: a source is 1 to 15"),
    ],
)
def test_the_name_and_bindings_are_checked_before_the_password_is_read(
    arguments: list[str], broken: str
) -> None:
    made = _run("user", *arguments, "--scope", "read", words="short")

    assert made.returncode > 0
    (line,) = made.stderr.splitlines()
    assert line.startswith(f"Error: {broken}")


def test_commands_send_the_configured_credentials(by_password: Service, tmp_path: Path) -> None:
    place = ["--url", by_password.url]
    file = tmp_path / "image.dcm"
    file.write_bytes(new_instance())
    me = {"STOWGATE_CLIENT_USER": "all", "STOWGATE_CLIENT_PASSWORD": PASSWORD}
    wrong = {"STOWGATE_CLIENT_USER": "all", "STOWGATE_CLIENT_PASSWORD": "wrong"}
    sender = {"STOWGATE_CLIENT_USER": "sender", "STOWGATE_CLIENT_PASSWORD": PASSWORD}

    for arguments in (
        ["send", str(file)],
        ["vae", "list"],
        ["payloads", "list"],
        ["payloads", "replay", "--all"],
    ):
        anonymous = _run(*arguments, *place)
        assert anonymous.returncode == 2
        assert "401: a user name and a password (HTTP Basic) are required" in anonymous.stderr
        assert "--user" in anonymous.stderr
        mistaken = _run(*arguments, *place, **wrong)
        assert mistaken.returncode == 2
        assert mistaken.stderr == "Error: 401: wrong user name or password\n"
        entered = _run(*arguments, *place, **me)
        assert entered.returncode == 0, entered.stderr
    assert (
        "403: the caller lacks the required scope read"
        in _run("vae", "list", *place, **sender).stderr
    )


def test_a_password_is_prompted_for_on_a_terminal(by_password: Service) -> None:
    keyboard, terminal = os.openpty()
    asking = subprocess.Popen(
        [STOWGATE, "vae", "list", "--url", by_password.url, "--user", "all"],
        env=environment(Path("unused"), {}),
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(terminal)
    with asking, open(keyboard, "wb", buffering=0) as typing:
        assert asking.stderr
        # Input before the prompt is discarded when the terminal's echo is switched off.
        assert asking.stderr.read(len("Password: ")) == b"Password: "
        typing.write(f"{PASSWORD}\n".encode())
        _, said = asking.communicate(timeout=60)

    assert asking.returncode == 0, said
    assert PASSWORD.encode() not in said


def test_without_a_terminal_the_error_names_the_setting_for_the_password(
    tmp_path: Path,
) -> None:
    (tmp_path / "image.dcm").write_bytes(new_instance())

    sent = _run("send", str(tmp_path), "--user", "all", words=f"{PASSWORD}\n")

    assert (sent.returncode, sent.stdout) == (2, "")
    (line,) = sent.stderr.splitlines()
    assert "set STOWGATE_CLIENT_PASSWORD" in line


def test_commands_read_a_token_from_a_file(tmp_path: Path) -> None:
    key = Key("first")
    pem, token = tmp_path / "issuer.pem", tmp_path / "token"
    pem.write_bytes(key.pem())
    token.write_text(key.token(scope="stowgate:read") + "\n")
    with running("api", tmp_path, **_jwt(str(pem))) as api:
        command = ["payloads", "list", "--url", api.url]

        assert _run(*command, "--token-file", str(token)).returncode == 0
        assert _run(*command, STOWGATE_CLIENT_TOKEN_FILE=str(token)).returncode == 0
        assert _run(*command, "--token-file", str(token), "--user", "x").returncode == 2
        assert "401" in _run(*command).stderr


def _jwt(keys: str) -> dict[str, str]:
    return {
        "STOWGATE_AUTH": "jwt",
        "STOWGATE_JWT_KEYS": keys,
        "STOWGATE_JWT_ISSUER": ISSUER,
        "STOWGATE_JWT_AUDIENCE": AUDIENCE,
    }


def test_check_reports_whether_the_issuer_keys_are_available(tmp_path: Path) -> None:
    with issuing(Key("first")) as issuer:
        settings = {"STOWGATE_DATA": str(tmp_path), **_jwt(issuer.url)}
        assert "ok        authentication" in _run("check", **settings).stdout
        issuer.status = 500
        failing = _run("check", **settings)

    assert failing.returncode == 1
    assert "FAIL      authentication: could not fetch the issuer's keys" in failing.stdout
    assert "responded with status 500" in failing.stdout


def test_check_reports_no_authentication_on_a_public_address(tmp_path: Path) -> None:
    checked = _run("check", STOWGATE_DATA=str(tmp_path), STOWGATE_LISTEN="0.0.0.0:8080")

    assert checked.returncode == 1
    assert "FAIL      authentication: STOWGATE_LISTEN is '0.0.0.0:8080'" in checked.stdout
