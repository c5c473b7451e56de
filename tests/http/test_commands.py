"""The commands of operators: `vae`, `payloads`, `check` and the help of all."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from answering import Answering, serving
from commands import run_stowgate
from engines import ObjectStoreEndpoint
from instances import new_instance
from service import Service, running
from versioning import clear_versions, versioned


def test_https_to_an_api_without_tls_is_not_reported_as_a_certificate_error(
    stowgate: Service,
) -> None:
    asked = run_stowgate("payloads", "list", "--url", stowgate.url.replace("http://", "https://"))

    assert (asked.returncode, asked.stdout) == (2, "")
    assert "does not answer in TLS" in asked.stderr
    assert "should the URL begin with http://?" in asked.stderr
    assert "certificate" not in asked.stderr


def test_vae_commands_add_list_show_and_remove(stowgate: Service) -> None:
    title = f"AE-{uuid4().hex[:6]}"

    added = run_stowgate("vae", "add", title, "--workflow", "w-1", "--json", "--url", stowgate.url)
    listed = run_stowgate("vae", "list", "--url", stowgate.url)
    shown = run_stowgate("vae", "show", title, "--json", "--url", stowgate.url)
    again = run_stowgate("vae", "add", title, "--url", stowgate.url)
    removed = run_stowgate("vae", "remove", title, "--json", "--url", stowgate.url)
    gone = run_stowgate("vae", "show", title, "--url", stowgate.url)

    assert [r.returncode for r in (added, listed, shown, again, removed, gone)] == [
        0,
        0,
        0,
        2,
        0,
        2,
    ]
    assert json.loads(added.stdout) == json.loads(shown.stdout) == json.loads(removed.stdout)
    assert any(
        re.fullmatch(f"{title} +{title} .* w-1", line) for line in listed.stdout.splitlines()
    )
    assert "already" in again.stderr


def test_vae_add_and_remove_print_the_result_for_people(stowgate: Service) -> None:
    title = f"AE-{uuid4().hex[:6]}"

    added = run_stowgate("vae", "add", title, "--modality", "CT", "--url", stowgate.url)
    shown = run_stowgate("vae", "show", title, "--url", stowgate.url)
    removed = run_stowgate("vae", "remove", title, "--url", stowgate.url)

    assert re.search("^modalities +CT$", added.stdout, re.MULTILINE)
    assert shown.stdout == added.stdout
    assert removed.stdout == f"removed {title}\n"


def test_vae_add_warns_that_several_workflows_depend_on_each_other(stowgate: Service) -> None:
    def add(*workflows: str) -> str:
        given = [word for workflow in workflows for word in ("--workflow", workflow)]
        title = f"AE-{uuid4().hex[:6]}"
        return run_stowgate("vae", "add", title, *given, "--url", stowgate.url).stderr

    (line,) = add("a", "b").splitlines()
    assert "starts none of them; see docs/workflows.md" in line
    assert add("a") == add() == ""


def test_vae_add_accepts_a_policy(stowgate: Service) -> None:
    title = f"AE-{uuid4().hex[:6]}"
    ct_image, explicit = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"

    added = run_stowgate(
        *("vae", "add", title, "--url", stowgate.url, "--sop-class", ct_image),
        *("--transfer-syntax", explicit, "--modality", "CT", "--modality", "PT"),
        *("--max-instance-bytes", "1000000", "--max-requests-per-minute", "60"),
        *("--source", "CT ROOM 1", "--json"),
    )

    assert added.returncode == 0, added.stderr
    policy = {
        "acceptedSopClasses": [ct_image],
        "acceptedTransferSyntaxes": [explicit],
        "acceptedModalities": ["CT", "PT"],
        "maxInstanceBytes": 1_000_000,
        "maxRequestsPerMinute": 60,
        "source": "CT ROOM 1",
    }
    assert policy.items() <= json.loads(added.stdout).items()


def test_payloads_commands_list_and_show(stowgate: Service, files: Path) -> None:
    payload_id = run_stowgate("send", files, "--url", stowgate.url).stdout.split()[-1]
    stowgate.opened(payload_id)

    listed = run_stowgate("payloads", "list", "--state", "opened", "--url", stowgate.url)
    shown = run_stowgate("payloads", "show", payload_id, "--url", stowgate.url)
    complete = run_stowgate("payloads", "show", payload_id, "--json", "--url", stowgate.url)

    assert any(line.startswith(f"{payload_id}  opened") for line in listed.stdout.splitlines())
    assert re.search("^state +opened: ", shown.stdout, re.MULTILINE)
    assert json.loads(complete.stdout)["workflow_request"]["payload_id"] == payload_id


def test_payloads_list_prints_the_cursor_of_the_next_page(tmp_path: Path) -> None:
    with running("api", tmp_path) as api:
        ids = [
            api.post("/dicomweb/studies", new_instance(), "application/dicom").headers[
                "X-Payload-ID"
            ]
            for _ in range(3)
        ]
        newest = run_stowgate("payloads", "list", "--limit", "2", "--url", api.url)
        (options,) = re.findall("more: (.*)\n", newest.stderr)
        rest = run_stowgate("payloads", "list", *options.split(), "--url", api.url)

    listed = [line.split()[0] for line in newest.stdout.splitlines()]
    assert listed == ["payload", ids[2], ids[1]]
    assert [line.split()[0] for line in rest.stdout.splitlines()] == ["payload", ids[0]]
    assert rest.stderr == ""


def test_check_passes_with_a_usable_folder(tmp_path: Path) -> None:
    checked = run_stowgate("check", data=tmp_path)

    assert checked.returncode == 0, checked.stdout
    assert "FAIL" not in checked.stdout


def test_check_tries_the_addresses_and_the_certificate_authorities(tmp_path: Path) -> None:
    authorities = tmp_path / "authorities.pem"
    authorities.write_text("no certificates")

    checked = run_stowgate(
        "check",
        data=tmp_path,
        STOWGATE_LISTEN="203.0.113.1:8080",  # for documentation (RFC 5737)
        STOWGATE_ALLOW_ANYONE="true",
        STOWGATE_CLIENT_CA=str(authorities),
    )

    assert checked.returncode == 1
    failed = [line.split()[1] for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    assert failed == ["STOWGATE_LISTEN:", "STOWGATE_CLIENT_CA:"]


def test_check_reports_the_watermark_of_spool_and_store_in_the_same_words(tmp_path: Path) -> None:
    checked = run_stowgate("check", data=tmp_path, STOWGATE_MIN_FREE_BYTES=str(10**17))

    assert checked.returncode == 1
    failed = [line for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    words = (
        f"its disk has less free space than STOWGATE_MIN_FREE_BYTES, which is {10**17}; free some "
        "space"
    )
    assert failed == [
        f"FAIL      spool: {tmp_path / 'spool'}: {words}",
        f"FAIL      free space: {tmp_path / 'monaideploy'}: {words}",
    ]


def test_check_accepts_the_address_of_a_running_service(tmp_path: Path) -> None:
    with running("run", tmp_path) as service:
        address = service.url.removeprefix("http://")
        checked = run_stowgate("check", data=tmp_path, STOWGATE_LISTEN=address)

    assert checked.returncode == 0, checked.stdout


def test_check_reports_every_failure_and_exits_with_1(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        checked = run_stowgate(
            "check",
            data=tmp_path,
            STOWGATE_BROKER=f"amqp://guest:hidden-word@127.0.0.1:{port}/vhost",
            STOWGATE_OBJECT_STORE=f"http://127.0.0.1:{port}",
            STOWGATE_OBJECT_STORE_ACCESS_KEY="access",
            STOWGATE_OBJECT_STORE_SECRET_KEY="hidden-word",
            STOWGATE_BROKR="typo",
        )

    assert checked.returncode == 1
    wrong = [line.split()[1] for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    assert wrong == ["bucket", "bucket", "broker:", "queue", "refusals"]
    assert "STOWGATE_BROKR" in checked.stdout
    assert "hidden-word" not in checked.stdout + checked.stderr


@pytest.mark.parametrize("rule", [True, False])
def test_check_warns_of_a_versioned_state_bucket_without_a_lifecycle_rule(
    tmp_path: Path, object_store_endpoint: ObjectStoreEndpoint, bucket: str, rule: bool
) -> None:
    with versioned(object_store_endpoint) as state:
        if rule:
            clear_versions(object_store_endpoint, state)
        checked = run_stowgate(
            "check",
            data=tmp_path,
            STOWGATE_OBJECT_STORE=object_store_endpoint.url,
            STOWGATE_OBJECT_STORE_ACCESS_KEY=object_store_endpoint.access_key,
            STOWGATE_OBJECT_STORE_SECRET_KEY=object_store_endpoint.secret_key,
            STOWGATE_BUCKET=bucket,
            STOWGATE_STATE_BUCKET=state,
        )

    assert checked.returncode == 0, checked.stdout
    warnings = [line for line in checked.stdout.splitlines() if line.startswith("warning")]
    assert [state in line and "lifecycle rule" in line for line in warnings] == [True] * (not rule)


@pytest.mark.parametrize(
    "command",
    [["send", "."], ["vae", "list"], ["payloads", "list"], ["payloads", "replay", "--all"]],
)
def test_an_invalid_setting_makes_a_client_command_exit_with_2(command: list[str]) -> None:
    asked = run_stowgate(*command, STOWGATE_LISTEN="nowhere")

    assert asked.returncode == 2
    (line,) = asked.stderr.splitlines()
    assert "STOWGATE_LISTEN is 'nowhere', but must be host:port" in line


@contextmanager
def _recording() -> Iterator[tuple[str, list[str]]]:
    """The URL of a server without any resources, and the paths that were requested."""
    asked: list[str] = []

    class Recording(Answering):
        def log_request(self, *_: Any) -> None:
            asked.append(self.path)

    with serving(Recording) as url:
        yield url, asked


def test_a_name_that_is_not_valid_utf_8_is_sent_like_any_other(stowgate: Service) -> None:
    shown = run_stowgate("vae", "show", "\udcff", "--url", stowgate.url)

    assert shown.returncode == 2
    assert shown.stderr.startswith("Error: 404: no VAE has that name")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["vae", "show"], ""),
        (["vae", "show"], "."),
        (["vae", "show"], ".."),
        (["vae", "remove"], ""),
        (["payloads", "show"], ""),
        (["payloads", "replay", "01890000-0000-7000-8000-000000000000"], ""),
        (["send", ".", "--study"], ""),
        (["send", ".", "--workflow"], ""),
        (["send", ".", "--vae"], ".."),
    ],
)
def test_a_name_that_would_change_the_path_is_refused_before_any_request(
    command: list[str], name: str
) -> None:
    with _recording() as (url, asked):
        refused = run_stowgate(*command, name, "--url", url)

    assert (refused.returncode, refused.stdout, asked) == (2, "", [])
    assert f"'{name}' " in refused.stderr


@pytest.mark.parametrize(
    ("command", "url"),
    [
        (["payloads", "list", "--url"], ""),
        (["payloads", "list", "--url"], "localhost"),
        (["payloads", "list", "--url"], "ftp://127.0.0.1"),
        (["payloads", "list", "--url"], "http://"),
        (["send", ".", "--url"], "127.0.0.1:8080"),
        (["vae", "copy"], "localhost:8080"),
    ],
)
def test_a_url_without_http_or_host_is_reported_in_one_line(command: list[str], url: str) -> None:
    refused = run_stowgate(*command, url)

    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert f"is '{url}', but must be http://host:port/path or https://host:port/path" in line


def test_vae_copy_reports_that_the_source_requires_authentication() -> None:
    class Asking(Answering):
        def do_GET(self) -> None:
            self.answer(401)

    with serving(Asking) as source:
        refused = run_stowgate("vae", "copy", source, "--url", "http://127.0.0.1:1")

    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"let this host read {source}/config/vae without authentication" in refused.stderr


def test_a_password_in_a_url_is_not_printed() -> None:
    refused = run_stowgate("payloads", "list", "--url", "http://all:hidden-word@127.0.0.1:8080")

    assert refused.returncode == 2
    assert "hidden-word" not in refused.stderr


def test_client_commands_warn_of_an_unknown_variable(stowgate: Service) -> None:
    listed = run_stowgate("vae", "list", "--url", stowgate.url, STOWGATE_CLIENT_USR="typo")

    assert listed.returncode == 0
    (line,) = listed.stderr.splitlines()
    assert "STOWGATE_CLIENT_USR is set, but no setting has that name" in line


def test_every_command_prints_its_usage() -> None:
    for command in ("run", "api", "worker", "send", "vae", "payloads", "user", "check"):
        shown = run_stowgate(command, "--help")
        assert shown.returncode == 0
        assert "Usage: stowgate" in shown.stdout


@pytest.mark.parametrize("command", [[], ["vae"], ["payloads"]])
def test_help_describes_each_command_in_a_complete_sentence(command: list[str]) -> None:
    _, summaries = run_stowgate(*command, "--help").stdout.split("Commands:\n")

    for line in summaries.splitlines():
        assert re.fullmatch(r"  [a-z]+ +[A-Z].*[^.]\.", line)
