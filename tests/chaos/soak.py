"""Work through one client for a long time, and watch what it holds: memory, sockets, files, threads and tasks.

The service and a fault proxy run as processes of their own, by their commands, so that all that is measured here is the
client's. Prints a summary, draws a picture, and exits with 1 when anything grows, hangs or raises what it must not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, field

import loops_async as loops
from loops_local.faults import Answer, Delay, Drop, LoseAnswer, Truncate

from .leftovers import holdings
from .unseen import unseen_errors

SAMPLES_AT_ONCE: Final = 32
STEP_SECONDS: Final = 120.0
"""How long one turn of the work may take before it counts as hung; it takes half a second."""
GROWTH_MB: Final = 8.0
GROWTH_SHARE: Final = 0.05
"""Memory may grow by the larger of the two between the second and the last quarter: allocators breathe."""

PLAN: Final = (
    Drop(probability=0.002),
    LoseAnswer(route="POST /trainers/*", probability=0.01),
    Truncate(route="GET */operations/*", probability=0.005),
    Answer(route="POST */sample", status=503, probability=0.005),
    Answer(route="GET /v1/*", status=502, body="<html>", probability=0.05),
    Delay(probability=0.005, seconds=0.5),
)


class Measured(Struct):
    """What the process held, once a second."""

    seconds: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    sockets: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """Measure now."""
        held = Counter(name.split(" ")[0] for name in holdings().elements())
        self.seconds.append(seconds)
        self.memory_mb.append(_memory_mb())
        self.sockets.append(held["socket"])
        self.files.append(held["file"])
        self.threads.append(held["thread"])
        self.tasks.append(held["task"])

    def growth(self) -> dict[str, tuple[float, float]]:
        """Return the medians of the second and the last quarter, by what was measured."""
        quarter = max(1, len(self.seconds) // 4)
        return {
            name: (statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:]))
            for name, values in self._series()
        }

    def growing(self) -> list[str]:
        """Return what grew by more than it may."""
        medians = self.growth()
        before, after = medians.pop("memory_mb")
        grown = ["memory_mb"] if after - before > max(GROWTH_MB, GROWTH_SHARE * before) else []
        # The pool keeps as many connections as there were samples at once.
        return grown + [name for name, (then, now) in medians.items() if now - then > (8 if name == "sockets" else 3)]

    def _series(self) -> Sequence[tuple[str, Sequence[float]]]:
        return [(name, values) for name, values in msgspec.structs.asdict(self).items() if name != "seconds"]

    def draw(self, path: Path, title: str) -> None:
        """Draw each series over time."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        figure, all_axes = plt.subplots(len(self._series()), sharex=True, figsize=(8, 9), constrained_layout=True)
        for axes, (name, values) in zip(all_axes, self._series(), strict=True):
            axes.plot([second / 60 for second in self.seconds], values, linewidth=1)
            axes.set_ylabel("memory, MB" if name == "memory_mb" else name)
            axes.set_ylim(0, 1.1 * max(values))
            axes.grid(alpha=0.3)
        all_axes[-1].set_xlabel("minutes")
        figure.suptitle(title)
        figure.savefig(path, dpi=100)
        plt.close(figure)


class Work:
    """Turns of training and sampling, through one client."""

    def __init__(self, service: loops.ServiceClient) -> None:
        self._service = service
        self._trainer: loops.TrainingClient | None = None
        self.counts: Counter[str] = Counter()
        self.untyped: list[str] = []

    async def turn(self) -> None:
        """Train a step, publish, sample, save, list and download; begin a new run now and then."""
        try:
            if self._trainer is None or self.counts["turns"] % 50 == 49:
                await self._renew()
            await self._use()
        except loops.LoopsError as error:
            self.counts[f"given up: {type(error).__name__}"] += 1
            await self._discard()
        except Exception as error:
            self.untyped.append(repr(error)[:300])
            await self._discard()
        self.counts["turns"] += 1

    async def _renew(self) -> None:
        await self._discard()
        self._trainer = await self._service.create_lora_training_client("echo", rank=4)

    async def _discard(self) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            await trainer.close()

    async def _use(self) -> None:
        assert self._trainer is not None
        datum = loops.Datum(model_input=[1] * 512, loss_fn_inputs={"target_tokens": [2] * 512})
        forward = await self._trainer.forward_backward([datum] * 8)
        update = await self._trainer.optim_step(loops.AdamParams())
        await forward
        await update
        sampler = await self._trainer.save_weights_and_get_sampling_client("policy")
        params = loops.SamplingParams(max_tokens=256)
        prompts = [[1, 2, 3]] * SAMPLES_AT_ONCE
        async for one in sampler.sample_many(prompts, sampling_params=params, limit=SAMPLES_AT_ONCE, keep_errors=True):
            self.counts["samples"] += 1
            self.counts["samples that failed"] += one.error is not None
        saving = await self._trainer.save_state("state")
        await saving
        checkpoint = next(one for one in await self._trainer.list_checkpoints() if one.checkpoint_id == "state")
        with tempfile.TemporaryDirectory() as directory:
            await self._service.download_checkpoint(checkpoint.id, dest_dir=directory)


