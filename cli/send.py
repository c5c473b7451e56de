"""`stowgate send`: files and folders by STOW-RS, in one request."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import click
import urllib3
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from cli.http import Api, Unusable, refusal, segment, unreachable, with_api

_ALL_STORED = 0
_SOME_NOT = 1

# The words beside a reason, in Stowgate's private block of the response.
_DETAIL = "00091001"


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@with_api
@click.option("--study", metavar="UID", help="Study Instance UID that all should belong to.")
@click.option("--workflow", metavar="ID", help="The workflow to open.")
@click.option("--vae", metavar="AET", help="AE title of a Virtual Application Entity.")
def send(
    paths: tuple[Path, ...], api: Api, study: str | None, workflow: str | None, vae: str | None
) -> None:
    """Send DICOM files, and those in folders, as one request.

    Exits with 0 when all were stored, 1 when some were not, 2 when the request was unusable.
    """
    target = _target(api.url, study, workflow, vae)
    files = list(dict.fromkeys(_files(paths)))
    if not files:
        raise Unusable("none of the paths holds a DICOM file")
    answer = _post(api, target, files)
    if answer.status in (200, 202, 409) and "dicom+json" in answer.headers["Content-Type"]:
        sys.exit(_report(files, answer))
    raise Unusable(refusal(answer))


def _files(paths: tuple[Path, ...]) -> Iterator[Path]:
    """Files as they are named, and of folders those that are DICOM Part 10."""
    skipped = 0
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            if file.name != "DICOMDIR" and _is_part_10(file):
                yield file
            else:
                skipped += 1
    if skipped:
        click.echo(f"skipped {skipped} files that are not DICOM Part 10 instances", err=True)


def _is_part_10(file: Path) -> bool:
    """PS3.10 7.1: 128 bytes of preamble, then DICM."""
    with _opened(file) as head:
        return head.read(132)[128:] == b"DICM"


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        content = file.open("rb")
    except OSError as error:
        raise Unusable(f"{file} cannot be read: {error.strerror}") from error
    with content:
        yield content


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
    """multipart/related over files (RFC 2387); iterating it reads them piece by piece."""

    def __init__(self, files: list[Path], on_piece: Callable[[int], None]) -> None:
        self.boundary = uuid4().hex
        self._files = [(file, file.stat().st_size) for file in files]
        self._head = f"--{self.boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        self._end = f"--{self.boundary}--\r\n".encode()
        framing_bytes = len(files) * (len(self._head) + 2) + len(self._end)
        self.size_bytes = framing_bytes + sum(size for _, size in self._files)
        self._on_piece = on_piece

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces():
            yield piece
            self._on_piece(len(piece))

    def _pieces(self) -> Iterator[bytes]:
        for file, size in self._files:
            yield self._head
            with _opened(file) as content:
                while size > 0:
                    piece = content.read(min(size, 1 << 20))
                    if not piece:
                        raise Unusable(f"{file} became shorter while it was sent")
                    size -= len(piece)
                    yield piece
            yield b"\r\n"
        yield self._end


def _post(api: Api, target: str, files: list[Path]) -> urllib3.BaseHTTPResponse:
    console = Console(stderr=True)
    columns = ("sending", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        body = _MultipartBody(files, lambda count: progress.advance(task, count))
        progress.update(task, total=body.size_bytes)
        headers = api.headers | {
            "Content-Type": (
                f'multipart/related; type="application/dicom"; boundary="{body.boundary}"'
            ),
            "Content-Length": str(body.size_bytes),
            "Accept": "application/dicom+json",
        }
        pool = api.pool(urllib3.Timeout(connect=10, read=300))
        try:
            return pool.request("POST", target, body=body, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise unreachable(target, error) from error


def _report(files: list[Path], answer: urllib3.BaseHTTPResponse) -> int:
    dataset = answer.json()
    stored = _items(dataset, "00081199")
    failed = _items(dataset, "00081198") + _items(dataset, "0008119A")
    click.echo(f"stored {len(stored)} of {len(files)} files")
    warnings = Counter(words for item in stored if (words := _words(item)))
    for words, count in warnings.items():
        click.echo(f"  warning ({count}): {words}")
    for item in failed:
        click.echo(f"  failed: {_failure(files, item)}")
    if "X-Payload-ID" in answer.headers:
        click.echo(f"payload {answer.headers['X-Payload-ID']}")
    return _SOME_NOT if failed else _ALL_STORED


def _items(dataset: dict[str, Any], tag: str) -> list[dict[str, Any]]:
    return list(dataset.get(tag, {}).get("Value", []))


def _words(item: dict[str, Any]) -> str:
    return str(item.get(_DETAIL, {}).get("Value", [""])[0])


def _failure(files: list[Path], item: dict[str, Any]) -> str:
    """The words with the file in place of its part number, or the bare reason code."""
    reason = int(item["00081197"]["Value"][0])
    words = _words(item) or f"Failure Reason {reason:04X}"
    part = re.match(r"part (\d+): ", words)
    if part and 1 <= int(part[1]) <= len(files):
        words = f"{files[int(part[1]) - 1]}: {words[part.end() :]}"
    return words
