"""The figures of the page on rollouts are those of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "async-rl.md"
RESULTS = ROOT / "benchmarks" / "results"


def test_the_table_is_that_of_the_benchmark() -> None:
    rows = json.loads((RESULTS / "rollouts.json").read_text())["rows"]
    wanted = [
        f"| {row['name']} | {row['of_bound']:.0%} | {row['prototype']:.0%} | {row['trainer_idle']:.0%} "
        f"| {row['staleness_mean']:.1f}, {row['staleness_max']} |"
        for row in rows
    ]
    _, table = PAGE.read_text().split("<!-- From benchmarks/results/rollouts.json")
    assert table.split("<!-- end")[0].splitlines()[4:-1] == wanted


def test_the_share_of_the_best_limit_is_that_of_the_benchmark() -> None:
    rows = json.loads((RESULTS / "adaptive.json").read_text())["rows"]
    least = min(share for row in rows for share in row["shares"])
    assert f"at least {100 * least:.0f} % of the best" in " ".join(PAGE.read_text().split())
