"""The output of commands: JSON, or human-readable tables and plots."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from .._text import one_line, visible, visible_json

T = TypeVar("T")

Columns: TypeAlias = Mapping[str, Callable[[T], object]]
"""The columns of a table, or the fields of an object: each has a name, and a function that returns its value."""

WIDE: Final = 240
"""The width if the output is not a terminal, so that piped lines are not cut."""

LONGEST_CELL: Final = 1000

out = Console(width=None if sys.stdout.isatty() else WIDE)
errors = Console(stderr=True, width=None if sys.stderr.isatty() else WIDE)

_BLOCKS: Final = " ▁▂▃▄▅▆▇█"


def emit(found: T, as_json: bool, show: Callable[[T], None]) -> None:
    """Print the result of a command, either as JSON or with `show`."""
    if as_json:
        show_json(found)
    else:
        show(found)


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(visible_json(msgspec.json.format(msgspec.json.encode(value, enc_hook=str)).decode()))


def show_json_line(value: Any) -> None:
    """Print a value as one line of JSON."""
    typer.echo(visible_json(msgspec.json.encode(value).decode()))


def show_table(columns: Columns[T], rows: Sequence[T]) -> None:
    """Print a row for each object, or "none"."""
    if not rows:
        errors.print("none", style="dim")
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(as_text(value_of(row)) for value_of in columns.values()))
    out.print(table)


def show_fields(fields: Columns[T], found: T) -> None:
    """Print a line for each field of an object; those without a value are left out."""
    table = Table.grid(padding=(0, 2))
    for name, value_of in fields.items():
        value = value_of(found)
        if value is not None:
            table.add_row(Text(name, style="bold"), as_text(value))
    out.print(table)


def show_text(text: str) -> None:
    """Print text; in a terminal with control characters made visible, elsewhere as it is."""
    typer.echo(visible(text) if sys.stdout.isatty() else text)


def as_text(value: Any) -> Text:
    """Return a value as it is shown in a table; markup in it has no effect."""
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, datetime):
        return Text(f"{value:%Y-%m-%d %H:%M}")
    return Text(one_line(str(value), LONGEST_CELL))


def size(count: int) -> str:
    """Return a human-readable number of bytes."""
    return decimal(count)


def progress(*columns: ProgressColumn) -> Progress:
    """Return a progress bar on standard error; nothing is shown if that is not a terminal."""
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def plot(points: Sequence[tuple[float, float]], *, start: float, end: float, width: int, height: int = 3) -> list[str]:
    """Return lines that draw ``(time, value)`` points as columns, from zero up to the largest of them.

    Points of one column are averaged; a column without points is empty.
    """
    columns: dict[int, list[float]] = {}
    for time, value in points:
        columns.setdefault(min(width - 1, max(0, int((time - start) / (end - start) * width))), []).append(value)
    means = {column: sum(values) / len(values) for column, values in columns.items()}
    top = max(means.values(), default=0.0) or 1.0
    # A measured zero is drawn as the lowest block, unlike a column without points.
    levels = {column: max(1, round(mean / top * height * 8)) for column, mean in means.items()}
    return [
        "".join(_BLOCKS[min(8, max(0, levels.get(column, 0) - 8 * row))] for column in range(width)).rstrip()
        for row in reversed(range(height))
    ]
