"""Curves of a training run: printed while they grow, and drawn at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import msgspec
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from loops_async import EvaluationResult

ROLLOUTS = {
    "reward/mean": "mean reward",
    "evaluation/reward_mean": "mean reward",
    "staleness/mean": "staleness (steps)",
    "staleness/max": "staleness (steps)",
    "idle/trainer": "share of the step without work",
    "idle/sampler": "share of the step without work",
}
"""What the examples of asynchronous RL draw, of the metrics of their batches."""


class Curves:
    """Named curves over steps; those that share a unit share a plot.

    With a `file`, a program that was killed finds the points of the steps before `resumed_at` again.
    """

    def __init__(self, title: str, units: Mapping[str, str], file: Path | None = None, *, resumed_at: int = 0) -> None:
        self.points: dict[str, list[tuple[int, float]]] = {name: [] for name in units}
        self._title = title
        self._units = units
        self._started = time.monotonic()
        self._file = file
        if file is not None:
            file.parent.mkdir(exist_ok=True)
            file.touch()
            kept = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            file.write_bytes(b"".join(kept))
            for step, values in map(msgspec.json.decode, kept):
                if step < resumed_at:
                    self._append(step, values)

    def add(self, step: int, **values: float) -> None:
        """Add a point to each named curve, with `_` for spaces in its name, and print it."""
        self.add_metrics(step, {name.replace("_", " "): value for name, value in values.items()})

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each curve that is named like one of the metrics, and print it."""
        values = {name: value for name, value in metrics.items() if name in self.points}
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"{time.monotonic() - self._started:5.0f} s  step {step:2}  {text}", flush=True)
        self._append(step, values)
        if self._file is not None:
            with self._file.open("ab") as opened:
                opened.write(msgspec.json.encode((step, values)) + b"\n")

    def add_evaluation(self, result: EvaluationResult) -> None:
        """Add the metrics of an evaluation at the step whose weights it has sampled."""
        self.add_metrics(result.version, result.metrics)

    def rise(self, name: str) -> float:
        """Print how a curve has changed from its first to its last tenth, and return the difference."""
        values = [value for _, value in self.points[name]] or [0.0]
        size = -(-len(values) // 10)
        before, after = sum(values[:size]) / size, sum(values[-size:]) / size
        print(f"{name}: {before:.2f} at first, {after:.2f} at last")
        return after - before

    def draw(self, path: Path) -> None:
        """Draw one plot for each unit, side by side."""
        mpl.use("Agg")
        units = list(dict.fromkeys(self._units.values()))
        figure, row = plt.subplots(1, len(units), figsize=(5 * len(units), 3.8), layout="constrained", squeeze=False)
        figure.suptitle(self._title)
        for axes, unit in zip(row[0], units, strict=True):
            for name in (name for name in self.points if self._units[name] == unit):
                steps, values = ([point[i] for point in self.points[name]] for i in (0, 1))
                axes.plot(steps, values, marker="o", markersize=4, label=name)
            axes.set(xlabel="step", ylabel=unit)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        figure.savefig(path, dpi=120)
        print(f"curves drawn in {path}")

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.points[name].append((step, value))
