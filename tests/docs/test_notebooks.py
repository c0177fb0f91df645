"""The notebooks run, cell by cell in one namespace, as a kernel does it; they are stored without outputs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.docs.snippets import Snippet, run
from tests.support import torch_engine

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


class Cell(msgspec.Struct):
    cell_type: str
    source: list[str]
    outputs: list[Any] = []
    execution_count: int | None = None


class Notebook(msgspec.Struct):
    cells: list[Cell]
    nbformat: int
    nbformat_minor: int

    @property
    def code(self) -> list[str]:
        return ["".join(cell.source) for cell in self.cells if cell.cell_type == "code"]


def read(path: Path) -> Notebook:
    return msgspec.json.decode(path.read_bytes(), type=Notebook)


def test_there_is_one_of_each_colour() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_steps", "first_steps_blocking"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_is_stored_of_a_run(path: Path) -> None:
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells)


@pytest.mark.torch
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torch", reason="NOT TESTED: a notebook that needs torch")
    torch_engine.import_it_here()
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = tuple((source, None) for source in read(path).code)
    with asyncio.Runner() as runner:
        run(Snippet(path.name, cells), names, runner)
    assert names["response"].sequences[0].text == "pong"
    assert "still running" not in caplog.text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_await_stands_in_one_of_them_only(path: Path) -> None:
    assert ("await " in "\n".join(read(path).code)) == (path.stem == "first_steps")
