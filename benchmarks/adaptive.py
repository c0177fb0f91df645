"""`Adaptive` beside the best fixed limit, on three kinds of samplers whose capacity halves after an hour.

``python -m benchmarks.adaptive`` runs the real `Limiter` in virtual time (some two minutes for 300 hours), prints the
table, and saves `results/adaptive.json` and `docs/adaptive.png`. There are always more prompts than places. Answers
have a lognormal length: 33 s on a sampler that is not full, with a long tail. The rate of each hour includes its
beginning: the growth from 16 in flight, and the time until the loss of half of the capacity is noticed.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import track
from rich.table import Table

from loops_async import Adaptive, ApiError, Limiter
from loops_async._http.retry import BUSY
from loops_async._sampling.limiter import report_rejection, slots

from . import virtual_time
from .report import COLOURS, RESULTS

SPEED: Final = 30.0
"""Tokens per second of a sequence on a sampler that is not full."""
MEAN_SECONDS: Final = 33.0
SIGMA: Final = 1.0
HOUR: Final = 3600.0
CAPACITIES: Final = (64, 512)
FIXED: Final = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.5, 2.0)
"""The fixed limits, as shares of the capacity of the first hour."""
SEEDS: Final = 3
TARGET: Final = 0.9
PICTURE: Final = Path(__file__).parents[1] / "docs" / "adaptive.png"


class Sampler(ABC):
    """A sampler that generates best with `capacity` sequences at once."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.random = random.Random(seed)

    @abstractmethod
    async def generate(self, tokens: int) -> None:
        """Generate a sequence."""

    def halve(self) -> None:
        """Lose half of the capacity."""
        self.capacity //= 2


class Queueing(Sampler):
    """Generates `capacity` sequences at once; the others wait."""

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self._busy = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def generate(self, tokens: int) -> None:
        if self._busy >= self.capacity:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        else:
            self._busy += 1
        await asyncio.sleep(tokens / SPEED)
        if self._waiting and self._busy <= self.capacity:
            self._waiting.popleft().set_result(None)  # the place passes to it
        else:
            self._busy -= 1


class Refusing(Sampler):
    """Answers 429 when it generates `capacity` sequences; each is tried again after a pause, as in `sample`."""

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self._busy = 0

    async def generate(self, tokens: int) -> None:
        pause = BUSY.first_pause
        while self._busy >= self.capacity:
            report_rejection(ApiError("full", status=429))
            await asyncio.sleep(pause * self.random.uniform(0.5, 1.0))
            pause = min(2 * pause, BUSY.longest_pause)
        self._busy += 1
        await asyncio.sleep(tokens / SPEED)
        self._busy -= 1


class Thrashing(Sampler):
    """Takes every sequence, but with more than `capacity` it becomes slower: at twice as many, it has half the rate."""

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        """A heap: the value of `_each` at the end of a sequence, its number, and what wakes it."""
        self._each = 0.0
        """Tokens that a sequence has got that runs since the beginning; all get the same."""
        self._updated = 0.0
        self._started = 0
        self._timer: asyncio.TimerHandle | None = None

    async def generate(self, tokens: int) -> None:
        self._update()
        done = asyncio.get_running_loop().create_future()
        self._started += 1
        heappush(self._running, (self._each + tokens, self._started, done))
        self._set_timer()
        await done

    def halve(self) -> None:
        self._update()
        super().halve()
        self._set_timer()

    def _speed(self) -> float:
        return SPEED * min(1.0, (self.capacity / max(1, len(self._running))) ** 2)

    def _update(self) -> None:
        now = asyncio.get_running_loop().time()
        self._each += (now - self._updated) * self._speed()
        self._updated = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            seconds = max(0.0, self._running[0][0] - self._each) / self._speed()
            self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._update()
        while self._running and self._running[0][0] <= self._each + 1e-6:
            _, _, done = heappop(self._running)
            if not done.done():  # it was not cancelled
                done.set_result(None)
        self._set_timer()


SAMPLERS: Final[tuple[type[Sampler], ...]] = (Queueing, Thrashing, Refusing)


@dataclass
class Run:
    """Two hours with one limit: tokens per second in each, and what was seen every half minute."""

    rates: list[float]
    limits: list[int] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)
    rejections: int = 0


def simulate(kind: type[Sampler], capacity: int, limit: int | Adaptive, *, seed: int = 0) -> Run:
    """Sample for two hours, after the first of which the capacity halves."""
    return virtual_time.run(_simulate(kind(capacity, seed), Limiter(limit), random.Random(seed)))


async def _simulate(sampler: Sampler, limiter: Limiter, lengths: random.Random) -> Run:
    tokens, run = [0, 0], Run([])

    async def sample_on_and_on() -> None:
        while True:
            async with slots(limiter, 1) as held:
                length = 1 + int(SPEED * MEAN_SECONDS * lengths.lognormvariate(-SIGMA * SIGMA / 2, SIGMA))
                await sampler.generate(length)
                held.finished(length)
            tokens[-1 if len(run.rates) else 0] += length

    tasks = [asyncio.create_task(sample_on_and_on()) for _ in range(4 * sampler.capacity)]
    for hour in range(2):
        for _ in range(int(HOUR / 30)):
            await asyncio.sleep(30)
            run.limits.append(limiter.limit)
            run.in_flight.append(limiter.in_flight)
        run.rates.append(tokens[hour] / HOUR)
        sampler.halve()
    run.rejections = limiter.rejections
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return run


