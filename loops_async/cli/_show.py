"""What commands print: tables for people, JSON for scripts, small plots."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

WIDE: Final = 240
"""Columns where nobody looks, so that what is piped is not cut."""

out = Console(width=None if sys.stdout.isatty() else WIDE)
errors = Console(stderr=True, width=None if sys.stderr.isatty() else WIDE)

_BLOCKS: Final = " ▁▂▃▄▅▆▇█"


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value, enc_hook=str)))


def show_json_line(value: Any) -> None:
    """Print a value as one line of JSON."""
    typer.echo(msgspec.json.encode(value))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under headings, or say that there are none."""
    listed = [[as_text(cell) for cell in row] for row in rows]
    if not listed:
        errors.print("none", style="dim")
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in listed:
        table.add_row(*row)
    out.print(table)


def show_fields(fields: Mapping[str, Any]) -> None:
    """Print names and values, one a line; what is not known is left out."""
    table = Table.grid(padding=(0, 2))
    for name, value in fields.items():
        if value is not None:
            table.add_row(Text(name, style="bold"), as_text(value))
    out.print(table)


def show_text(text: str) -> None:
    """Print text as it is."""
    typer.echo(text)


def as_text(value: Any) -> Text:
    """Return a value as it looks in a table; nothing in it is taken for markup."""
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, datetime):
        return Text(f"{value:%Y-%m-%d %H:%M}")
    return Text(str(value))


def size(count: int) -> str:
    """Return a number of bytes for people."""
    return decimal(count)


def plot(points: Sequence[tuple[float, float]], *, start: float, end: float, width: int, height: int = 3) -> list[str]:
    """Return lines that draw ``(time, value)`` points as columns, from zero up to the largest of them.

    Points of one column are averaged; where there is none, the column is empty.
    """
    columns: dict[int, list[float]] = {}
    for time, value in points:
        columns.setdefault(min(width - 1, max(0, int((time - start) / (end - start) * width))), []).append(value)
    means = {column: sum(values) / len(values) for column, values in columns.items()}
    top = max(means.values(), default=0.0) or 1.0
    # What was measured shows, even if it is nothing.
    levels = {column: max(1, round(mean / top * height * 8)) for column, mean in means.items()}
    return [
        "".join(_BLOCKS[min(8, max(0, levels.get(column, 0) - 8 * row))] for column in range(width)).rstrip()
        for row in reversed(range(height))
    ]
