"""Run the peers side by side, print medians and ratios, and keep them with a picture.

``python -m benchmarks`` runs everything (about ten minutes), ``--quick`` a small part of it once. Every measurement
is a fresh process on one core, against a server on another; the peers take turns within each round, so that whatever
else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("limit", "ours", "ours_sync", "published")
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Case:
    """One row: a workload, its size, and which number of it is compared."""

    name: str
    workload: str
    count: int
    measure: str
    peers: Sequence[str]
    in_flight: int = 1
    server: Sequence[str] = ()
    extra: Sequence[str] = ()
    rounds: int = 3
    is_quick: bool = False


@dataclass
class Row:
    """The medians of a case, by peer; a peer that could not run has none."""

    case: Case
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, peer: str) -> float | None:
        """The number that is compared."""
        return self.numbers[peer][self.case.measure] if peer in self.numbers else None


SAMPLERS = ("limit", "ours", "published")
CASES = [
    Case("sample, 1 in flight", "sample", 2000, "cpu_us", SAMPLERS, 1),
    Case("sample, 64 in flight", "sample", 3000, "cpu_us", SAMPLERS, 64, is_quick=True),
    Case("sample, 512 in flight", "sample", 3000, "cpu_us", SAMPLERS, 512),
    Case("sample, 1,024 in flight, 1 s each", "sample", 1024, "wall_s", SAMPLERS, 1024, ("--sample-seconds", "1")),
    Case("sample, 4,096 in flight, 1 s each", "sample", 4096, "wall_s", SAMPLERS[:2], 4096, ("--sample-seconds", "1")),
    Case(
        "sample, 10,000 in flight, 1 s each",
        "sample",
        10_000,
        "wall_s",
        SAMPLERS[:2],
        10_000,
        ("--sample-seconds", "1"),
    ),
    Case(
        "sample, 10,000 in flight: memory",
        "sample",
        10_000,
        "memory_kb",
        SAMPLERS[:2],
        10_000,
        ("--sample-seconds", "1"),
        rounds=1,
    ),
    Case("batch of 0.1 MB", "train", 0, "cpu_us", SAMPLERS),
    Case("batch of 14 MB", "train", 14, "cpu_us", SAMPLERS, is_quick=True),
    Case("batch of 14 MB: loop held", "train", 14, "held_ms", SAMPLERS),
    Case("batch of 14 MB from numpy", "train", 14, "cpu_us", ("ours",), extra=("--numpy",)),
    Case("batch of 64 MB", "train", 64, "cpu_us", SAMPLERS, rounds=1),
    Case("one msgspec encode of 14 MB", "encode", 14, "cpu_us", ("limit",)),
    Case("provision 1 run of 3 s", "provision", 1, "wall_s", SAMPLERS, rounds=1),
    Case("provision 32 runs of 3 s", "provision", 32, "wall_s", SAMPLERS, rounds=1),
    Case("provision 256 runs of 3 s", "provision", 256, "wall_s", SAMPLERS[:2], rounds=1),
    Case("provision 1,000 runs of 3 s", "provision", 1000, "wall_s", SAMPLERS[:2], rounds=1),
    Case("list the checkpoints of 500 runs", "list", 500, "wall_s", SAMPLERS, rounds=1),
    Case("blocking sample, 1 thread", "sample", 1000, "cpu_us", ("ours", "ours_sync"), 1),
    Case("blocking sample, 8 threads", "sample", 1600, "cpu_us", ("ours", "ours_sync"), 8),
    Case("blocking sample, 64 threads", "sample", 3200, "cpu_us", ("ours", "ours_sync"), 64),
]


def main() -> None:
    """Run the cases and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, one round, nothing kept")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    given = parser.parse_args()
    console = Console()
    rows = []
    for case in CASES:
        if given.only in case.name and (case.is_quick or not given.quick):
            with console.status(case.name):
                rows.append(measure(case, rounds=1 if given.quick else case.rounds))
    report = {
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "imports": imports(),
        "installed": installed(),
    }
    show(console, rows, report)
    if not given.quick and not given.only:
        keep(report, rows)


def measure(case: Case, rounds: int) -> Row:
    """Run a case in turn with every peer, and take the medians."""
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for peer in case.peers:
            with serving(case.server) as url:
                numbers = run_peer(peer, case, url)
            if numbers is not None:
                runs.setdefault(peer, []).append(numbers)
    medians = {
        peer: {name: statistics.median(run[name] for run in many) for name in many[0]} for peer, many in runs.items()
    }
    return Row(case, medians)


