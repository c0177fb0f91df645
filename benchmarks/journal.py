"""What a journal costs: how many operations are submitted in a second, and the latency and CPU of a sample.

``python -m benchmarks.journal`` prints a table. The embedded service (the echo engine) has a process of its own. Each
row is the median of rounds, in which clients without a journal, with one, and with one that records samples take turns.
One submission after the other waits for the disk each time; those of many runs at once share that.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import loops_async as loops

SERVER: Final = """
import sys
from loops_local import serve_in_thread
with serve_in_thread(engine="echo", provisioning_seconds=0.0) as local:
    print(local.base_url, local.api_key, flush=True)
    sys.stdin.read()
"""
WAYS: Final[dict[str, dict[str, Any]]] = {
    "without": {},
    "journal": {"journal": "operations"},
    "with samples": {"journal": "samples", "journal_samples": True},
}
RUNS: Final = 64
PROMPT: Final = list(range(1, 513))
SAMPLED: Final = loops.SamplingParams(max_tokens=256)
GROUP: Final = 4


@contextmanager
def service() -> Iterator[Sequence[str]]:
    """Yield the URL and the key of a service in a process of its own."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()
        server.communicate()


async def rows(client: loops.ServiceClient) -> AsyncIterator[tuple[str, Callable[[], Awaitable[float]]]]:
    """Yield what is measured with a client: its name, and a function that does it once."""
    trainers = [await client.create_lora_training_client("echo", rank=4, name=f"{one}") for one in range(RUNS)]
    sampler = await trainers[0].save_weights_and_get_sampling_client("bench")

    async def submit(trainer: loops.TrainingClient, count: int) -> None:
        for _ in range(count):
            step = await trainer.optim_step(loops.AdamParams())
        await step

    async def one_run() -> float:
        begun = time.perf_counter()
        await submit(trainers[0], 200)
        return 200 / (time.perf_counter() - begun)

    async def many_runs() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(submit(trainer, 10) for trainer in trainers))
        return 10 * RUNS / (time.perf_counter() - begun)

    async def latency() -> float:
        begun = time.perf_counter()
        for _ in range(50):
            await sampler.sample(PROMPT, GROUP, SAMPLED)
        return (time.perf_counter() - begun) / 50 * 1e3

    async def cpu() -> float:
        begun = time.process_time()
        await asyncio.gather(*(sampler.sample(PROMPT, GROUP, SAMPLED) for _ in range(256)))
        return (time.process_time() - begun) / 256 * 1e6

    yield "submissions/s, one run", one_run
    yield f"submissions/s, {RUNS} runs at once", many_runs
    yield "ms of a sample, one after the other", latency
    yield "µs of CPU of a sample, 256 at once", cpu


async def measure(url: str, key: str, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median of each row, by way."""
    seen: dict[str, dict[str, list[float]]] = {}
    async with AsyncExitStack() as stack:
        calls: dict[str, dict[str, Callable[[], Awaitable[float]]]] = {}
        for way, options in WAYS.items():
            given = options | ({"journal": folder / options["journal"]} if options else {})
            opened = loops.ServiceClient(base_url=url, api_key=key, on_exit="leave", **given)
            client = await stack.enter_async_context(opened)
            calls[way] = {name: call async for name, call in rows(client)}
        for number in range(rounds + 1):
            for way, named in calls.items():
                for name, call in named.items():
                    value = await call()
                    if number:  # the first round warms up
                        seen.setdefault(name, {}).setdefault(way, []).append(value)
    return {name: {way: statistics.median(each) for way, each in ways.items()} for name, ways in seen.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service() as (url, key):
        measured = asyncio.run(measure(url, key, Path(folder), given.rounds))
    print(f"{'':40}" + "".join(f"{way:>14}" for way in WAYS))
    for name, ways in measured.items():
        print(f"{name:40}" + "".join(f"{ways[way]:>14,.1f}" for way in WAYS))


if __name__ == "__main__":
    main()
