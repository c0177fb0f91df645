"""The results as a table, a file and a chart."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .cases import CASES, Case
from .harness import ROOT, Numbers, published_python

RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("limit", "encode", "ours", "ours_sync", "published")
COLOURS = {"limit": "#9aa5b1", "ours": "#2563eb", "published": "#d97706"}


@dataclass
class Row:
    """The medians of a case by peer, or the reason why a peer has none."""

    case: Case
    numbers: dict[str, Numbers] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def of(self, peer: str) -> float | None:
        """Return the number that is compared; None when the peer was not measured."""
        return self.numbers[peer][self.case.measure] if peer in self.numbers else None


@dataclass
class Promise:
    """A budget with the measured number."""

    what: str
    budget: str
    measured: float
    is_kept: bool


def promises_of(rows: Sequence[Row]) -> list[Promise]:
    """Return the budgets of the cases, within or exceeded."""
    return [
        Promise(row.case.name, budget.text, value, budget.is_kept_by(value))
        for row in rows
        for budget in row.case.budgets
        if (value := budget.value(row.numbers)) is not None
    ]


def show(console: Console, rows: Sequence[Row], promises: Sequence[Promise]) -> None:
    """Print the numbers, then the budgets."""
    table = Table(title="medians")
    for heading in ("case", "unit", *PEERS, "ours / limit", "published / ours"):
        table.add_column(heading, justify="left" if heading in ("case", "unit") else "right")
    for row in rows:
        cells = [_number(row.of(peer), row.failures.get(peer, "")) for peer in PEERS]
        ratios = _ratio(row.of("ours"), row.of("limit")), _ratio(row.of("published"), row.of("ours"))
        table.add_row(row.case.name, row.case.measure, *cells, *ratios)
    console.print(table)
    budgets = Table(title="budgets")
    for heading in ("case", "budget", "measured", ""):
        budgets.add_column(heading, justify="right" if heading == "measured" else "left")
    for promise in [*promises_of(rows), *promises]:
        word = "[green]kept[/]" if promise.is_kept else "[red]MISSED[/]"
        budgets.add_row(promise.what, promise.budget, _number(promise.measured), word)
    console.print(budgets)


def save(rows: Sequence[Row], promises: Sequence[Promise]) -> None:
    """Write the numbers and the chart."""
    RESULTS.mkdir(exist_ok=True)
    report = {
        "machine": machine(),
        "rows": [
            {
                "case": row.case.name,
                "compared": row.case.measure,
                "numbers": row.numbers,
                "not_measured": row.failures,
            }
            for row in rows
        ],
        "budgets": [asdict(promise) for promise in [*promises_of(rows), *promises]],
    }
    (RESULTS / "latest.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, RESULTS / "latest.png")


def saved() -> list[Row]:
    """Return the results of earlier runs."""
    file = RESULTS / "latest.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    cases = {case.name: case for case in CASES}
    return [Row(cases[row["case"]], row["numbers"], row["not_measured"]) for row in rows if row["case"] in cases]


def machine() -> dict[str, Any]:
    """Return the machine and the versions of this measurement."""
    published = published_python()
    versions = {name: importlib.metadata.version(name) for name in ("aiohttp", "anyio", "msgspec", "backoff", "uvloop")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
        "published": next((p.name for p in Path(published).parent.parent.glob("baseten-loops==*")), None)
        if published
        else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def draw(rows: Sequence[Row], to: Path) -> None:
    """Draw the cost of each peer, relative to ours."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.of("ours") and (row.of("limit") or row.of("published"))]
    figure, axes = plt.subplots(figsize=(10, 0.36 * len(shown) + 1.5), layout="constrained")
    for offset, (peer, colour) in enumerate(COLOURS.items()):
        points = [(index, value) for index, row in enumerate(shown) if (value := row.of(peer))]
        places = [index + 0.27 * (offset - 1) for index, _ in points]
        ratios = [value / (shown[index].of("ours") or 1) for index, value in points]
        axes.barh(places, ratios, height=0.25, color=colour, label={"ours": "loops_async"}.get(peer, peer))
    axes.set_yticks(range(len(shown)), [f"{row.case.name} ({row.case.measure.split('_')[0]})" for row in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.axvline(1, color=COLOURS["ours"], linewidth=0.8)
    axes.set_xlabel("cost relative to loops_async (log scale; shorter is better)")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=110)


def _number(value: float | None, otherwise: str = "") -> str:
    return otherwise if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _ratio(above: float | None, below: float | None) -> str:
    return "" if above is None or not below else f"{above / below:.2f}"
