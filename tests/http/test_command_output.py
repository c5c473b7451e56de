"""What `stowgate payloads` and `stowgate vae` print, on a terminal and in a pipe."""

import json
import os
import pty
import re
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from answering import Answering, serving
from commands import run_stowgate
from rich.cells import cell_len
from service import STOWGATE

PAYLOAD_ID = "01890000-0000-7000-8000-000000000001"
ERROR = (
    "the Workflow Manager gave up the workflow request after several deliveries. Create or correct "
    f"the workflow, then replay the payload (stowgate payloads replay {PAYLOAD_ID})"
)
REFUSED = {
    "payload_id": PAYLOAD_ID,
    "correlation_id": "6179d975-4e07-41f0-a882-fcb5e246a944",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "state": "refused",
    "received_at": "2025-11-29T12:00:00.123456Z",
    "opened_at": "2025-11-29T12:00:01.000000Z",
    "refused_at": "2025-11-29T12:00:13.000000Z",
    "refusals": 2,
    "source": "10.20.30.40",
    "destination": "LUNG",
    "workflows": ["w-1", "w-2"],
    "route": "workflows-of-vae",
    "file_count": 412,
    "attempts": 1,
    "last_error": ERROR,
}
OPENED = REFUSED | {"state": "opened", "refused_at": None, "refusals": 0, "last_error": None}
PENDING = OPENED | {"state": "pending", "opened_at": None, "attempts": 0, "trace_id": None}
FAILED = PENDING | {"state": "failed", "attempts": 3, "last_error": "too large"}

VAE = {
    "name": "Lung",
    "virtualAeTitle": "LUNG",
    "workflows": ["w-1", "w-2"],
    "plugInAssemblies": [],
    "dateTimeCreated": "2025-11-29T12:00:00.123456Z",
    "createdBy": "operator",
    "acceptedModalities": ["CT", "PT"],
    "maxInstanceBytes": 1_000_000,
}

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
_SEQUENCE = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def _answering(body: Any) -> Iterator[str]:
    """The URL of an API that answers every GET with this."""

    class Fixed(Answering):
        def do_GET(self) -> None:
            self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

    with serving(Fixed) as url:
        yield url


