"""The places that CONTRIBUTING.md names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PLACES = re.findall(r"^\|.*\?.*\| `([\w/.]+)` \| (?:`(\w+)`)?", TEXT, re.MULTILINE)


def test_there_are_twelve_questions() -> None:
    assert len(PLACES) == 12


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_the_place_exists(file: str, name: str) -> None:
    assert name in (ROOT / file).read_text()
