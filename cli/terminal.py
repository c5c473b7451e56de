"""What the operator's commands print: tables and fields for people, and JSON for scripts.

On a terminal, states have colours, and text is fitted to the width. In a pipe each row and each
field is one complete line of plain text.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.text import Text

as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print the complete answer of the API as JSON."
)

Cell = str | Text

_GAP = "  "

# Longer lines are hard to read.
_MAX_TEXT_WIDTH = 100

# With less room beside its row, the last column of a table is printed below the row.
_MIN_LAST_COLUMN = 40

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def show_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_rows(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table with aligned columns, of which the last one may have long texts.

    A terminal gets these cut to its width, and below their rows if there is little room beside
    them.
    """
    console = _console()
    lines = [[Text(title, "bold") for title in header]]
    lines += [[_printable(cell) for cell in row] for row in rows]
    *fixed, last = (max(cell.cell_len for cell in column) for column in zip(*lines, strict=True))
    room = console.width - sum(fixed) - len(_GAP) * len(fixed)
    is_below = console.is_terminal and room < min(last, _MIN_LAST_COLUMN)
    for line in lines:
        *cells, text = line
        for cell, width in zip(cells, fixed, strict=True):
            cell.pad_right(width - cell.cell_len)
        if console.is_terminal:
            text.truncate(console.width - len(_GAP) if is_below else room, overflow="ellipsis")
        if not is_below:
            _print_line(console, *cells, text)
            continue
        _print_line(console, *cells)
        if text and line is not lines[0]:
            _print_line(console, Text(""), text)


def show_fields(fields: Iterable[tuple[str, Cell]]) -> None:
    """Print a label and a text for each field; a terminal gets long texts in several lines."""
    console = _console()
    shown = [(label, _printable(text)) for label, text in fields]
    label_width = max(len(label) for label, _ in shown)
    width = min(console.width, _MAX_TEXT_WIDTH) - label_width - len(_GAP)
    for label, text in shown:
        lines = list(text.wrap(console, max(1, width))) if console.is_terminal else [text]
        for number, line in enumerate(lines):
            head = Text("" if number else label, "bold")
            head.pad_right(label_width - head.cell_len)
            _print_line(console, head, line)


def duration(seconds: float) -> str:
    """Return a duration in its largest unit, rounded down."""
    for unit_seconds, unit in _UNITS:
        if seconds >= unit_seconds:
            return f"{int(seconds // unit_seconds)} {unit}"
    return "0 s"


def local_time(moment: datetime) -> str:
    """Return the point in time in the zone of this machine, with its name."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %Z}"


def _console() -> Console:
    # Not even FORCE_COLOR puts colours into a pipe.
    return Console(force_terminal=sys.stdout.isatty())


def _printable(cell: Cell) -> Text:
    """Replace characters that a terminal may interpret, such as those of an escape sequence."""
    text = cell if isinstance(cell, Text) else Text(cell)
    text.plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.plain)
    return text


def _print_line(console: Console, *cells: Text) -> None:
    line = Text(_GAP).join(cells)
    line.rstrip()
    with console.capture() as capture:
        console.print(line, soft_wrap=True)
    # Unlike rich, click can write to a stream that is declared as ASCII.
    click.echo(capture.get(), nl=False)
