"""The output of commands: JSON, ids, tables, fields and plots. Answers go to standard output, all else to the other."""

from __future__ import annotations

import codecs
import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress, ProgressColumn
from rich.text import Text

from .._text import one_line, visible, visible_json
from ._exit_codes import CLOSED_PIPE
from ._table import Layout, field_lines, lay_out

T = TypeVar("T")

Columns: TypeAlias = Mapping[str, Callable[[T], object]]
"""The columns of a table, or the fields of an object: each has a name, and a function that returns its value.

The first is the id. A table always shows the columns up to that of `ESSENTIAL`, if it has one.
"""

ESSENTIAL: Final = ("status", "path")

LONGEST_LINE: Final = 100
"""The longest line of prose in a wide terminal, or where the output is none."""

LONGEST_CELL: Final = 1000

_BLOCKS: Final = " ▁▂▃▄▅▆▇█"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        leave_closed_pipe()


def leave_closed_pipe() -> NoReturn:
    """End silently, since the output is not read."""
    drop_output()
    raise SystemExit(CLOSED_PIPE)


def drop_output() -> None:
    """Let go nowhere what Python still writes to standard output at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Make the standard streams usable: each exists, and those for output accept any character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed when the process began; its number must not become a socket's
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))
    codecs.register_error(_escaped.__name__, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_escaped.__name__)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for characters that an encoding lacks: their escapes in JSON, which stays valid thereby."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _console(*, stderr: bool) -> Console:
    # Without a color system, rich writes no escape sequence for styles either.
    plain = bool(os.environ.get("NO_COLOR"))
    return _Console(
        stderr=stderr,
        color_system=None if plain else "auto",
        soft_wrap=True,
        markup=False,
        highlight=False,
        emoji=False,
    )


out = _console(stderr=False)
errors = _console(stderr=True)


def is_live() -> bool:
    """Whether a display on standard error can be redrawn in place."""
    return _is_redrawable(errors)


def is_terminal() -> bool:
    """Whether the answer of a command can be redrawn in place."""
    return _is_redrawable(out)


def _is_redrawable(console: Console) -> bool:
    # `FORCE_COLOR` has rich take a file for a terminal; it asks for colors in e.g. a log, which cannot be redrawn.
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


def columns_of_terminal() -> int | None:
    """Return the width of the terminal that standard output is, None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def complain(message: str) -> None:
    """Print an error to standard error, whole."""
    errors.print(_readable(f"loops: {message}"), style="red")


def note(message: str) -> None:
    """Print what is neither an answer nor an error to standard error, whole."""
    errors.print(_readable(message), style="dim")


def _readable(message: str) -> str:
    """Return a message that breaks no word in a terminal, and is one line elsewhere."""
    line = visible(message)
    return wrapped(line, errors.width) if errors.file.isatty() else line


def wrapped(text: str, width: int, *, first: str = "", later: str = "") -> str:
    """Return text in lines of at most `width` characters, but for longer words; the first and later are indented."""
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def emit(found: T, as_json: bool, show: Callable[[T], None]) -> None:
    """Print the result of a command, either as JSON or with `show`."""
    if as_json:
        show_json(found)
    else:
        show(found)


def emit_rows(columns: Columns[T], rows: Sequence[T], *, as_json: bool, quiet: bool) -> None:
    """Print objects as JSON, as ids, or as a table."""
    if as_json:
        show_json(rows)
    elif quiet:
        show_ids(columns, rows)
    else:
        show_table(columns, rows)


def emit_fields(fields: Columns[T], found: T, *, as_json: bool, quiet: bool) -> None:
    """Print an object as JSON, as its id, or field by field."""
    if as_json:
        show_json(found)
    elif quiet:
        show_ids(fields, [found])
    else:
        show_fields(fields, found)


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(visible_json(msgspec.json.format(msgspec.json.encode(value, enc_hook=str)).decode()))


def show_json_line(value: Any) -> None:
    """Print a value as one line of JSON."""
    typer.echo(visible_json(msgspec.json.encode(value).decode()))


def show_ids(columns: Columns[T], rows: Iterable[T]) -> None:
    """Print the id of each object, one a line."""
    id_of = next(iter(columns.values()))
    for row in rows:
        show_text(str(id_of(row)))


def show_table(columns: Columns[T], rows: Sequence[T]) -> None:
    """Print a row for each object that fits into the terminal, or say that there is none."""
    if not rows:
        note("none")
        return
    layout = _layout(columns, rows)
    for line in _styled(layout):
        out.print(line)
    if layout.left_out:
        note(f"not shown for lack of width: {', '.join(layout.left_out)}; --json has all")


def table_lines(columns: Columns[T], rows: Sequence[T]) -> list[Text]:
    """Return the lines of a table, for a display that is redrawn in place."""
    return _styled(_layout(columns, rows)) if rows else [Text("none")]


def _layout(columns: Columns[T], rows: Sequence[T]) -> Layout:
    names = list(columns)
    least = max((names.index(name) + 1 for name in ESSENTIAL if name in names), default=1)
    cells = [[as_text(value_of(row)) for value_of in columns.values()] for row in rows]
    return lay_out(names, cells, width=columns_of_terminal(), least=least)


def _styled(layout: Layout) -> list[Text]:
    return [Text(line, style="bold" if number < layout.head else "") for number, line in enumerate(layout.lines)]


def show_fields(fields: Columns[T], found: T) -> None:
    """Print a line for each field of an object; those without a value are left out."""
    for line in field_lines(list(fields), [as_text(value_of(found)) for value_of in fields.values()]):
        out.print(Text(line))


def show_text(text: str) -> None:
    """Print text; in a terminal with control characters made visible, elsewhere as it is."""
    typer.echo(visible(text) if sys.stdout.isatty() else text)


def as_text(value: Any) -> str | None:
    """Return a value as it is shown in a table; times are those of UTC."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M}"
    return one_line(str(value), LONGEST_CELL)


def size(count: int) -> str:
    """Return a human-readable number of bytes."""
    return decimal(count)


def progress(*columns: ProgressColumn) -> Progress:
    """Return a progress bar on standard error; nothing is shown if that cannot be redrawn in place."""
    return Progress(*columns, console=errors, transient=True, disable=not is_live())


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