async def soak(seconds: float, seed: int) -> tuple[Measured, Work, list[str]]:
    """Work for `seconds`; return what was measured, what was done, and what is wrong."""
    wrong: list[str] = []
    measured = Measured()
    with tempfile.TemporaryDirectory() as scratch:
        async with (
            _service(Path(scratch)) as (url, key),
            _proxy(Path(scratch), url, seed) as faulty,
            loops.ServiceClient(base_url=faulty, api_key=key, on_exit="leave") as service,
        ):
            work = Work(service)
            started = time.monotonic()
            watching = asyncio.create_task(_watch(measured, started))
            while time.monotonic() - started < seconds:
                turn = asyncio.create_task(work.turn())
                await asyncio.wait([turn], timeout=STEP_SECONDS)
                if not turn.done():
                    wrong.append(f"hung: a turn takes over {STEP_SECONDS:g} s")
                    turn.cancel()
                    break
            watching.cancel()
    return measured, work, wrong + [f"untyped: {text}" for text in work.untyped]


async def _watch(measured: Measured, started: float) -> None:
    while True:
        measured.add(time.monotonic() - started)
        await asyncio.sleep(1)


@asynccontextmanager
async def _service(scratch: Path) -> AsyncIterator[tuple[str, str]]:
    arguments = ("serve", "--engine", "echo", "--port", "0", "--data-dir", str(scratch / "data"))
    async with _command(*arguments, "--provisioning-seconds", "0") as said:
        (url,) = re.findall(r"running at (\S+)", said)
        yield url, (scratch / "data" / "api_key").read_text()


@asynccontextmanager
async def _proxy(scratch: Path, to: str, seed: int) -> AsyncIterator[str]:
    plan = scratch / "plan.json"
    plan.write_bytes(msgspec.json.encode({"faults": PLAN}))
    async with _command("faults", "--to", to, "--plan", str(plan), "--seed", str(seed)) as said:
        (url,) = re.findall(r"injected at (\S+)", said)
        yield url


@asynccontextmanager
async def _command(*arguments: str) -> AsyncIterator[str]:
    """Run a command of loops-local until the end; give what it says at its start."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loops_local", *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        said = await process.stdout.readuntil(b"Press Ctrl-C to stop.\n")
        yield said.decode()
        process.terminate()
        ended = (await process.stdout.read()).decode()
        if ended:
            print("faults: " + ", ".join(f"{name} {n}" for name, n in msgspec.json.decode(ended)["faults"].items()))
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _memory_mb() -> float:
    """Return the resident memory; of its peak where the system does not tell the present."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> int:
    """Soak as long as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a new one")
    parser.add_argument("--picture", type=Path, default=Path("soak.png"), help="default: %(default)s")
    asked = parser.parse_args()
    print(f"soak: seed {asked.seed}; again with: python -m tests.chaos.soak --seed {asked.seed}", flush=True)
    with unseen_errors() as unseen:
        measured, work, wrong = asyncio.run(soak(asked.minutes * 60, asked.seed))
    wrong += [f"unseen: {line}" for line in unseen]
    wrong += [f"grows: {name}" for name in measured.growing()]
    print("did: " + ", ".join(f"{name} {count:,}" for name, count in sorted(work.counts.items())))
    for name, (before, after) in measured.growth().items():
        print(f"{name:10} {before:8.1f} in the second quarter, {after:8.1f} in the last")
    measured.draw(asked.picture, f"{asked.minutes:g} minutes, {work.counts['samples']:,} samples under faults")
    print(f"picture: {asked.picture}")
    for line in wrong[:20]:
        print(line.upper() if line.startswith("grows") else line)
    print(f"{len(wrong)} things wrong, seed {asked.seed}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
