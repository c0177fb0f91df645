"""Curves of a training run: printed while they grow, and drawn at the end."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator


class Curves:
    """Named curves over steps; those that share a unit share a plot."""

    def __init__(self, title: str, units: dict[str, str]) -> None:
        self.points: dict[str, list[tuple[int, float]]] = {name: [] for name in units}
        self._title = title
        self._units = units
        self._started = time.monotonic()

    def add(self, step: int, **values: float) -> None:
        """Add a point to each named curve, with `_` for spaces in its name, and print it."""
        for name, value in values.items():
            self.points[name.replace("_", " ")].append((step, value))
        text = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
        print(f"{time.monotonic() - self._started:5.0f} s  step {step:2}  {text}", flush=True)

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
