"""`stowgate send` run again: after a time-out, and on purpose."""

import http.client
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from answering import Answering, serving
from instances import new_instance
from service import STOWGATE, Service, environment

NOTHING_NEW = "these files were sent before"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "study"
    made.mkdir()
    for number in range(3):
        (made / f"IM{number}").write_bytes(new_instance())
    return made


def command(folder: Path, url: str, *options: str) -> list[str]:
    return [str(STOWGATE), "send", str(folder), "--url", url, *options]


def send(folder: Path, url: str, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(folder, url, *options),
        env=environment(Path("unused"), {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def payload_of(sent: "subprocess.CompletedProcess[str]") -> str:
    assert sent.returncode == 0, sent.stderr
    stored, payload = sent.stdout.splitlines()
    assert stored == "stored 3 of 3 files"
    return payload.removeprefix("payload ")


def payloads(service: Service, folder: Path) -> set[str]:
    return set.union(*(service.payloads_with(file.read_bytes()) for file in folder.iterdir()))


@dataclass
class Line:
    """Between a sender and Stowgate; it holds answers back until `passes` is set."""

    url: str = ""
    answered: threading.Event = field(default_factory=threading.Event)
    passes: threading.Event = field(default_factory=threading.Event)


@contextmanager
def line_to(service: Service) -> Iterator[Line]:
    line = Line()
    place = urlsplit(service.url)

    class PassingOn(Answering):
        def do_POST(self) -> None:
            asked = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
            asked.request("POST", self.path, self.received(), dict(self.headers))
            answer = asked.getresponse()
            body = answer.read()
            asked.close()
            line.answered.set()
            if line.passes.wait(60):
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

    with serving(PassingOn) as line.url:
        yield line


def test_send_that_dies_before_it_sees_the_answer_opens_one_request_when_it_is_run_again(
    stowgate: Service, folder: Path
) -> None:
    with line_to(stowgate) as line:
        first = subprocess.Popen(
            command(folder, line.url),
            env=environment(Path("unused"), {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert line.answered.wait(60)
        first.send_signal(signal.SIGKILL)
        assert first.communicate()[0] == ""
        line.passes.set()

        again = send(folder, line.url)

    assert NOTHING_NEW in again.stderr
    assert payloads(stowgate, folder) == {payload_of(again)}
    assert stowgate.opened(payload_of(again))["file_count"] == 3


def test_send_that_gets_no_answer_says_that_it_can_be_run_again(folder: Path) -> None:
    class HangingUp(Answering):
        def do_POST(self) -> None:
            self.received()

    with serving(HangingUp) as url:
        sent = send(folder, url)

    assert (sent.returncode, sent.stdout) == (2, "")
    assert "may have stored the files: run the command again" in sent.stderr


def test_the_same_files_are_one_request_wherever_they_lie_and_are_told_to_be(
    stowgate: Service, folder: Path
) -> None:
    first = send(folder, stowgate.url)
    copied = Path(shutil.copytree(folder, folder.parent / "a copy of it"))

    again = send(copied, stowgate.url)

    assert NOTHING_NEW not in first.stderr
    assert NOTHING_NEW in again.stderr
    assert payload_of(again) == payload_of(first)


@pytest.mark.parametrize("changed", ["more", "fewer", "other"])
def test_other_files_are_another_request(stowgate: Service, folder: Path, changed: str) -> None:
    first = send(folder, stowgate.url)
    assert first.returncode == 0, first.stderr
    if changed == "fewer":
        (folder / "IM0").unlink()
    else:
        (folder / ("IM3" if changed == "more" else "IM1")).write_bytes(new_instance())

    second = send(folder, stowgate.url)

    assert second.returncode == 0, second.stderr
    assert NOTHING_NEW not in second.stderr
    assert second.stdout.split()[-1] != first.stdout.split()[-1]


def test_the_same_files_to_another_workflow_are_another_request(
    stowgate: Service, folder: Path
) -> None:
    first = send(folder, stowgate.url, "--workflow", "w-1")
    second = send(folder, stowgate.url, "--workflow", "w-2")

    assert payload_of(first) != payload_of(second)


def test_with_a_key_of_its_own_the_same_files_are_sent_on_purpose_once_more(
    stowgate: Service, folder: Path
) -> None:
    key = str(uuid4())
    first = payload_of(send(folder, stowgate.url))
    on_purpose = payload_of(send(folder, stowgate.url, "--idempotency-key", key))
    again = send(folder, stowgate.url, "--idempotency-key", key)

    assert on_purpose != first
    assert payload_of(again) == on_purpose
    assert NOTHING_NEW in again.stderr
    assert payloads(stowgate, folder) == {first, on_purpose}


def test_a_key_that_was_used_for_other_files_is_refused_in_words(
    stowgate: Service, folder: Path
) -> None:
    key = str(uuid4())
    payload_of(send(folder, stowgate.url, "--idempotency-key", key))
    (folder / "IM0").write_bytes(new_instance())

    sent = send(folder, stowgate.url, "--idempotency-key", key)

    assert (sent.returncode, sent.stdout) == (2, "")
    assert "422: this Idempotency-Key was used with another body" in sent.stderr


@pytest.mark.parametrize("key", ["", "two words", "line\nfeed", "k" * 256, "schl\u00fcssel"])
def test_an_invalid_idempotency_key_is_refused_with_the_reason(
    stowgate: Service, folder: Path, key: str
) -> None:
    sent = send(folder, stowgate.url, "--idempotency-key", key)

    assert (sent.returncode, sent.stdout) == (2, "")
    (words,) = sent.stderr.splitlines()
    assert "--idempotency-key must be 1 to 255 visible ASCII characters" in words
