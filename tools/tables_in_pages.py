"""Tables in pages of docs/ that are made from the code: they stand between two comments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    head, *others = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *others))


def replaced(page: str, begin: str, end: str, text: str) -> str:
    """Return the page with `text` between the lines `begin` and `end`."""
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def write_or_check(path: Path, written: Callable[[str], str]) -> int:
    """Write the page, or with ``--check`` only compare it, and return the exit code."""
    page = path.read_text()
    if "--check" not in sys.argv[1:]:
        path.write_text(written(page))
    elif page != written(page):
        print(f"{path.name}: its tables are not those of the code; run python tools/{Path(sys.argv[0]).name}")
        return 1
    return 0
