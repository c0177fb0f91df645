"""Reads the Python blocks of a page of `docs/`, and runs them as one session in each colour.

CONTRIBUTING.md describes the syntax.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import loops_async
import loops_sync
from tests.docs.snippets import Snippet, run
from tools.blocking_docs import GenerationError, both_forms

Name = Literal["async", "blocking"]

COLOURS: Final[tuple[Name, ...]] = ("async", "blocking")

ROOT: Final = Path(__file__).parents[2]

BLOCK: Final = re.compile(
    r"""
    (?:^<!--\ not\ run:\ (?P<reason>[^\n]+)\ -->\n)?
    ^```(?P<kind>\{colours\}|python)\n
    (?::\w+:\n)*
    (?P<code>.*?)
    ^```\n
    (?:\n*^```text\n(?P<output>.*?)^```$)?
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
ANY_BLOCK: Final = re.compile(
    r"^[ >]*[`~:]{3,} *(?:\{colours|\{code-block\} *python|\{code\} *python|python)", re.MULTILINE
)
"""The beginning of a block of Python, however it is written."""

OF_ONE_COLOUR: Final[dict[Name, re.Pattern[str]]] = {
    "async": re.compile(r"\b(async|await|loops_async)\b"),
    "blocking": re.compile(r"\bloops_sync\b"),
}
"""What a `python` block has that belongs to one colour only."""


class Block(NamedTuple):
    """Code, in the colours in which it runs, and what it prints, or None where any output will do."""

    place: str
    forms: Mapping[Name, str]
    output: str | None

    def snippet(self, colour: Name) -> Snippet:
        return Snippet(self.place, ((self.forms[colour], self.output),))


class Page(NamedTuple):
    """A page that has blocks."""

    name: str
    blocks: tuple[Block, ...]
    engine: str
    """The embedded service that runs them: `echo`, or `tiny` where a line `<!-- engine: tiny -->` says so."""

    def __str__(self) -> str:
        return self.name

    @property
    def colours(self) -> list[Name]:
        """Those in which at least one block runs."""
        return [colour for colour in COLOURS if any(colour in block.forms for block in self.blocks)]


def page(path: Path) -> Page:
    text = path.read_text()
    engine = re.search(r"^<!-- engine: (\w+) -->$", text, re.MULTILINE)
    return Page(path.stem, tuple(_blocks(path.name, text)), engine[1] if engine else "echo")


def pages() -> list[Page]:
    """Return README.md and the pages of `docs/` that have blocks."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [found for found in map(page, files) if found.blocks]


def run_page(page: Page, colour: Name, given: Mapping[str, Any] | None = None) -> Iterator[Block]:
    """Run the blocks of one colour in order, in one namespace, and yield each after it has run.

    Service clients that are open at the end are closed.
    """
    names: dict[str, Any] = {"__name__": "__main__", **(given or {})}
    with asyncio.Runner() as runner, ExitStack() as stack:
        stack.callback(_close_clients, names, runner)
        for block in page.blocks:
            if colour in block.forms:
                run(block.snippet(colour), names, runner)
                yield block


def _blocks(name: str, text: str) -> Iterator[Block]:
    read = 0
    for block in BLOCK.finditer(text):
        place = f"{name}:{text.count(chr(10), 0, block.start()) + 1}"
        read += 1
        if not block["reason"]:
            yield Block(place, _forms(place, block["kind"], block["code"]), block["output"])
    if read != (there := len(ANY_BLOCK.findall(text))):
        raise SyntaxError(f"{name} has {there} blocks of Python, {read} of which can be run: see CONTRIBUTING.md")


def _forms(place: str, kind: str, code: str) -> dict[Name, str]:
    if kind == "python":
        needed = [colour for colour, words in OF_ONE_COLOUR.items() if words.search(code)]
        return dict.fromkeys(needed or COLOURS, code)
    try:
        asynchronous, blocking = both_forms(code, "loops_async")
    except GenerationError as problem:
        raise GenerationError(f"{place}: {problem}; write the blocking form behind a line %%") from None
    return {"async": asynchronous, "blocking": blocking}


def _close_clients(names: Mapping[str, Any], runner: asyncio.Runner) -> None:
    for value in [*names.values()]:
        if isinstance(value, loops_async.ServiceClient):
            runner.run(value.close())
        elif isinstance(value, loops_sync.ServiceClient):
            value.close()
