"""The sample package and its generated twin, as top-level packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import sample_sync


@pytest.fixture
def service() -> Iterator[sample_sync.Service]:
    with sample_sync.Service() as service:
        yield service


@pytest.fixture
def worker(service: sample_sync.Service) -> sample_sync.Worker:
    return service.hire("anna")