def _piped(body: Any, *arguments: str, **settings: str) -> list[str]:
    with _answering(body) as url:
        done = run_stowgate(*arguments, "--url", url, data=None, TZ="UTC", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def _on_terminal(body: Any, *arguments: str, columns: int = 80, **settings: str) -> list[str]:
    """The lines that a terminal of this width receives."""
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    receiver, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, columns))
    with _answering(body) as url:
        process = subprocess.Popen(
            [STOWGATE, *arguments, "--url", url],
            env=kept | {"TERM": "xterm", "TZ": "UTC"} | settings,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        with process, os.fdopen(receiver, "rb", buffering=0) as received:
            output = b"".join(iter(lambda: _read(received.fileno()), b""))
    assert process.returncode == 0, output
    return output.decode().splitlines()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # EIO: the last process has closed the terminal
        return b""


def _plain(lines: list[str]) -> list[str]:
    return [_SEQUENCE.sub("", line) for line in lines]


def _fields(lines: list[str]) -> dict[str, str]:
    """The texts by their labels, of lines in a pipe."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


def _page(*rows: Any) -> dict[str, Any]:
    return {"payloads": [*rows], "next": None}


def test_show_prints_the_story_of_a_payload_with_a_line_for_each_field() -> None:
    lines = _piped(REFUSED, "payloads", "show", PAYLOAD_ID)

    fields = {
        label: re.sub(r"[0-9]+ d ago", "N d ago", text) for label, text in _fields(lines).items()
    }
    assert fields == {
        "payload": PAYLOAD_ID,
        "state": "refused: the Workflow Manager refused the workflow request",
        "received": "2025-11-29 12:00:00 UTC, N d ago",
        "source": "10.20.30.40",
        "destination": "LUNG",
        "instances": "412",
        "workflows": "w-1, w-2 (from the VAE)",
        "attempts": "1",
        "opened": "2025-11-29 12:00:01 UTC, N d ago",
        "refused": "2025-11-29 12:00:13 UTC, N d ago, 2 times so far",
        "last error": ERROR,
        "correlation id": REFUSED["correlation_id"],
        "trace id": REFUSED["trace_id"],
        "to replay": f"stowgate payloads replay {PAYLOAD_ID}",
    }


@pytest.mark.parametrize(
    ("row", "meaning"),
    [
        (PENDING, "waiting for a worker"),
        (PENDING | {"attempts": 1}, "a worker is processing it"),
        (PENDING | {"attempts": 2, "last_error": "no queue"}, "a worker will try again"),
        (
            REFUSED | {"state": "pending", "refused_at": None, "last_error": None},
            "the workflow request will be published again",
        ),
        (OPENED, "the workflow request was published"),
        (FAILED, "no workflow request could be published"),
    ],
)
def test_show_explains_each_state(row: dict[str, Any], meaning: str) -> None:
    fields = _fields(_piped(row, "payloads", "show", PAYLOAD_ID))

    assert fields["state"] == f"{row['state']}: {meaning}"
    assert ("to replay" in fields) == (row["state"] == "failed")
    assert fields.get("last error") == row["last_error"]
    assert fields.get("trace id") == row["trace_id"]


@pytest.mark.parametrize(
    ("route", "workflows", "shown"),
    [
        (None, None, "not selected yet"),
        ("workflow-in-url", ["w-1"], "w-1 (from the URL)"),
        ("left-to-workflow-manager", [], "selected by the Workflow Manager"),
        ("of-a-newer-release", ["w-1"], "w-1 (of-a-newer-release)"),
    ],
)
def test_show_says_who_selected_the_workflows(
    route: str | None, workflows: list[str] | None, shown: str
) -> None:
    row = OPENED | {"route": route, "workflows": workflows}

    assert _fields(_piped(row, "payloads", "show", PAYLOAD_ID))["workflows"] == shown


def _task(task_id: str, status: str, reason: str = "None") -> dict[str, str]:
    return {"task_id": task_id, "task_type": "argo", "status": status, "reason": reason}


def _instance(name: str, status: str, *tasks: dict[str, str]) -> dict[str, Any]:
    return {"workflow_name": name, "workflow_id": "w-1", "status": status, "tasks": tasks}


@pytest.mark.parametrize(
    ("instances", "error", "shown"),
    [
        (None, None, []),
        (None, "it cannot be reached", ["unknown: it cannot be reached"]),
        ([], None, ["has started no workflow"]),
        (
            [
                _instance(
                    "Lung nodules",
                    "Failed",
                    _task("router", "Succeeded"),
                    _task("segment", "Failed", "ExternalServiceError"),
                ),
                _instance("Export", "Created"),
            ],
            None,
            [
                "Lung nodules: Failed; tasks: 1 Succeeded, 1 Failed; segment failed: "
                "ExternalServiceError",
                "Export: Created",
            ],
        ),
    ],
)
def test_show_prints_what_the_workflow_manager_reports(
    instances: Any, error: str | None, shown: list[str]
) -> None:
    row = OPENED | {"workflow_instances": instances, "workflow_instances_error": error}

    lines = _piped(row, "payloads", "show", PAYLOAD_ID)

    first = next((n for n, line in enumerate(lines) if line.startswith("Workflow Manager")), 0)
    assert [line[18:] for line in lines[first : first + len(shown)]] == shown
    assert bool(first) == bool(shown)


def test_show_on_a_terminal_fits_the_width_and_omits_nothing() -> None:
    lines = _plain(_on_terminal(REFUSED, "payloads", "show", PAYLOAD_ID))

    assert max(map(cell_len, lines)) <= 80
    texts = " ".join(line[16:].strip() for line in lines)
    assert ERROR in texts


def test_a_list_on_a_narrow_terminal_has_the_error_below_its_row() -> None:
    header, opened, refused, error = _plain(
        _on_terminal(_page(OPENED, REFUSED), "payloads", "list")
    )

    assert header.split() == ["payload", "state", "age", "instances"]
    assert re.fullmatch(rf"{PAYLOAD_ID}  opened  +[0-9]+ d +412", opened)
    assert re.fullmatch(rf"{PAYLOAD_ID}  refused +[0-9]+ d +412", refused)
    assert error == f"  {ERROR[:77]}\N{HORIZONTAL ELLIPSIS}"
    assert cell_len(error) == 80


def test_a_list_on_a_wide_terminal_has_the_error_beside_its_row() -> None:
    lines = _plain(_on_terminal(_page(OPENED, REFUSED), "payloads", "list", columns=120))

    header, _, refused = lines
    at = header.index("last error")
    assert refused[at:] == f"{ERROR[: 119 - at]}\N{HORIZONTAL ELLIPSIS}"


def test_a_list_in_a_pipe_has_one_complete_line_for_each_payload() -> None:
    _, opened, refused = _piped(_page(OPENED, REFUSED), "payloads", "list", COLUMNS="80")

    assert re.fullmatch(rf"{PAYLOAD_ID}  opened  +[0-9]+ d +412", opened)
    assert refused.endswith(f" 412  {ERROR}")


@pytest.mark.parametrize(
    ("body", "command"),
    [
        (_page(REFUSED), ["payloads", "list"]),
        (REFUSED, ["payloads", "show", PAYLOAD_ID]),
        ([VAE], ["vae", "list"]),
        (VAE, ["vae", "show", "Lung"]),
    ],
)
def test_json_is_the_complete_answer(body: Any, command: list[str]) -> None:
    assert json.loads("".join(_piped(body, *command, "--json"))) == body


def test_states_have_colours_on_a_terminal_only() -> None:
    page, command = _page(REFUSED), ("payloads", "list")

    assert any(map(COLOUR.search, _on_terminal(page, *command)))
    assert not any(map(COLOUR.search, _on_terminal(page, *command, NO_COLOR="1")))
    assert not any("\x1b" in line for line in _on_terminal(page, *command, TERM="dumb"))
    assert not any("\x1b" in line for line in _piped(page, *command, FORCE_COLOR="1"))


def test_a_control_character_in_an_answer_does_not_reach_the_terminal() -> None:
    row = OPENED | {
        "workflow_instances": [_instance("\x1b]0;title\x07 \u202enodules\r\n", "Created")],
        "source": "\x9b31mred",
    }

    for lines in (
        _piped(row, "payloads", "show", PAYLOAD_ID),
        _plain(_on_terminal(row, "payloads", "show", PAYLOAD_ID)),
    ):
        assert all(line.isprintable() for line in lines)
        assert len(lines) == 12


def test_markup_in_an_answer_is_printed_as_it_is() -> None:
    row = OPENED | {"source": "[red]:smile:[/]"}

    assert _fields(_piped(row, "payloads", "show", PAYLOAD_ID))["source"] == "[red]:smile:[/]"


def test_output_that_is_declared_as_ascii_gets_other_characters_too() -> None:
    row = OPENED | {"workflow_instances": [_instance("Lungenkn\u00f6tchen", "Created")]}

    lines = _piped(row, "payloads", "show", PAYLOAD_ID, PYTHONIOENCODING="ascii")

    assert any("Lungenkn" in line for line in lines)


def test_times_are_in_the_zone_of_the_reader() -> None:
    with _answering(OPENED) as url:
        shown = run_stowgate("payloads", "show", PAYLOAD_ID, "--url", url, TZ="CET-1")

    assert "2025-11-29 13:00:00 CET, " in shown.stdout


def test_vae_show_prints_what_the_vae_accepts() -> None:
    assert _fields(_piped(VAE, "vae", "show", "Lung")) == {
        "name": "Lung",
        "AE title": "LUNG",
        "workflows": "w-1, w-2",
        "SOP classes": "any",
        "transfer syntaxes": "any",
        "modalities": "CT, PT",
        "bytes per instance": "1,000,000",
        "requests per minute": "no limit",
        "created": "2025-11-29 12:00:00 UTC by operator",
    }


def test_vae_list_fits_an_80_column_terminal() -> None:
    long = VAE | {"name": "N" * 15, "virtualAeTitle": "A" * 15, "workflows": ["w" * 100]}

    lines = _plain(_on_terminal([long, VAE | {"workflows": []}], "vae", "list"))

    assert max(map(cell_len, lines)) == 80
    assert lines[-1].strip() == "(the Workflow Manager selects them)"
