"""How a run's training went: the curves that the dashboard shows, in memory since the start of the service.

The memory is bounded, whatever the number of steps: `MOST_POINTS` points for each curve, of 16 bytes each, and at most
`MOST_OWN` curves of the caller's own metrics.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Mapping
from typing import Final

from loops_async.types import ForwardBackwardOutput

__all__ = ["MOST_OWN", "MOST_POINTS", "OUTLINE_POINTS", "Curve", "RunHistory"]

MOST_POINTS: Final = 512
OUTLINE_POINTS: Final = 32
MOST_OWN: Final = 64
LONGEST_NAME: Final = 200
MOST_VERSIONS: Final = 256

_OF_STEPS: Final = ("grad_norm", "learning_rate")
_SPEED_STEPS: Final = 10
_TOKENS: Final = "tokens:sum"


class Curve:
    """One metric over the steps of a run.

    When `MOST_POINTS` is reached, each two neighbours become one point: the mean of both, at the step of the second.
    From then on, a point stands for twice as many steps as before.
    """

    def __init__(self) -> None:
        self._steps = array("q")
        self._values = array("d")
        self._each = 1
        self._sum = 0.0
        self._count = 0
        self._outline: list[float] | None = None
        self.last: float | None = None

    def add(self, step: int, value: float) -> None:
        """Add the value of a step that is later than those before."""
        if not self._count:
            self._steps.append(step)
            self._values.append(value)
        self._outline = None
        self._sum += value
        self._count += 1
        self._steps[-1], self._values[-1], self.last = step, self._sum / self._count, value
        if self._count == self._each:
            self._sum, self._count = 0.0, 0
            if len(self._steps) == MOST_POINTS:
                self._halve()

    def _halve(self) -> None:
        pairs = zip(self._values[::2], self._values[1::2], strict=True)
        self._values = array("d", [(first + second) / 2 for first, second in pairs])
        self._steps = self._steps[1::2]
        self._each *= 2

    @property
    def last_step(self) -> int:
        """The step of the newest value, 0 without one."""
        return self._steps[-1] if self._steps else 0

    def cut(self, step: int) -> None:
        """Forget what came after a step, to which the run has returned."""
        kept = sum(each <= step for each in self._steps)
        if kept < len(self._steps):
            del self._steps[kept:], self._values[kept:]
            self._outline, self._sum, self._count = None, 0.0, 0
            self.last = self._values[-1] if kept else None

    @property
    def points(self) -> list[tuple[int, float]]:
        """The step and the value of each point."""
        return list(zip(self._steps, self._values, strict=True))

    @property
    def outline(self) -> list[float]:
        """At most `OUTLINE_POINTS` values for a small picture, each the rounded mean of a part of the curve.

        It is kept until the curve changes: most of a thousand runs do not.
        """
        if self._outline is None:
            size = math.ceil(len(self._values) / OUTLINE_POINTS) or 1
            parts = (self._values[at : at + size] for at in range(0, len(self._values), size))
            self._outline = [float(f"{sum(part) / len(part):.4g}") for part in parts]
        return self._outline


class RunHistory:
    """Curves, published versions and speed of a run."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {"loss": Curve(), **{name: Curve() for name in _OF_STEPS}}
        self.own: dict[str, Curve] = {}
        self.versions: deque[tuple[int, str]] = deque(maxlen=MOST_VERSIONS)
        self.used_at: float | None = None
        self._loss = 0.0
        self._datums = 0
        self._tokens = 0.0
        self._speeds: deque[tuple[float, float]] = deque(maxlen=_SPEED_STEPS)

    def used(self) -> None:
        """Note that an operation uses the trainer."""
        self.used_at = time.time()

    def passed(self, output: ForwardBackwardOutput, datums: int) -> None:
        """Add a pass to the next step; its loss counts by its number of datums."""
        self._loss += output.loss * datums
        self._datums += datums
        self._tokens += output.metrics.get(_TOKENS, 0.0)

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add an optimizer step, with the passes since the one before."""
        if self._datums:
            self.curves["loss"].add(step, self._loss / self._datums)
        for name in _OF_STEPS:
            if name in metrics:
                self.curves[name].add(step, metrics[name])
        self._speeds.append((time.monotonic(), self._tokens))
        self._loss, self._datums, self._tokens = 0.0, 0, 0.0

    def add_own(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics of the caller's own to a step; a step that is there already stays as it is.

        After `MOST_OWN` names, new ones are left out, and so are very long ones.
        """
        for name, value in metrics.items():
            if name not in self.own and (len(self.own) >= MOST_OWN or len(name) > LONGEST_NAME):
                continue
            curve = self.own.setdefault(name, Curve())
            if step > curve.last_step:
                curve.add(step, value)

    def published(self, version: int, name: str) -> None:
        """Note that the sampler serves this version."""
        self.versions.append((version, name))

    def returned(self, step: int) -> None:
        """Forget what came after the step to which the trainer was set."""
        for curve in (*self.curves.values(), *self.own.values()):
            curve.cut(step)
        self.versions = deque((each for each in self.versions if each[0] <= step), maxlen=MOST_VERSIONS)
        self._loss, self._datums, self._tokens = 0.0, 0, 0.0
        self._speeds.clear()

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of the last ten steps, None before the second one."""
        if len(self._speeds) < 2:
            return None
        seconds = self._speeds[-1][0] - self._speeds[0][0]
        return sum(tokens for _, tokens in list(self._speeds)[1:]) / seconds if seconds > 0 else None
