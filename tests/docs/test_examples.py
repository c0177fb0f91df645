"""The training examples run from end to end; that they learn is for the real model, which takes a minute each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    for needed in ("matplotlib", "rich", "torch"):
        pytest.importorskip(needed, reason=f"NOT TESTED: the examples need {needed}")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module, "STEPS", 2)
    if hasattr(module, "EVALUATE_EVERY"):
        monkeypatch.setattr(module, "EVALUATE_EVERY", 1)
    yield module
    for name in set(sys.modules) - known:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("example", ["supervised", "dpo", "policy_gradient"], indirect=True)
async def test_it_draws_its_curves(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await example.main("tiny") in (0, 1)
    picture = tmp_path / f"{example.__name__}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"curves drawn in {picture.name}" in capsys.readouterr().out
