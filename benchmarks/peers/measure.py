"""Measuring, the same for every peer; imports nothing but the standard library."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

PROMPT = [(31 * n) % 49_152 for n in range(512)]
SAMPLES = 4
MAX_TOKENS = 256
DATUM_TOKENS = 2048

T = TypeVar("T")
Workload = Callable[[argparse.Namespace], Any]


def arguments() -> argparse.Namespace:
    """Parse the command line with which the harness starts a peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--url", default="")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="no warm-up, so that connections count too")
    parser.add_argument("--make", choices=["lists", "numpy"], help="also measure building the datums, from these")
    parser.add_argument("--processes", type=int, help="the worker processes of sample_many")
    parser.add_argument("--token-names", action="store_true", help="the answers name tokens and have no ids")
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop's event loop")
    parser.add_argument("--blind", action="store_true", help="do not watch the event loop, which costs a little")
    parser.add_argument("--callgrind", action="store_true", help="let callgrind count the measured part only")
    return parser.parse_args()


class Clock:
    """Measures CPU and wall time, the longest time that the event loop was held, threads and memory."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._is_blind = given.blind
        self._is_counted = given.callgrind
        self._longest = 0.0
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start, outside of an event loop."""
        self._memory = _reset_peak_memory()
        self._count("on")
        self._cpu, self._wall = _cpu_seconds(), time.perf_counter()

    async def start_watching(self) -> None:
        """Start, and watch the running loop."""
        if not self._is_blind:
            self._watch = asyncio.create_task(self._watch_loop())
            await asyncio.sleep(0)
        self.start()

    def stop(self, count: int) -> dict[str, float]:
        """Stop; return the numbers for `count` units of work: seconds, microseconds, kilobytes of 1,000 bytes."""
        cpu, wall = _cpu_seconds() - self._cpu, time.perf_counter() - self._wall
        self._count("off")
        if self._watch is not None:
            self._watch.cancel()
        return {
            "cpu_us": cpu / count * 1e6,
            "wall_us": wall / count * 1e6,
            "wall_s": wall,
            "held_ms": self._longest * 1e3,
            "threads": float(threading.active_count()),
            "memory_kb": (_memory("VmHWM") - self._memory) / count / 1e3,
        }

    def _count(self, switch: str) -> None:
        if self._is_counted:
            subprocess.run(
                ["callgrind_control", f"--instr={switch}", str(os.getpid())], check=True, capture_output=True
            )

    async def _watch_loop(self) -> None:
        # Sleeping 1 ms at a time costs little; while the loop is held, the sleep lasts longer.
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            self._longest = max(self._longest, time.perf_counter() - started - 0.001)


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _reset_peak_memory() -> float:
    """Reset the peak and return the bytes in use; the peak of `resource` would include the parent's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: no number
        return 0.0
    return _memory("VmRSS")


def _memory(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def runner(given: argparse.Namespace) -> Callable[[Coroutine[Any, Any, T]], T]:
    """Return the function that runs a coroutine: of asyncio, or of uvloop with ``--uvloop``."""
    if given.uvloop:
        import uvloop

        run: Callable[[Coroutine[Any, Any, T]], T] = uvloop.run
        return run
    return asyncio.run


async def in_flight(call: Callable[[], Awaitable[object]], count: int, at_once: int) -> None:
    """Make `count` calls, `at_once` at a time."""

    async def worker(share: int) -> None:
        for _ in range(share):
            await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker(max(1, count // at_once)))


async def sampling(given: argparse.Namespace, call: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Sample `count` times, with warm connections unless ``--cold`` is given."""
    if not given.cold:
        await in_flight(call, given.in_flight, given.in_flight)
    clock = Clock(given)
    await clock.start_watching()
    await in_flight(call, given.count, given.in_flight)
    return clock.stop(given.count)


async def training(given: argparse.Namespace, call: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Send a batch several times after a warm-up, or with ``--cold`` once without one."""
    times = 1 if given.cold else max(5, 60 // given.count)
    if not given.cold:
        await call()
    clock = Clock(given)
    await clock.start_watching()
    for _ in range(times):
        await call()
    return clock.stop(times)


def batch(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Make `count` rows of 2,048 tokens with four tensors, 107 kB of JSON each, as lists or as numpy arrays."""
    numbers = random.Random(1)
    rows = [_row(numbers) for _ in range(given.count)]
    if given.make != "numpy":
        return rows
    import numpy as np

    return [{name: np.asarray(values) for name, values in row.items()} for row in rows]


def _row(numbers: random.Random) -> dict[str, list[Any]]:
    return {
        "tokens": [numbers.randrange(50_000) for _ in range(DATUM_TOKENS)],
        "target_tokens": [numbers.randrange(50_000) for _ in range(DATUM_TOKENS)],
        "logprobs": [-numbers.random() for _ in range(DATUM_TOKENS)],
        "advantages": [numbers.random() for _ in range(DATUM_TOKENS)],
        "mask": [1.0] * DATUM_TOKENS,
    }


def main(workloads: dict[str, Workload]) -> None:
    """Run the workload that the command line names, and print its numbers as JSON."""
    given = arguments()
    print(json.dumps(workloads[given.workload](given)))
