"""The workshop, as a top-level module: scripts import it, too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from workshop import BlockingWorkshop


@pytest.fixture
def shop() -> Iterator[BlockingWorkshop]:
    with BlockingWorkshop() as shop:
        yield shop
