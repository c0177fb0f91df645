"""Measuring, the same for every peer; imports nothing but the standard library."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

PROMPT = [(31 * n) % 49_152 for n in range(512)]
SAMPLES = 4
MAX_TOKENS = 256
DATUM_TOKENS = 2048

Workload = Callable[[argparse.Namespace], Any]


def arguments() -> argparse.Namespace:
    """What the harness asks of a peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--url", required=True)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--numpy", action="store_true")
    parser.add_argument("--blind", action="store_true", help="do not watch the event loop, which costs a little")
    return parser.parse_args()


class Clock:
    """CPU and wall seconds of a stretch, the longest time that the event loop was held, threads and peak memory."""

    def __init__(self) -> None:
        self._memory = _peak_kilobytes()
        self._longest = 0.0
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, outside of an event loop."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    async def start_watching(self, *, blind: bool) -> None:
        """Begin, and watch the running loop unless `blind`."""
        if not blind:
            self._watch = asyncio.create_task(self._look())
            await asyncio.sleep(0)
        self.start()

    def stop(self, count: int) -> dict[str, float]:
        """End; the numbers are for `count` units of work."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        if self._watch is not None:
            self._watch.cancel()
        return {
            "cpu_us": cpu / count * 1e6,
            "wall_s": wall,
            "held_ms": self._longest * 1e3,
            "threads": float(threading.active_count()),
            "memory_kb": (_peak_kilobytes() - self._memory) / count,
        }

    async def _look(self) -> None:
        # Sleeping 1 ms at a time costs little; a loop that is held wakes this late.
        while True:
            asleep = time.perf_counter()
            await asyncio.sleep(0.001)
            self._longest = max(self._longest, time.perf_counter() - asleep - 0.001)


def _peak_kilobytes() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


async def in_flight(call: Callable[[], Awaitable[object]], count: int, at_once: int) -> None:
    """Make `count` calls, `at_once` at a time."""

    async def worker(share: int) -> None:
        for _ in range(share):
            await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker(max(1, count // at_once)))


def batch(megabytes: float) -> list[dict[str, list[Any]]]:
    """Make rows of 2,048 tokens with four tensors; 107 kB of JSON each."""
    numbers = random.Random(1)
    return [
        {
            "tokens": [numbers.randrange(50_000) for _ in range(DATUM_TOKENS)],
            "target_tokens": [numbers.randrange(50_000) for _ in range(DATUM_TOKENS)],
            "logprobs": [-numbers.random() for _ in range(DATUM_TOKENS)],
            "advantages": [numbers.random() for _ in range(DATUM_TOKENS)],
            "mask": [1.0] * DATUM_TOKENS,
        }
        for _ in range(max(1, round(megabytes / 0.107)))
    ]


def main(workloads: dict[str, Workload]) -> None:
    """Run the workload that was asked for and print its numbers as JSON."""
    given = arguments()
    print(json.dumps(workloads[given.workload](given)))
