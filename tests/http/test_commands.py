"""The command `stowgate`, as operators use it."""

import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from answering import Answering, serving
from click.testing import CliRunner
from disks import small_disk
from engines import ObjectStoreEndpoint
from instances import new_instance, real_file, uid
from limits import MAX_PARTS
from service import STOWGATE, Service, environment, running, wait_for
from versioning import clear_versions, versioned

from cli.send import send


def _run(
    *arguments: str | Path, data: Path | None = None, **settings: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, *map(str, arguments)],
        env=environment(data or Path("unused"), settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder as on a CD: two instances, a DICOMDIR and another file."""
    folder = tmp_path / "a folder"
    (folder / "IMAGES").mkdir(parents=True)
    for number in range(2):
        (folder / "IMAGES" / f"IM{number}").write_bytes(new_instance())
    (folder / "DICOMDIR").write_bytes(real_file())
    (folder / "README.TXT").write_text("read me")
    return folder


def test_send_stores_the_instances_of_a_folder_and_exits_with_0(
    stowgate: Service, files: Path
) -> None:
    sent = _run("send", files, "--url", stowgate.url)

    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.startswith("stored 2 of 2 files\npayload ")
    assert "skipped 2 files" in sent.stderr
    payload = stowgate.opened(sent.stdout.split()[-1])
    assert payload["file_count"] == 2


def test_send_accepts_the_base_url_of_other_clients(stowgate: Service, files: Path) -> None:
    sent = _run("send", files, "--url", f"{stowgate.url}/dicomweb/")

    assert sent.returncode == 0, sent.stderr
    assert stowgate.opened(sent.stdout.split()[-1])["route"] == "left-to-workflow-manager"


def test_send_reports_the_file_that_failed_and_exits_with_1(stowgate: Service, files: Path) -> None:
    good, bad = files / "IMAGES" / "IM0", files / "README.TXT"

    sent = _run("send", good, bad, "--url", stowgate.url)

    assert sent.returncode == 1
    assert "stored 1 of 2 files" in sent.stdout
    assert f"failed: {bad}: " in sent.stdout
    assert "DICM" in sent.stdout


def test_send_reports_a_file_whose_name_is_not_valid_utf_8(stowgate: Service, files: Path) -> None:
    bad = files / os.fsdecode(b"caf\xe9.dcm")
    bad.write_bytes(b"no DICOM")

    sent = _run("send", bad, "--url", stowgate.url, PYTHONIOENCODING="utf-8:strict")

    assert sent.returncode == 1, sent.stderr
    assert f"failed: {files}/caf\N{REPLACEMENT CHARACTER}.dcm: " in sent.stdout


def test_send_puts_study_workflow_and_vae_into_the_url(stowgate: Service, files: Path) -> None:
    title = f"AE-{uuid4().hex[:6]}"
    added = _run("vae", "add", title, "--workflow", "w-1", "--url", stowgate.url)
    assert added.returncode == 0, added.stderr
    study = uid(real_file(), "StudyInstanceUID")

    sent = _run(
        *("send", files, "--url", stowgate.url),
        *("--vae", title, "--workflow", "w-2", "--study", study),
    )

    payload = stowgate.opened(sent.stdout.split()[-1])
    assert (payload["destination"], payload["workflows"]) == (title, ["w-2"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workflow", "not legal"], "workflow id"),
        (["--vae", "nobody"], "no Virtual Application Entity"),
        (["--study", "x"], "is not valid: it must have up to 64 characters"),
    ],
)
def test_send_reports_the_reason_of_a_refusal_and_exits_with_2(
    stowgate: Service, files: Path, options: list[str], words: str
) -> None:
    sent = _run("send", files, "--url", stowgate.url, *options)

    assert sent.returncode == 2
    assert words in sent.stderr


def test_send_reports_that_no_server_listens_and_exits_with_2(files: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        sent = _run("send", files, "--url", f"http://127.0.0.1:{closed.getsockname()[1]}")

    assert sent.returncode == 2
    assert "is Stowgate running there?" in sent.stderr


def test_send_reports_an_unreadable_file_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, files: Path
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Tests may run as root, who can read any file.
    monkeypatch.setattr(Path, "open", refused)
    sent = CliRunner().invoke(send, [str(files)])

    assert sent.exit_code == 2
    assert "cannot be read: Permission denied" in sent.stderr


def test_https_to_an_api_without_tls_is_not_reported_as_a_certificate_error(
    stowgate: Service,
) -> None:
    asked = _run("payloads", "list", "--url", stowgate.url.replace("http://", "https://"))

    assert (asked.returncode, asked.stdout) == (2, "")
    assert "does not answer in TLS" in asked.stderr
    assert "should the URL begin with http://?" in asked.stderr
    assert "certificate" not in asked.stderr


def _run_kept_by_modes(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """As `_run`, but file modes apply to root too: the process drops CAP_DAC_OVERRIDE and
    CAP_DAC_READ_SEARCH (capabilities(7), prctl(2))."""
    code = (
        "import ctypes, os, sys\n"
        "for capability in (1, 2): ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, STOWGATE, *arguments],
        env=environment(Path("unused"), {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("closed", ["IMAGES", "IMAGES/IM1"])
def test_send_reports_what_it_cannot_read_in_a_folder_and_sends_the_rest(
    stowgate: Service, files: Path, closed: str
) -> None:
    (files / "IM2").write_bytes(new_instance())
    left_out = files / closed
    mode = left_out.stat().st_mode
    left_out.chmod(0)

    sent = _run_kept_by_modes("send", files, "--url", stowgate.url)

    left_out.chmod(mode)
    assert sent.returncode == 1
    count = 1 if closed == "IMAGES" else 2
    assert stowgate.opened(sent.stdout.split()[-1])["file_count"] == count
    assert f"{left_out} cannot be read: Permission denied" in sent.stderr
    assert "skipped 1 unreadable file or folder" in sent.stderr


def test_send_follows_links_to_folders_and_searches_no_folder_twice(
    stowgate: Service, files: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "IM2").write_bytes(new_instance())
    (files / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(files)

    sent = _run("send", files, "--url", stowgate.url)

    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.startswith("stored 3 of 3 files\npayload ")


def test_send_reports_a_dangling_link_and_exits_with_1(stowgate: Service, files: Path) -> None:
    (files / "gone").symlink_to(files / "nowhere")

    sent = _run("send", files, "--url", stowgate.url)

    assert sent.returncode == 1
    assert f"{files / 'gone'} cannot be read: No such file or directory" in sent.stderr


def test_send_skips_a_pipe_in_a_folder(stowgate: Service, files: Path) -> None:
    os.mkfifo(files / "pipe")

    sent = _run("send", files, "--url", stowgate.url)

    assert sent.returncode == 0, sent.stderr
    assert "skipped 3 files" in sent.stderr


@pytest.mark.parametrize("named", ["pipe", "/dev/stdin", "/dev/null"])
def test_send_refuses_a_named_path_that_is_not_a_regular_file(
    stowgate: Service, files: Path, named: str
) -> None:
    os.mkfifo(files / "pipe")

    sent = _run("send", files / "IMAGES", files / named, "--url", stowgate.url)

    assert (sent.returncode, sent.stdout) == (2, "")
    assert f"{files / named} is not a regular file" in sent.stderr


@pytest.mark.parametrize("name", ["dicomdir", "DicomDir"])
def test_send_skips_a_dicomdir_in_upper_or_lower_case(
    stowgate: Service, files: Path, name: str
) -> None:
    (files / "DICOMDIR").rename(files / name)

    sent = _run("send", files, "--url", stowgate.url)

    assert sent.stdout.startswith("stored 2 of 2 files\npayload ")


def test_send_uses_the_singular_for_one_file(stowgate: Service, files: Path) -> None:
    (files / "DICOMDIR").unlink()
    (files / "IMAGES" / "IM0").unlink()

    sent = _run("send", files, "--url", stowgate.url)

    assert sent.stdout.startswith("stored 1 of 1 file\n")
    assert sent.stderr == "skipped 1 file that is not a DICOM Part 10 instance\n"


@pytest.mark.parametrize(
    ("copies", "words"),
    [
        (1, "1 more is an identical copy of one of them"),
        (2, "2 more are identical copies of some of them"),
    ],
)
def test_send_counts_identical_copies_separately(
    stowgate: Service, files: Path, copies: int, words: str
) -> None:
    for number in range(copies):
        shutil.copy(files / "IMAGES" / "IM0", files / f"copy-{number}")

    sent = _run("send", files, "--url", stowgate.url)

    assert sent.returncode == 0, sent.stderr
    told, _ = sent.stdout.splitlines()
    assert told == f"stored 2 of 2 files; {words}"


@contextmanager
def _answering(status: int, content_type: str | None, body: bytes) -> Iterator[str]:
    """The URL of a server that gives this answer to every POST."""

    class Fixed(Answering):
        def do_POST(self) -> None:
            self.received()
            self.answer(status, body, **({"Content_Type": content_type} if content_type else {}))

    with serving(Fixed) as url:
        yield url


@pytest.mark.parametrize("body", [b"{}", b'{"00081199":{"vr":"SQ"}}'])
def test_send_exits_with_1_if_the_answer_does_not_mention_the_files(
    files: Path, body: bytes
) -> None:
    with _answering(200, "application/dicom+json", body) as url:
        sent = _run("send", files, "--url", url)

    assert sent.returncode == 1
    assert sent.stdout.splitlines() == [
        "stored 0 of 2 files",
        "  unknown: the answer says nothing about 2 files; is this the URL of the API?",
    ]


@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (200, None, b"{}"),
        (200, "text/html", b"<html>welcome</html>"),
        (200, "application/dicom+json", b"<html>"),
        (200, "application/dicom+json", b"[]"),
        (200, "application/dicom+json", b"null"),
        (202, "application/dicom+json", b'{"00081198":{"vr":"SQ","Value":[{}]}}'),
        (204, None, b""),
    ],
)
def test_send_reports_an_answer_that_is_not_a_store_instances_response(
    files: Path, status: int, content_type: str | None, body: bytes
) -> None:
    with _answering(status, content_type, body) as url:
        sent = _run("send", files / "IMAGES", "--url", url)

    assert (sent.returncode, sent.stdout) == (2, "")
    (line,) = sent.stderr.splitlines()
    assert f"{url}/dicomweb/studies answered {status}" in line
    assert "is this the URL of the API?" in line


def test_send_reports_too_many_files_for_one_request(stowgate: Service, tmp_path: Path) -> None:
    instance = new_instance()
    for number in range(MAX_PARTS + 100):
        (tmp_path / f"{number}.dcm").write_bytes(instance)

    sent = _run("send", tmp_path, "--url", stowgate.url)

    assert (sent.returncode, sent.stdout) == (2, "")
    assert f"413: the request has more parts than the limit of {MAX_PARTS}" in sent.stderr


def test_send_reports_a_read_error_within_a_file_and_exits_with_2(
    stowgate: Service, monkeypatch: pytest.MonkeyPatch, files: Path
) -> None:
    class OnABadDisk(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_: OnABadDisk())
    bad = files / "IMAGES" / "IM0"
    sent = CliRunner().invoke(send, [str(bad), "--url", stowgate.url])

    assert sent.exit_code == 2
    assert f"{bad} cannot be read: Input/output error" in sent.stderr


def test_send_without_a_dicom_file_exits_with_2(tmp_path: Path) -> None:
    assert _run("send", tmp_path).returncode == 2


def test_vae_commands_add_list_show_and_remove(stowgate: Service) -> None:
    title = f"AE-{uuid4().hex[:6]}"

    added = _run("vae", "add", title, "--workflow", "w-1", "--url", stowgate.url)
    listed = _run("vae", "list", "--url", stowgate.url)
    shown = _run("vae", "show", title, "--url", stowgate.url)
    again = _run("vae", "add", title, "--url", stowgate.url)
    removed = _run("vae", "remove", title, "--url", stowgate.url)
    gone = _run("vae", "show", title, "--url", stowgate.url)

    assert [r.returncode for r in (added, listed, shown, again, removed, gone)] == [
        0,
        0,
        0,
        2,
        0,
        2,
    ]
    assert json.loads(added.stdout) == json.loads(shown.stdout) == json.loads(removed.stdout)
    assert any(line.split()[:3] == [title, title, "w-1"] for line in listed.stdout.splitlines())
    assert "already" in again.stderr


def test_vae_add_warns_that_several_workflows_depend_on_each_other(stowgate: Service) -> None:
    def add(*workflows: str) -> str:
        given = [word for workflow in workflows for word in ("--workflow", workflow)]
        return _run("vae", "add", f"AE-{uuid4().hex[:6]}", *given, "--url", stowgate.url).stderr

    (line,) = add("a", "b").splitlines()
    assert "starts none of them; see docs/workflows.md" in line
    assert add("a") == add() == ""


def test_vae_add_accepts_a_policy(stowgate: Service) -> None:
    title = f"AE-{uuid4().hex[:6]}"
    ct_image, explicit = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"

    added = _run(
        *("vae", "add", title, "--url", stowgate.url, "--sop-class", ct_image),
        *("--transfer-syntax", explicit, "--modality", "CT", "--modality", "PT"),
        *("--max-instance-bytes", "1000000", "--max-requests-per-minute", "60"),
        *("--source", "CT ROOM 1"),
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
    payload_id = _run("send", files, "--url", stowgate.url).stdout.split()[-1]
    stowgate.opened(payload_id)

    listed = _run("payloads", "list", "--state", "opened", "--url", stowgate.url)
    shown = _run("payloads", "show", payload_id, "--url", stowgate.url)

    assert any(line.startswith(f"{payload_id}  opened") for line in listed.stdout.splitlines())
    assert json.loads(shown.stdout)["workflow_request"]["payload_id"] == payload_id


def test_payloads_list_prints_the_cursor_of_the_next_page(tmp_path: Path) -> None:
    with running("api", tmp_path) as api:
        ids = [
            api.post("/dicomweb/studies", new_instance(), "application/dicom").headers[
                "X-Payload-ID"
            ]
            for _ in range(3)
        ]
        newest = _run("payloads", "list", "--limit", "2", "--url", api.url)
        (options,) = re.findall("more: (.*)\n", newest.stderr)
        rest = _run("payloads", "list", *options.split(), "--url", api.url)

    listed = [line.split()[0] for line in newest.stdout.splitlines()]
    assert listed == ["payload", ids[2], ids[1]]
    assert [line.split()[0] for line in rest.stdout.splitlines()] == ["payload", ids[0]]
    assert rest.stderr == ""


def test_check_passes_with_a_usable_folder(tmp_path: Path) -> None:
    checked = _run("check", data=tmp_path)

    assert checked.returncode == 0, checked.stdout
    assert "FAIL" not in checked.stdout


def test_check_tries_the_addresses_and_the_certificate_authorities(tmp_path: Path) -> None:
    authorities = tmp_path / "authorities.pem"
    authorities.write_text("no certificates")

    checked = _run(
        "check",
        data=tmp_path,
        STOWGATE_LISTEN="203.0.113.1:8080",  # for documentation (RFC 5737)
        STOWGATE_ALLOW_ANYONE="true",
        STOWGATE_CLIENT_CA=str(authorities),
    )

    assert checked.returncode == 1
    failed = [line.split()[1] for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    assert failed == ["STOWGATE_LISTEN:", "STOWGATE_CLIENT_CA:"]


def test_check_accepts_the_address_of_a_running_service(tmp_path: Path) -> None:
    with running("run", tmp_path) as service:
        address = service.url.removeprefix("http://")
        checked = _run("check", data=tmp_path, STOWGATE_LISTEN=address)

    assert checked.returncode == 0, checked.stdout


def test_check_reports_every_failure_and_exits_with_1(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        checked = _run(
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
        checked = _run(
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


@pytest.mark.parametrize("command", ["run", "api", "worker", "check"])
def test_an_invalid_setting_stops_the_start_with_one_line(command: str, tmp_path: Path) -> None:
    variable = "STOWGATE_WORKER_LISTEN" if command == "worker" else "STOWGATE_LISTEN"

    started = _run(command, data=tmp_path, **{variable: "nowhere"})

    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert f"{variable} is 'nowhere', but must be host:port" in line


@pytest.mark.parametrize(
    ("command", "variable"),
    [("run", "STOWGATE_LISTEN"), ("api", "STOWGATE_LISTEN"), ("worker", "STOWGATE_WORKER_LISTEN")],
)
def test_an_address_in_use_stops_the_start_with_one_line(
    command: str, variable: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = _run(command, data=tmp_path, **{variable: address})

    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert f"{variable} is '{address}'" in line
    assert line.endswith(
        "it is in use; stop the other process, or set another port, or 0 for a free one"
    )


@pytest.mark.parametrize(
    "command",
    [["send", "."], ["vae", "list"], ["payloads", "list"], ["payloads", "replay", "--all"]],
)
def test_an_invalid_setting_makes_a_client_command_exit_with_2(command: list[str]) -> None:
    asked = _run(*command, STOWGATE_LISTEN="nowhere")

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
    shown = _run("vae", "show", "\udcff", "--url", stowgate.url)

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
        refused = _run(*command, name, "--url", url)

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
    refused = _run(*command, url)

    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert f"is '{url}', but must be http://host:port/path or https://host:port/path" in line


def test_vae_copy_reports_that_the_source_requires_authentication() -> None:
    class Asking(Answering):
        def do_GET(self) -> None:
            self.answer(401)

    with serving(Asking) as source:
        refused = _run("vae", "copy", source, "--url", "http://127.0.0.1:1")

    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"let this host read {source}/config/vae without authentication" in refused.stderr


def test_a_password_in_a_url_is_not_printed() -> None:
    refused = _run("payloads", "list", "--url", "http://all:hidden-word@127.0.0.1:8080")

    assert refused.returncode == 2
    assert "hidden-word" not in refused.stderr


def test_client_commands_warn_of_an_unknown_variable(stowgate: Service) -> None:
    listed = _run("vae", "list", "--url", stowgate.url, STOWGATE_CLIENT_USR="typo")

    assert listed.returncode == 0
    (line,) = listed.stderr.splitlines()
    assert "STOWGATE_CLIENT_USR is set, but no setting has that name" in line


def test_an_interrupted_send_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "image.dcm").write_bytes(new_instance())
    # A parent process may ignore SIGINT, which child processes inherit.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from cli.main import main; main()"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        sending = subprocess.Popen(
            [sys.executable, "-c", code, "send", tmp_path, "--url", url],
            env=environment(tmp_path, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with sending, silent.accept()[0]:
            sending.send_signal(signal.SIGINT)
            told, said = sending.communicate(timeout=60)

    assert (sending.returncode, told) == (2, "")
    assert "interrupted" in said


def test_an_api_with_the_memory_broker_warns_that_no_worker_is_notified(tmp_path: Path) -> None:
    with running("api", tmp_path) as api:
        assert api.get("/health/ready").ok
        warned = [line for line in api.log.read_text().splitlines() if '"warning"' in line]

    (line,) = warned
    assert "STOWGATE_BROKER=memory" in json.loads(line)["event"]


def test_every_command_prints_its_usage() -> None:
    for command in ("run", "api", "worker", "send", "vae", "payloads", "user", "check"):
        shown = _run(command, "--help")
        assert shown.returncode == 0
        assert "Usage: stowgate" in shown.stdout


@pytest.mark.parametrize("command", [[], ["vae"], ["payloads"]])
def test_help_describes_each_command_in_a_complete_sentence(command: list[str]) -> None:
    _, summaries = _run(*command, "--help").stdout.split("Commands:\n")

    for line in summaries.splitlines():
        assert re.fullmatch(r"  [a-z]+ +[A-Z].*[^.]\.", line)


def test_run_prints_the_public_url_that_senders_use(tmp_path: Path) -> None:
    public_url = "https://pacs.example/stow"
    with running("run", tmp_path, STOWGATE_PUBLIC_URL=public_url) as service:
        assert service.process.stdout
        told = service.process.stdout.readline()

    assert told.split() == ["send", "DICOM", "to", f"{public_url}/dicomweb/studies"]


def test_a_restarted_run_finds_the_payloads_of_the_previous_one(tmp_path: Path) -> None:
    with running("run", tmp_path) as first:
        answer = first.post("/dicomweb/studies", new_instance(), "application/dicom")
        payload_id = answer.headers["X-Payload-ID"]
        first.opened(payload_id)
        assert first.stop() == 0

    with running("run", tmp_path) as second:
        assert second.get(f"/payloads/{payload_id}").json()["state"] == "opened"


def _hang_up(service: Service) -> None:
    """Send SIGHUP to every process, as a closing terminal does."""
    for process_id in service.process_ids():
        os.kill(process_id, signal.SIGHUP)


@contextmanager
def _hang_up_means(action: signal.Handlers) -> Iterator[None]:
    """Set the disposition of SIGHUP that child processes inherit."""
    before = signal.signal(signal.SIGHUP, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def attached() -> Iterator[None]:
    """Child processes react to SIGHUP, even if the tests run under nohup(1)."""
    with _hang_up_means(signal.SIG_DFL):
        yield


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("command", ["run", "api", "worker"])
def test_a_service_ends_with_its_terminal(command: str, tmp_path: Path) -> None:
    with running(command, tmp_path) as service:
        assert service.get("/health/live").status_code == 200

        _hang_up(service)

        assert service.process.wait(60) == 0


@pytest.fixture
def detached() -> Iterator[None]:
    """Child processes ignore SIGHUP, as under nohup(1)."""
    with _hang_up_means(signal.SIG_IGN):
        yield


@pytest.mark.usefixtures("detached")
@pytest.mark.parametrize("command", ["run", "api", "worker"])
def test_a_detached_service_outlives_its_terminal(command: str, tmp_path: Path) -> None:
    with running(command, tmp_path) as service:
        assert service.get("/health/live").status_code == 200
        before = service.process_ids()

        _hang_up(service)

        assert service.get("/health/live").status_code == 200
        assert service.process_ids() == before
        assert service.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_change_the_number_of_gunicorn_processes_are_ignored(
    stowgate: Service, number: int
) -> None:
    assert stowgate.get("/health/live").status_code == 200
    status = Path(f"/proc/{stowgate.process.pid}/status").read_text()
    (ignored,) = re.findall(r"SigIgn:\s+([0-9a-f]+)", status)

    assert int(ignored, 16) >> (number - 1) & 1


def test_a_pending_payload_is_opened_after_the_next_start(tmp_path: Path) -> None:
    with running("api", tmp_path) as api:
        answer = api.post("/dicomweb/studies", new_instance(), "application/dicom")
        payload_id = answer.headers["X-Payload-ID"]
        assert api.get(f"/payloads/{payload_id}").json()["state"] == "pending"
        api.kill()

    with running("run", tmp_path) as pair:
        assert pair.opened(payload_id)["file_count"] == 1
        wait_for(lambda: pair.metric("stowgate_announced_again_total"))


def test_the_metrics_of_two_api_processes_are_added_up(tmp_path: Path) -> None:
    with running("api", tmp_path, STOWGATE_API_PROCESSES="2") as api:
        for _ in range(10):
            assert api.post("/dicomweb/studies", new_instance(), "application/dicom").ok

        def all_counted() -> bool:
            return 'stowgate_posts_total{status="200"} 10.0' in api.get("/metrics").text

        wait_for(all_counted, seconds=10)


def test_a_full_disk_of_temporary_files_crashes_no_api_process(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "small", mebibytes=1) as disk,
        running("api", tmp_path / "data", STOWGATE_API_PROCESSES="2", TMPDIR=str(disk)) as api,
    ):
        wait_for(lambda: len(api.process_ids()) == 3)
        assert api.get("/health/live").status_code == 200
        before = api.process_ids()
        with suppress(OSError):
            (disk / "full").write_bytes(bytes(2 << 20))

        for _ in range(10):
            assert api.post("/dicomweb/studies", new_instance(), "application/dicom").ok
        assert api.process_ids() == before
