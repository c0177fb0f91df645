"""The cost of the library before it does anything: import time and installed size."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

from .harness import ROOT
from .report import Promise

DEPENDENCIES = ("aiohttp", "anyio", "msgspec", "backoff")
IMPORTS = 15


def promises() -> list[Promise]:
    """Measure both, and compare them with their budgets."""
    with tempfile.TemporaryDirectory() as cache:
        dependencies, own = _import_seconds(", ".join(DEPENDENCIES), cache), _import_seconds("loops_async", cache)
    sizes = installed_megabytes()
    return [
        Promise(
            f"import: {own * 1e3:.0f} ms; its four dependencies alone {dependencies * 1e3:.0f} ms",
            "at most 1.25 x",
            own / dependencies,
            own <= 1.25 * dependencies,
        ),
        Promise(
            "installed size with all dependencies, MB", "at most 30", sum(sizes.values()), sum(sizes.values()) <= 30
        ),
    ]


def _import_seconds(modules: str, cache: str) -> float:
    """Return the best time of many fresh processes. As after an installation, there is bytecode, in its own `cache`."""
    code = f"import time; t = time.perf_counter(); import {modules}; print(time.perf_counter() - t)"
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", code]

    def once() -> float:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
        return float(done.stdout)

    once()
    return min(once() for _ in range(IMPORTS))


def installed_megabytes() -> dict[str, float]:
    """Return the megabytes on disk of our packages and all their dependencies, without bytecode."""
    sizes: dict[str, float] = {}
    waiting = list(DEPENDENCIES)
    while waiting:
        name = waiting.pop()
        if name in sizes:
            continue
        distribution = importlib.metadata.distribution(name)
        sizes[name] = _megabytes(Path(str(distribution.locate_file(file))) for file in distribution.files or [])
        requirements = [Requirement(text) for text in distribution.requires or []]
        waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    for name in ("loops_async", "loops_sync"):
        sizes[name] = _megabytes((ROOT / name).rglob("*.py"))
    return sizes


def _megabytes(files: Iterable[Path]) -> float:
    return sum(file.stat().st_size for file in files if file.is_file() and "__pycache__" not in file.parts) / 1e6
