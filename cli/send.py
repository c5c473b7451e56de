"""`stowgate send`: sends files and folders in one STOW-RS request."""

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import click
import urllib3
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from cli.client import Api, Unusable, segment, with_api

_ALL_STORED = 0
_SOME_NOT = 1

# The explanation of a reason code, in Stowgate's private block of the response.
_DETAIL = "00091001"


@click.command(short_help="Send DICOM files and folders in one request.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@with_api
@click.option("--study", metavar="UID", help="Study Instance UID that all instances must have.")
@click.option("--workflow", metavar="ID", help="The workflow to request.")
@click.option("--vae", metavar="AET", help="AE title of a Virtual Application Entity.")
@click.option(
    "--idempotency-key",
    metavar="KEY",
    show_default="a digest of the files",
    help="For 24 hours the same files, sent again to the same URL, count as one request. Give "
    "another key, such as a UUID, to make another request.",
)
def send(
    paths: tuple[Path, ...],
    api: Api,
    study: str | None,
    workflow: str | None,
    vae: str | None,
    idempotency_key: str | None,
) -> None:
    """Send DICOM files, and those in folders, in one request.

    After a timeout or a lost connection, run the command again: no workflow request is opened
    twice.

    Exits with 0 if all files were stored, 1 if some were not stored or not readable, 2 if the
    request failed.
    """
    target = _target(api.url, study, workflow, vae)
    search = _Search()
    for path in paths:
        search.add(path)
    search.report()
    files = list(search.size_bytes)
    if not files:
        raise Unusable("the paths contain no DICOM file")
    if idempotency_key is not None and not re.fullmatch(r"[!-~]{1,255}", idempotency_key):
        raise Unusable("--idempotency-key must be 1 to 255 visible ASCII characters")
    digests = _digests(search.size_bytes)
    key = idempotency_key or sha256(b"".join(digests)).hexdigest()
    answer = _post(api, target, _MultipartBody(search.size_bytes), key)
    copies = len(digests) - len(set(digests))
    outcome = _outcome(target, answer, files, copies)
    _report(outcome, len(files))
    if "X-Payload-ID" in answer.headers:
        click.echo(f"payload {answer.headers['X-Payload-ID']}")
    if "Idempotent-Replayed" in answer.headers:
        click.echo(
            "these files were sent before; this is the answer to that request, and no new workflow "
            "request was opened. To open one, give another --idempotency-key",
            err=True,
        )
    is_some_missing = outcome.failures or outcome.unknown or search.unread
    sys.exit(_SOME_NOT if is_some_missing else _ALL_STORED)


class _Search:
    """Collects the files to send: named files, and DICOM Part 10 instances in named folders.

    Follows links, and searches no folder twice.
    """

    def __init__(self) -> None:
        self.size_bytes: dict[Path, int] = {}
        self.unread = 0
        self._skipped = 0
        self._searched: set[tuple[int, int]] = set()

    def add(self, path: Path) -> None:
        """Add a file or a folder. Raises `Unusable` for any other kind of path."""
        if path.is_dir():
            self._add_folder(path)
            return
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Unusable(f"{path} is not a regular file")
        self.size_bytes[path] = found.st_size

    def report(self) -> None:
        """Print how many files were skipped or unreadable."""
        if self._skipped:
            skipped = _counted(
                self._skipped,
                "file that is not a DICOM Part 10 instance",
                "files that are not DICOM Part 10 instances",
            )
            click.echo(f"skipped {skipped}", err=True)
        if self.unread:
            unread = _counted(
                self.unread,
                "unreadable file or folder",
                "unreadable files or folders",
            )
            click.echo(f"skipped {unread}", err=True)

    def _add_folder(self, folder: Path) -> None:
        for parent, subfolders, names in os.walk(
            folder, onerror=lambda error: self._leave_out(error.filename, error), followlinks=True
        ):
            try:
                found = os.stat(parent)
            except OSError as error:
                self._leave_out(parent, error)
                subfolders.clear()
                continue
            if (found.st_dev, found.st_ino) in self._searched:
                subfolders.clear()
                continue
            self._searched.add((found.st_dev, found.st_ino))
            subfolders.sort()
            for file in sorted(Path(parent, name) for name in names):
                try:
                    self._add_instance(file)
                except OSError as error:
                    self._leave_out(file, error)

    def _add_instance(self, file: Path) -> None:
        found = file.stat()
        # Checked before the open, which would block on a pipe.
        is_readable = stat.S_ISREG(found.st_mode)
        if is_readable and file.name.upper() != "DICOMDIR" and _is_part_10(file):
            self.size_bytes[file] = found.st_size
        else:
            self._skipped += 1

    def _leave_out(self, path: Path | str, error: OSError) -> None:
        self.unread += 1
        click.echo(f"{path} cannot be read: {error.strerror}", err=True)


def _is_part_10(file: Path) -> bool:
    """PS3.10 7.1: 128 bytes of preamble, then DICM."""
    with file.open("rb") as head:
        return head.read(132)[128:] == b"DICM"


def _target(url: str, study: str | None, workflow: str | None, vae: str | None) -> str:
    steps = ["dicomweb"]
    if vae is not None:
        steps += ["vae", segment(vae)]
    if workflow is not None:
        steps.append(segment(workflow))
    steps.append("studies")
    if study is not None:
        steps.append(segment(study))
    return "/".join([url, *steps])


class _MultipartBody:
    """A multipart/related body (RFC 2387) of files, which are read in pieces by iterating it."""

    def __init__(self, size_bytes: dict[Path, int]) -> None:
        self.boundary = uuid4().hex
        self._files = size_bytes
        self._head = f"--{self.boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        self._end = f"--{self.boundary}--\r\n".encode()
        framing_bytes = len(self._files) * (len(self._head) + 2) + len(self._end)
        self.size_bytes = framing_bytes + sum(self._files.values())

    def __iter__(self) -> Iterator[bytes]:
        for file, size in self._files.items():
            yield self._head
            yield from _pieces(file, size)
            yield b"\r\n"
        yield self._end


def _digests(size_bytes: dict[Path, int]) -> list[bytes]:
    """Return the digest of each file; the Idempotency-Key is needed before the body."""
    digests = []
    with _progress("reading", sum(size_bytes.values())) as advance:
        for file, size in size_bytes.items():
            digest = sha256()
            for piece in _pieces(file, size):
                digest.update(piece)
                advance(len(piece))
            digests.append(digest.digest())
    return digests


def _pieces(file: Path, size_bytes: int) -> Iterator[bytes]:
    with _opened(file) as content:
        while size_bytes > 0:
            piece = content.read(min(size_bytes, 1 << 20))
            if not piece:
                raise Unusable(f"{file} was truncated while it was sent")
            size_bytes -= len(piece)
            yield piece


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as content:
            yield content
    except OSError as error:
        raise Unusable(f"{file} cannot be read: {error.strerror}") from error


@contextmanager
def _progress(doing: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; the yielded function advances it by a number of bytes."""
    console = Console(stderr=True)
    columns = (doing, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total_bytes)
        yield lambda count: progress.advance(task, count)


def _post(api: Api, target: str, body: _MultipartBody, key: str) -> urllib3.BaseHTTPResponse:
    """Send the request. Raises `Unusable` if it is refused."""
    with _progress("sending", body.size_bytes) as advance:
        headers = api.headers | {
            "Content-Type": (
                f'multipart/related; type="application/dicom"; boundary="{body.boundary}"'
            ),
            "Content-Length": str(body.size_bytes),
            "Accept": "application/dicom+json",
            "Idempotency-Key": key,
        }
        pool = api.pool(urllib3.Timeout(connect=10, read=300))
        try:
            answer = pool.request("POST", target, body=_shown(body, advance), headers=headers)
        except (urllib3.exceptions.ReadTimeoutError, urllib3.exceptions.ProtocolError) as error:
            raise Unusable(
                f"{target} did not answer ({type(error).__name__}), and may have stored the files: "
                "run the command again; no workflow request is opened twice"
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise api.unreachable(target, error) from error
    if answer.status >= 400 and not (answer.status == HTTPStatus.CONFLICT and _is_dataset(answer)):
        raise Unusable(api.refusal(answer))
    return answer


def _is_dataset(answer: urllib3.BaseHTTPResponse) -> bool:
    return "dicom+json" in answer.headers.get("Content-Type", "")


def _shown(body: _MultipartBody, advance: Callable[[int], None]) -> Iterator[bytes]:
    for piece in body:
        yield piece
        advance(len(piece))


@dataclass(frozen=True)
class _Outcome:
    """`copies` are duplicates among the sent files; about `unknown` files the answer says
    nothing."""

    stored: int
    warnings: Counter[str]
    failures: list[str]
    copies: int
    unknown: int


def _outcome(
    target: str, answer: urllib3.BaseHTTPResponse, files: list[Path], copies: int
) -> _Outcome:
    """Raises `Unusable` if the answer is not a Store Instances Response (PS3.18 I.2)."""
    try:
        dataset = answer.json() if _is_dataset(answer) else None
        stored = _items(dataset, "00081199")
        warnings = Counter(words for item in stored if (words := _words(item)))
        failed = _items(dataset, "00081198") + _items(dataset, "0008119A")
        failures = [_failure(files, item) for item in failed]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Unusable(
            f"{target} answered {answer.status} without a Store Instances Response: is this the "
            "URL of the API?"
        ) from error
    unnamed = max(0, len(files) - len(stored) - len(failed))
    copies = min(copies, unnamed)
    return _Outcome(len(stored), warnings, failures, copies, unnamed - copies)


def _report(outcome: _Outcome, sent: int) -> None:
    stored = f"stored {outcome.stored} of {_counted(sent - outcome.copies, 'file', 'files')}"
    if outcome.copies:
        copies = _counted(
            outcome.copies,
            "more is an identical copy of one of them",
            "more are identical copies of some of them",
        )
        stored = f"{stored}; {copies}"
    click.echo(stored)
    for words, count in outcome.warnings.items():
        click.echo(f"  warning ({count}): {words}")
    for words in outcome.failures:
        click.echo(f"  failed: {words}")
    if outcome.unknown:
        unknown = _counted(outcome.unknown, "file", "files")
        click.echo(
            f"  unknown: the answer says nothing about {unknown}; is this the URL of the API?"
        )


def _items(dataset: Any, tag: str) -> list[dict[str, Any]]:
    return list(dataset.get(tag, {}).get("Value", []))


def _words(item: dict[str, Any]) -> str:
    return str(item.get(_DETAIL, {}).get("Value", [""])[0])


def _failure(files: list[Path], item: dict[str, Any]) -> str:
    """Return the explanation with the file in place of its part number, or the bare reason code."""
    reason = int(item["00081197"]["Value"][0])
    words = _words(item) or f"Failure Reason {reason:04X}"
    part = re.match(r"part (\d+): ", words)
    if part and 1 <= int(part[1]) <= len(files):
        words = f"{click.format_filename(files[int(part[1]) - 1])}: {words[part.end() :]}"
    return words


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
