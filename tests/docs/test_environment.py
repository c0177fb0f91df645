"""The page on the environment has every variable that the code reads, with an argument that exists."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import loops_async

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "environment.md").read_text()
ROWS = re.findall(r"^\| (`[A-Z_`, ]+`) \| (\S+) \| .+ \|$", PAGE, re.MULTILINE)
DOCUMENTED = {name for names, _ in ROWS for name in re.findall(r"`([A-Z_]+)`", names)}

OURS = re.compile(r"(?:LOOPS|BASETEN|BT_LOOPS)_[A-Z_]+")
READ_BY_OTHERS = {"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "TERM", "COLUMNS", "FORCE_COLOR"}
"""Python and rich read them for us."""


def names_in(source: str) -> Iterator[str]:
    """Yield what is read from `os.environ`, and each text that is the name of a variable of ours."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(name)) if OURS.fullmatch(name):
                yield name
            case (
                ast.Call(
                    func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[ast.Constant(value=str(name)), *_]
                )
                | ast.Call(func=ast.Attribute(attr="getenv"), args=[ast.Constant(value=str(name)), *_])
            ):
                yield name
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=ast.Constant(value=str(name))):
                yield name


def test_names_are_found() -> None:
    source = 'os.environ.get("A_B"), os.environ["C"], os.getenv("D", 1), flag("LOOPS_X"), "set LOOPS_Y", other["E"]'
    assert set(names_in(source)) == {"A_B", "C", "D", "LOOPS_X"}


def test_every_variable_is_on_the_page_and_no_other() -> None:
    sources = [
        path
        for package in ("loops_async", "loops_sync", "loops_local", "loops_tinker")
        for path in (ROOT / package).rglob("*.py")
    ]
    read = {name for path in sources for name in names_in(path.read_text())}
    assert read | READ_BY_OTHERS == DOCUMENTED


@pytest.mark.parametrize("argument", sorted({match for _, column in ROWS for match in re.findall(r"`(\w+)`", column)}))
def test_an_argument_exists(argument: str) -> None:
    assert argument in inspect.signature(loops_async.ServiceClient).parameters


def test_rows_are_read() -> None:
    assert len(ROWS) == len(re.findall(r"^\| `", PAGE, re.MULTILINE))
