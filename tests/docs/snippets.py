"""Finds the Python examples in docstrings, and runs such snippets; `await` may stand at the top."""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

LITERAL = re.compile(r"^( *)Example:\n+ +::\n\n((?:\1 {2,}.*\n?|\n)+)", re.MULTILINE)


class Snippet(NamedTuple):
    """A run of statements, each with the output that it must print, or None where any will do."""

    place: str
    statements: tuple[tuple[str, str | None], ...]
    is_interactive: bool = False
    """Whether the value of an expression counts as printed."""

    def __str__(self) -> str:
        return self.place


def in_docstrings(path: Path) -> Iterator[Snippet]:
    source = path.read_text()
    if ">>>" not in source and "Example:" not in source:
        return  # most files have none, and are not parsed for it
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            place = f"{path.parent.name}/{path.name}:{getattr(node, 'name', 'module')}"
            for literal in LITERAL.finditer(docstring + "\n"):
                yield Snippet(place, ((textwrap.dedent(literal[2]), None),))
            if examples := doctest.DocTestParser().get_examples(docstring):
                yield Snippet(place, tuple((example.source, example.want) for example in examples), is_interactive=True)


def run(snippet: Snippet, names: dict[str, Any], runner: asyncio.Runner) -> None:
    """Run the statements as an interactive session would, one after the other."""
    for source, expected in snippet.statements:
        # In angle brackets, as "<stdin>" is: coverage would look for a file of that name.
        name = f"<{snippet.place}>"
        mode = "single" if snippet.is_interactive else "exec"
        code = compile(source, name, mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        with redirect_stdout(StringIO()) as printed:
            result = eval(code, names)
            if inspect.iscoroutine(result):
                runner.run(result)
        if expected is not None:
            assert doctest.OutputChecker().check_output(expected, printed.getvalue(), doctest.ELLIPSIS), (
                f"{snippet.place}: {source.strip()} printed {printed.getvalue()!r}, not {expected!r}"
            )
