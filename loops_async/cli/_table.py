"""Tables that fit: columns go from the right, and what still does not fit becomes a block of lines for each object."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from msgspec import Struct
from rich.cells import cell_len

GAP: Final = 2
NONE: Final = "-"

Row = Sequence[str | None]


class Layout(Struct, frozen=True):
    """The lines to print, how many of them are the head, and the names of the columns that are left out."""

    lines: list[str]
    head: int = 0
    left_out: Sequence[str] = ()


def lay_out(names: Sequence[str], rows: Sequence[Row], *, width: int | None, least: int) -> Layout:
    """Return the lines of a table in at most `width` columns; None is unlimited.

    No value is cut or wrapped. If not even the first `least` columns fit, each object is a block.
    """
    cells = [[value or NONE for value in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
    ends = accumulate(each + GAP for each in widths)
    shown = len(names) if width is None else sum(end - GAP <= width for end in ends)
    if shown < least:
        return Layout(_blocks(names, rows))
    lines = [_line(row[:shown], widths) for row in (names, *cells)]
    return Layout(lines, 1, names[shown:])


def field_lines(names: Sequence[str], row: Row) -> list[str]:
    """Return a line ``field  value`` for each field that has a value."""
    found = [(name, value) for name, value in zip(names, row, strict=True) if value is not None]
    column = max((cell_len(name) for name, _ in found), default=0)
    return [f"{_padded(name, column)}{' ' * GAP}{value}" for name, value in found]


def _blocks(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    blocks = [field_lines(names, row) for row in rows]
    return [line for block in blocks for line in (*block, "")][:-1]


def _line(values: Sequence[str], widths: Sequence[int]) -> str:
    padded = (_padded(value, width) for value, width in zip(values, widths, strict=False))
    return (" " * GAP).join(padded).rstrip()


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))
