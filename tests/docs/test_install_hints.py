"""Hints on what to install have one spelling, and name extras that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
HINT = re.compile(r"pip install (?:-e )?['\"]?(\.|[\w-]+)\[([\w,]+)\]")
FILES = [
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *(
        path
        for name in ("examples", "loops_async", "loops_sync", "loops_local")
        for path in (ROOT / name).rglob("*.py")
    ),
]


def hints() -> list[tuple[str, str, str]]:
    return [(path.name, *hint) for path in FILES for hint in HINT.findall(path.read_text())]


def test_hints_name_the_distribution_or_the_checkout() -> None:
    assert {name for _, name, _ in hints()} == {"loops-async", "."}


def test_hints_name_extras_that_exist() -> None:
    assert not [hint for hint in hints() if set(hint[2].split(",")) - EXTRAS.keys()]


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"demo", "test"}))
def test_the_page_on_installing_has_each_extra(extra: str) -> None:
    assert f"| `[{extra}]` |" in (ROOT / "docs" / "install.md").read_text()
