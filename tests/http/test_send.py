"""The command `stowgate send`."""

import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from answering import Answering, serving
from click.testing import CliRunner
from commands import run_stowgate
from instances import new_instance, real_file, uid
from limits import MAX_PARTS
from service import STOWGATE, Service, environment

from cli.send import send


def test_send_stores_the_instances_of_a_folder_and_exits_with_0(
    stowgate: Service, files: Path
) -> None:
    sent = run_stowgate("send", files, "--url", stowgate.url)

    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.startswith("stored 2 of 2 files\npayload ")
    assert "skipped 2 files" in sent.stderr
    payload = stowgate.opened(sent.stdout.split()[-1])
    assert payload["file_count"] == 2


def test_send_accepts_the_base_url_of_other_clients(stowgate: Service, files: Path) -> None:
    sent = run_stowgate("send", files, "--url", f"{stowgate.url}/dicomweb/")

    assert sent.returncode == 0, sent.stderr
    assert stowgate.opened(sent.stdout.split()[-1])["route"] == "left-to-workflow-manager"


def test_send_reports_the_file_that_failed_and_exits_with_1(stowgate: Service, files: Path) -> None:
    good, bad = files / "IMAGES" / "IM0", files / "README.TXT"

    sent = run_stowgate("send", good, bad, "--url", stowgate.url)

    assert sent.returncode == 1
    assert "stored 1 of 2 files" in sent.stdout
    assert f"failed: {bad}: " in sent.stdout
    assert "DICM" in sent.stdout


def test_send_reports_a_file_whose_name_is_not_valid_utf_8(stowgate: Service, files: Path) -> None:
    bad = files / os.fsdecode(b"caf\xe9.dcm")
    bad.write_bytes(b"no DICOM")

    sent = run_stowgate("send", bad, "--url", stowgate.url, PYTHONIOENCODING="utf-8:strict")

    assert sent.returncode == 1, sent.stderr
    assert f"failed: {files}/caf\N{REPLACEMENT CHARACTER}.dcm: " in sent.stdout


def test_send_puts_study_workflow_and_vae_into_the_url(stowgate: Service, files: Path) -> None:
    title = f"AE-{uuid4().hex[:6]}"
    added = run_stowgate("vae", "add", title, "--workflow", "w-1", "--url", stowgate.url)
    assert added.returncode == 0, added.stderr
    study = uid(real_file(), "StudyInstanceUID")

    sent = run_stowgate(
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
    sent = run_stowgate("send", files, "--url", stowgate.url, *options)

    assert sent.returncode == 2
    assert words in sent.stderr


def test_send_reports_that_no_server_listens_and_exits_with_2(files: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        sent = run_stowgate("send", files, "--url", f"http://127.0.0.1:{closed.getsockname()[1]}")

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


def _run_kept_by_modes(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """As `run_stowgate`, but file modes apply to root too: the process drops CAP_DAC_OVERRIDE and
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

    sent = run_stowgate("send", files, "--url", stowgate.url)

    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.startswith("stored 3 of 3 files\npayload ")


def test_send_reports_a_dangling_link_and_exits_with_1(stowgate: Service, files: Path) -> None:
    (files / "gone").symlink_to(files / "nowhere")

    sent = run_stowgate("send", files, "--url", stowgate.url)

    assert sent.returncode == 1
    assert f"{files / 'gone'} cannot be read: No such file or directory" in sent.stderr


def test_send_skips_a_pipe_in_a_folder(stowgate: Service, files: Path) -> None:
    os.mkfifo(files / "pipe")

    sent = run_stowgate("send", files, "--url", stowgate.url)

    assert sent.returncode == 0, sent.stderr
    assert "skipped 3 files" in sent.stderr


@pytest.mark.parametrize("named", ["pipe", "/dev/stdin", "/dev/null"])
def test_send_refuses_a_named_path_that_is_not_a_regular_file(
    stowgate: Service, files: Path, named: str
) -> None:
    os.mkfifo(files / "pipe")

    sent = run_stowgate("send", files / "IMAGES", files / named, "--url", stowgate.url)

    assert (sent.returncode, sent.stdout) == (2, "")
    assert f"{files / named} is not a regular file" in sent.stderr


@pytest.mark.parametrize("name", ["dicomdir", "DicomDir"])
def test_send_skips_a_dicomdir_in_upper_or_lower_case(
    stowgate: Service, files: Path, name: str
) -> None:
    (files / "DICOMDIR").rename(files / name)

    sent = run_stowgate("send", files, "--url", stowgate.url)

    assert sent.stdout.startswith("stored 2 of 2 files\npayload ")


def test_send_uses_the_singular_for_one_file(stowgate: Service, files: Path) -> None:
    (files / "DICOMDIR").unlink()
    (files / "IMAGES" / "IM0").unlink()

    sent = run_stowgate("send", files, "--url", stowgate.url)

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

    sent = run_stowgate("send", files, "--url", stowgate.url)

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
        sent = run_stowgate("send", files, "--url", url)

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
        sent = run_stowgate("send", files / "IMAGES", "--url", url)

    assert (sent.returncode, sent.stdout) == (2, "")
    (line,) = sent.stderr.splitlines()
    assert f"{url}/dicomweb/studies answered {status}" in line
    assert "is this the URL of the API?" in line


def test_send_reports_too_many_files_for_one_request(stowgate: Service, tmp_path: Path) -> None:
    instance = new_instance()
    for number in range(MAX_PARTS + 100):
        (tmp_path / f"{number}.dcm").write_bytes(instance)

    sent = run_stowgate("send", tmp_path, "--url", stowgate.url)

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
    assert run_stowgate("send", tmp_path).returncode == 2


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
