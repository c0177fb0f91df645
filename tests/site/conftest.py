"""The documentation site as it was built, in the folder that `LOOPS_SITE` names, else in a new one; and one browser."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import browser as browsers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if built := os.environ.get("LOOPS_SITE"):
        return Path(built).resolve()
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, str(ROOT / "tools" / "build_docs.py"), str(out)], check=True)
    return out


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with browsers.started() as browser:
        yield browser
