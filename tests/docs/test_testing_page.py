"""The tests that docs/testing.md shows, run with the plugin that it describes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import loops_local.engine.echo
import loops_sync
from loops_local import LocalService

pytest_plugins = ["pytester"]

IMPORTED_BEFORE = (np, loops_local.engine.echo, loops_sync)
"""What a test within a test imports first is removed after it, and these must not be imported twice."""

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
INI = "[pytest]\nasyncio_default_fixture_loop_scope = function\n"


def test_the_tests_of_the_page(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, echo_service: LocalService
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    pytester.makepyfile(test_page="\n\n".join(blocks))
    pytester.makeini(INI)
    options = ["-p", "loops_local.pytest", "-p", "no:randomly"]
    count = sum(block.count("def test_") for block in blocks)
    monkeypatch.setenv("LOOPS_BASE_URL", echo_service.base_url)
    monkeypatch.setenv("BASETEN_API_KEY", echo_service.api_key)

    pytester.runpytest_inprocess(*options, "-k", "sampling", "--loops-record").assert_outcomes(
        passed=1, deselected=count
    )
    monkeypatch.delenv("LOOPS_BASE_URL")
    monkeypatch.delenv("BASETEN_API_KEY")
    pytester.runpytest_inprocess(*options, "-k", "not tiny").assert_outcomes(passed=count, deselected=1)
