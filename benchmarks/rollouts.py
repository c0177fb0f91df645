"""Asynchronous RL on a simulated service: how much of the hardware each way of ordering the work uses.

``python -m benchmarks.rollouts`` runs the real `RolloutStream` in virtual time, days of it in a few minutes, prints the
table, and saves `results/rollouts.json` and `docs/async-rl.png`. The service is that of `simulated.py`: 64 slots,
generations with a mean of 33 s and a long tail, 60 s of training for 16 groups of 8, 5 s for publishing. The bound is
what the slower of the two, sampler or trainer, could do if it never waited.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import track
from rich.table import Table

from loops_async import Episode, SamplingParams
from loops_async._rollouts.options import Options
from loops_async._rollouts.stream import RolloutStream

from . import virtual_time
from .report import COLOURS, RESULTS
from .simulated import Service, SimulatedTrainer

GROUP_SIZE: Final = 8
GROUPS_PER_STEP: Final = 16
SAMPLES_PER_STEP: Final = GROUP_SIZE * GROUPS_PER_STEP
WARM_UP: Final = 12
"""Steps before the measurement: the first ones have fewer groups to wait for."""
PICTURE: Final = Path(__file__).parents[1] / "docs" / "async-rl.png"


@dataclass(frozen=True)
class Way:
    """A way of ordering the work, and the share of the bound that a prototype has reached with it."""

    name: str
    prototype: float
    max_staleness: int = 0
    run_ahead: int | None = None
    minibatches: int = 1
    training: float = Service.training
    waits: bool = True
    has_barrier: bool = False
    """Samples one batch while the one before is trained, and waits for both."""


WAYS: Final = (
    Way("synchronous", 0.20),
    Way("synchronous, minibatches=4", 0.23, minibatches=4),
    Way("one step off, a barrier per batch", 0.25, max_staleness=1, has_barrier=True),
    Way("max_staleness=1", 0.39, max_staleness=1),
    Way("max_staleness=2", 0.54, max_staleness=2),
    Way("max_staleness=4", 0.81, max_staleness=4),
    Way("max_staleness=8", 0.95, max_staleness=8),
    Way("run_ahead=1, max_staleness=4", 0.56, run_ahead=1, max_staleness=4),
    Way("run_ahead=2, max_staleness=8", 0.89, run_ahead=2, max_staleness=8),
    Way("run_ahead=4, max_staleness=16", 1.00, run_ahead=4, max_staleness=16),
    Way("training 120 s", 0.96, run_ahead=4, max_staleness=16, training=120.0),
    Way("training 120 s, wait=False", 1.00, run_ahead=4, max_staleness=16, training=120.0, waits=False),
)


@dataclass(frozen=True)
class Result:
    """What a way has reached: shares of the bound and of the time, and steps of staleness."""

    name: str
    of_bound: float
    prototype: float
    trainer_idle: float
    staleness_mean: float
    staleness_max: int


class Measurement:
    """Counts from the end of the warm-up on."""

    def __init__(self, trainer: SimulatedTrainer, warm_up: int) -> None:
        self._trainer = trainer
        self._warm_up = warm_up
        self._began = 0.0
        self._busy = 0.0
        self._samples = 0
        self._ages: list[int] = []
        self.longest = 0

    def handed_out(self, step: int, versions: Iterable[int]) -> None:
        """Count the groups of a batch."""
        ages = [step - version for version in versions]
        self.longest = max(self.longest, *ages)
        self._ages += ages
        self._samples += len(ages) * GROUP_SIZE

    def step_ended(self, step: int) -> None:
        """Begin to count if this was the last step of the warm-up."""
        if step + 1 == self._warm_up:
            self._began, self._busy = asyncio.get_running_loop().time(), self._trainer.busy_seconds
            self._ages, self._samples = [], 0

    def result(self, way: Way, service: Service) -> Result:
        """Return what was measured until now."""
        seconds = asyncio.get_running_loop().time() - self._began
        return Result(
            name=way.name,
            of_bound=self._samples / seconds / service.bound(SAMPLES_PER_STEP),
            prototype=way.prototype,
            trainer_idle=1.0 - (self._trainer.busy_seconds - self._busy) / seconds,
            staleness_mean=statistics.fmean(self._ages),
            staleness_max=self.longest,
        )


def simulate(way: Way, *, steps: int, seed: int = 0, warm_up: int = WARM_UP) -> Result:
    """Run a way for some steps after the warm-up, in virtual time: equal arguments, equal results."""
    run = _barrier if way.has_barrier else _stream
    return virtual_time.run(run(way, steps, seed, warm_up))


async def _stream(way: Way, steps: int, seed: int, warm_up: int) -> Result:
    service = Service(training=way.training)
    trainer = SimulatedTrainer(service)
    measured = Measurement(trainer, warm_up)
    options = Options(
        group_size=GROUP_SIZE,
        groups_per_step=GROUPS_PER_STEP,
        max_staleness=way.max_staleness,
        run_ahead=way.run_ahead,
        minibatches=way.minibatches,
        seed=seed,
    )
    async with RolloutStream(trainer, _rollout, count(), options, limit=service.slots) as stream:
        async for batch in stream:
            measured.handed_out(batch.step, [group.version for group in batch.groups])
            await trainer.train(1 / way.minibatches, is_step=batch.is_last_of_step)
            if batch.is_last_of_step:
                await stream.publish(wait=way.waits)
                measured.step_ended(batch.step)
                if batch.step + 1 == warm_up + steps:
                    break
        return measured.result(way, service)


async def _rollout(ctx: Any, task: int) -> Episode:
    episode = Episode.start([0])
    await ctx.sample(episode, SamplingParams(max_tokens=1))
    episode.reward = float(ctx.member % 2)  # so that there is something to learn from each group
    return episode


async def _barrier(way: Way, steps: int, seed: int, warm_up: int) -> Result:
    """What many loops do: sample the next batch while this one is trained, wait for both, then publish."""
    service = Service(training=way.training)
    trainer = SimulatedTrainer(service)
    measured = Measurement(trainer, warm_up)

    async def sample_batch(step: int) -> None:
        first = (seed << 32) + step * SAMPLES_PER_STEP
        params = [SamplingParams(seed=first + number) for number in range(SAMPLES_PER_STEP)]
        await asyncio.gather(*(trainer.sampler.sample([0], 1, each) for each in params))

    await sample_batch(0)
    for step in range(warm_up + steps):
        measured.handed_out(step, [max(0, step - 1)] * GROUPS_PER_STEP)
        await asyncio.gather(sample_batch(step + 1), trainer.train())
        await (await trainer.publish("policy"))
        measured.step_ended(step)
    return measured.result(way, service)


def simulate_all(steps: int, seeds: Sequence[int]) -> list[Result]:
    """Run every way with each seed; return the means over the seeds."""
    logging.getLogger("loops_async").setLevel(logging.ERROR)  # waiting for half a minute is normal here
    runs = [
        [simulate(way, steps=steps, seed=seed) for seed in seeds] for way in track(WAYS, description="simulated days")
    ]
    return [_mean(results) for results in runs]


def _mean(results: Sequence[Result]) -> Result:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(result, name) for result in results)

    return Result(
        name=results[0].name,
        of_bound=mean("of_bound"),
        prototype=results[0].prototype,
        trainer_idle=mean("trainer_idle"),
        staleness_mean=mean("staleness_mean"),
        staleness_max=max(result.staleness_max for result in results),
    )


def show(console: Console, results: Sequence[Result]) -> None:
    """Print the table."""
    table = Table(title="share of what the slower of sampler and trainer could do")
    for heading in ("way", "of the bound", "prototype", "trainer idle", "staleness", "most"):
        table.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=True)
    for each in results:
        shares = [f"{share:.0%}" for share in (each.of_bound, each.prototype, each.trainer_idle)]
        table.add_row(each.name, *shares, f"{each.staleness_mean:.1f}", str(each.staleness_max))
    console.print(table)


def save(results: Sequence[Result], steps: int, seeds: Sequence[int]) -> None:
    """Write the numbers."""
    report = {
        "service": asdict(Service()),
        "group_size": GROUP_SIZE,
        "groups_per_step": GROUPS_PER_STEP,
        "steps": steps,
        "seeds": len(seeds),
        "rows": [{name: _rounded(value) for name, value in asdict(each).items()} for each in results],
    }
    (RESULTS / "rollouts.json").write_text(json.dumps(report, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def draw(results: Sequence[Result], to: Path) -> None:
    """Draw the shares of the bound, and what staleness buys."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, curve) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    places = range(len(results))
    shares = bars.barh(places, [100 * each.of_bound for each in results], color=COLOURS["ours"])
    bars.bar_label(shares, [f"{each.of_bound:.0%}" for each in results], padding=3)
    bars.set_yticks(places, [each.name for each in results])
    bars.invert_yaxis()
    bars.set_xlim(0, 112)
    bars.set_xlabel("% of what the slower of sampler and trainer could do")
    for prefix, colour, label in (
        ("max_staleness", COLOURS["published"], "max_staleness"),
        ("run_ahead", COLOURS["ours"], "run_ahead"),
    ):
        chosen = [each for each in results if each.name.startswith(prefix)]
        points = [each.staleness_mean for each in chosen], [100 * each.of_bound for each in chosen]
        curve.plot(*points, marker="o", color=colour, label=label)
    curve.set_xlabel("mean staleness in steps")
    curve.set_ylabel("% of the bound")
    curve.set_xlim(0, 8.5)
    curve.set_ylim(0, 105)
    curve.legend(loc="lower right", frameon=False)
    for axes in (bars, curve):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=110)


def main() -> None:
    """Simulate, print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps of each run after the warm-up")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way, whose means are shown")
    given = parser.parse_args()
    seeds = range(given.seeds)
    results = simulate_all(given.steps, seeds)
    show(Console(), results)
    save(results, given.steps, seeds)
    draw(results, PICTURE)


if __name__ == "__main__":
    main()
