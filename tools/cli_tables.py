"""Write the exit codes, commands and options into docs/cli.md, from the command line itself.

Usage: python tools/cli_tables.py [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import typer.main

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - found in ROOT
from loops_async.cli._app import app
from loops_async.cli._exit_codes import ENDINGS
from loops_async.cli._help import arguments, is_group, options, summary, usage_of, walk
from tools.tables_in_pages import replaced, table, write_or_check

PAGE: Final = ROOT / "docs" / "cli.md"
BEGIN: Final = "<!-- {}, from the command line: python tools/cli_tables.py -->\n"
END: Final = "<!-- end of {} -->\n"


def written(page: str) -> str:
    """Return the page with the tables as they are now."""
    for name, text in {"exit codes": exit_codes(), "commands": commands()}.items():
        page = replaced(page, BEGIN.format(name), END.format(name), text)
    return page


def exit_codes() -> str:
    """Return the table of exit codes."""
    return table([("code", "meaning"), *((str(ending.code), ending.meaning) for ending in ENDINGS)])


def commands() -> str:
    """Return a section for each command, and the options before all of them."""
    root, *others = walk(typer.main.get_command(app))
    sections = ["### Options before every command\n", table([("option", "meaning"), *_code(options(root[1]))])]
    for path, command in others:
        if not is_group(command):
            sections += _section(path, command)
    return "\n".join(sections)


def _section(path: str, command: Any) -> Iterator[str]:
    usage = f"loops {path} {' '.join(usage_of(command))}".rstrip()
    yield f"### `loops {path}`\n"
    yield f"{_safe(summary(command))}\n"
    yield f"```text\n{usage}\n```\n"
    if rows := _code([*arguments(command), *options(command)]):
        yield table([("argument or option", "meaning"), *rows])


def _code(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    shown = [(f"`{name}`".replace("|", r"\|"), _safe(text)) for name, text in rows]
    return [row for row in shown if row[0] != "`--help`"]


def _safe(text: str) -> str:
    """Return text in which nothing looks like HTML."""
    return re.sub(r"bt://\S+", lambda path: f"`{path[0]}`", text.replace("\xa0", " "))


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, written))