@contextmanager
def serving(options: Sequence[str]) -> Iterator[str]:
    """Run the benchmark's server on the last core."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*pinned(-1), sys.executable, "-m", "benchmarks.server", "--port", str(port), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def run_peer(peer: str, case: Case, url: str) -> dict[str, float] | None:
    """Run one peer in a fresh process on the first core; None when it is not installed or fails."""
    python = published() if peer == "published" else sys.executable
    if python is None:
        return None
    command = [*pinned(0), python, "-W", "ignore", "-m", f"benchmarks.peers.{peer}", case.workload, "--url", url]
    command += ["--count", str(case.count), "--in-flight", str(case.in_flight), *case.extra]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(f"{peer}, {case.name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    numbers: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers


def published() -> str | None:
    """The interpreter that has the published client; the tests of ``tests/compat`` install it."""
    return next((str(stamp.parent / "bin" / "python") for stamp in ROOT.glob(".venv-compat/*/baseten-loops==*")), None)


def pinned(core: int) -> list[str]:
    """The prefix of a command that stays on one of this process's cores, where the system can do that."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cores[core])]


def imports() -> dict[str, float]:
    """Seconds to import the library, and its four dependencies alone: the best of ten fresh processes each."""

    def best(modules: str) -> float:
        code = f"import time; t = time.perf_counter(); import {modules}; print(time.perf_counter() - t)"
        command = [*pinned(0), sys.executable, "-c", code]
        return min(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(10))

    return {"dependencies": best("aiohttp, anyio, msgspec, backoff"), "loops_async": best("loops_async")}


def installed() -> dict[str, float]:
    """Megabytes on disk of the core and everything that it requires."""
    from packaging.requirements import Requirement

    sizes: dict[str, float] = {}
    waiting = ["aiohttp", "anyio", "backoff", "msgspec"]
    while waiting:
        name = waiting.pop()
        if name in sizes:
            continue
        distribution = importlib.metadata.distribution(name)
        files = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
        sizes[name] = (
            sum(file.stat().st_size for file in files if file.is_file() and "__pycache__" not in str(file)) / 1e6
        )
        requirements = [Requirement(text) for text in distribution.requires or []]
        waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    sizes["loops_async"] = sum(file.stat().st_size for file in (ROOT / "loops_async").rglob("*.py")) / 1e6
    sizes["loops_sync"] = sum(file.stat().st_size for file in (ROOT / "loops_sync").rglob("*.py")) / 1e6
    return {**sizes, "total": sum(sizes.values())}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    versions = {name: importlib.metadata.version(name) for name in ("aiohttp", "anyio", "msgspec", "backoff")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.machine(),
        "versions": versions,
    }


def asdict(row: Row) -> dict[str, Any]:
    """A row as it is kept."""
    return {"case": row.case.name, "measure": row.case.measure, "numbers": row.numbers}


def show(console: Console, rows: Sequence[Row], report: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"medians, {report['machine']['date']}, Python {report['machine']['python']}")
    for heading in ("case", "unit", *PEERS, "ours / limit", "published / ours"):
        table.add_column(heading, justify="left" if heading in ("case", "unit") else "right")
    for row in rows:
        cells = [_number(row.of(peer)) if peer in row.case.peers else "" for peer in PEERS]
        table.add_row(
            row.case.name,
            row.case.measure,
            *cells,
            _ratio(row.of("ours"), row.of("limit")),
            _ratio(row.of("published"), row.of("ours")),
        )
    console.print(table)
    times, sizes = report["imports"], report["installed"]
    ratio = _ratio(times["loops_async"], times["dependencies"])
    console.print(f"import: {times['loops_async'] * 1e3:.0f} ms, {ratio} x its dependencies alone")
    console.print(f"installed: {sizes['total']:.1f} MB with all dependencies")


def _number(value: float | None) -> str:
    return "not available" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _ratio(above: float | None, below: float | None) -> str:
    return "" if above is None or not below else f"{above / below:.2f}"


def keep(report: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the numbers and the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(report, indent=1) + "\n")
    shown = [row for row in rows if row.of("ours") and (row.of("limit") or row.of("published"))]
    figure, axes = plt.subplots(figsize=(10, 0.45 * len(shown) + 1.5), layout="constrained")
    for offset, (peer, colour) in enumerate((("limit", "#9aa5b1"), ("ours", "#2563eb"), ("published", "#d97706"))):
        places = [index + 0.27 * (offset - 1) for index, row in enumerate(shown) if row.of(peer)]
        ratios = [(row.of(peer) or 0) / (row.of("ours") or 1) for row in shown if row.of(peer)]
        axes.barh(places, ratios, height=0.25, color=colour, label={"ours": "loops_async"}.get(peer, peer))
    axes.set_yticks(range(len(shown)), [row.case.name for row in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("cost relative to loops_async (log scale; shorter is better)")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "latest.png", dpi=110)


if __name__ == "__main__":
    main()