@dataclass(frozen=True)
class Result:
    """An hour: the best fixed limit with its tokens per second, and the share of them that `Adaptive` has reached."""

    sampler: str
    capacity: int
    is_after_halving: bool
    best_limit: int
    best_rate: float
    shares: list[float]


def compare(kind: type[Sampler], capacity: int, seeds: int = SEEDS) -> list[Result]:
    """Measure both hours with every fixed limit, and with `Adaptive` and several seeds."""
    fixed = {limit: simulate(kind, capacity, limit) for limit in (round(share * capacity) for share in FIXED)}
    adaptive = [simulate(kind, capacity, Adaptive(), seed=seed) for seed in range(seeds)]
    results = []
    for hour in range(2):
        best = max(fixed, key=lambda limit: fixed[limit].rates[hour])
        rate = fixed[best].rates[hour]
        shares = [run.rates[hour] / rate for run in adaptive]
        results.append(Result(kind.__name__.lower(), capacity >> hour, hour == 1, best, rate, shares))
    return results


def cost(limit: int | Adaptive | None, *, requests: int = 100_000, in_flight: int = 64) -> float:
    """Return the CPU microseconds that a limiter costs for each of these requests, which always wait for a place."""

    async def work(places: Callable[[], AbstractAsyncContextManager[Any]], count: int) -> None:
        for _ in range(count):
            async with places() as held:
                await asyncio.sleep(0)
                if held is not None:
                    held.finished(100)

    async def main() -> None:
        places: Callable[[], Any] = nullcontext
        if limit is not None:
            places = partial(slots, Limiter(limit), 1)
        await asyncio.gather(*(work(places, requests // in_flight // 2) for _ in range(2 * in_flight)))

    began = time.process_time()
    asyncio.run(main())
    return (time.process_time() - began) / requests * 1e6


def main() -> None:
    """Measure, print and save."""
    console = Console()
    cases: list[Callable[[], list[Result]]] = [
        partial(compare, kind, capacity) for capacity in CAPACITIES for kind in SAMPLERS
    ]
    results = [result for case in track(cases, "simulating", console=console) for result in case()]
    without = statistics.median(cost(None) for _ in range(5))
    limits: dict[str, int | Adaptive] = {"fixed": 64, "adaptive": Adaptive(initial=64, minimum=64, maximum=64)}
    costs = {name: statistics.median(cost(limit) - without for _ in range(5)) for name, limit in limits.items()}
    show(console, results, costs)
    save(results, costs)
    draw(PICTURE)


def show(console: Console, results: Sequence[Result], costs: dict[str, float]) -> None:
    """Print the table and the costs."""
    table = Table(title="tokens per second of Adaptive, as shares of those of the best fixed limit")
    for heading in ("sampler", "hour", "best fixed limit", "Adaptive", ""):
        table.add_column(heading, justify="left" if heading in ("sampler", "hour") else "right")
    for one in results:
        hour = "after the capacity has halved" if one.is_after_halving else "from the start"
        word = "[green]kept[/]" if min(one.shares) >= TARGET else f"[red]below {TARGET:.0%}[/]"
        shares = " ".join(f"{share:.1%}" for share in one.shares)
        table.add_row(f"{one.sampler}, {one.capacity} at once", hour, str(one.best_limit), shares, word)
    console.print(table)
    for name, microseconds in costs.items():
        console.print(f"a {name} limit costs {microseconds:.1f} us of CPU for each request")


def save(results: Sequence[Result], costs: dict[str, float]) -> None:
    """Write the numbers."""
    rows = [asdict(one) | {"shares": [round(share, 3) for share in one.shares]} for one in results]
    report = {"rows": rows, "cpu_us_per_request": {name: round(value, 1) for name, value in costs.items()}}
    (RESULTS / "adaptive.json").write_text(json.dumps(report, indent=1) + "\n")


def draw(to: Path, capacity: int = CAPACITIES[0]) -> None:
    """Draw what the limit does on each kind of sampler."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(len(SAMPLERS), 1, figsize=(9, 7), sharex=True, layout="constrained")
    for axes, kind in zip(rows, SAMPLERS, strict=True):
        run = simulate(kind, capacity, Adaptive())
        minutes = [(index + 1) / 2 for index in range(len(run.limits))]
        best = [capacity if minute <= HOUR / 60 else capacity // 2 for minute in minutes]
        axes.step(minutes, run.limits, color=COLOURS["ours"], label="limit")
        axes.plot(minutes, run.in_flight, color=COLOURS["published"], linewidth=0.8, label="sequences in flight")
        axes.plot(minutes, best, color=COLOURS["limit"], linestyle="--", label="capacity")
        axes.set_title(f"{kind.__name__.lower()} sampler", fontsize=10, loc="left")
        axes.set_ylim(0, 2.2 * capacity)
        axes.spines[["top", "right"]].set_visible(False)
    rows[0].legend(loc="upper right", ncols=3)
    rows[-1].set_xlabel("minutes")
    figure.savefig(to, dpi=110)


if __name__ == "__main__":
    main()
