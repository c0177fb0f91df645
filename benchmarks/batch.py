"""A batch of many rows: throughput and memory, in one process and on Ray, against a service that is faster than both.

``python -m benchmarks.batch`` samples 200,000 rows with `sample_file`; ``tools/ray.sh -m benchmarks.batch --on-ray``
does so with `loops_async.ray.sample_files` too, and prints the ratio; ``--save`` keeps the figures in
``results/batch.json``, from where ``tools/guide_tables.py`` writes them into ``docs/scaling.md``. ``--quick`` takes
2,000 rows.

A steady rate is that from a tenth of the output to nine tenths, so without the start of processes. CPU is that of all
processes but the service, which other programs on the machine affect less than they affect rates. Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct, to_builtins
from msgspec.structs import asdict

import loops_async as loops

from .harness import serving

RESULTS: Final = Path(__file__).with_name("results") / "batch.json"
ROWS: Final = 200_000
QUICK_ROWS: Final = 2_000
LIMIT: Final = 64
TOKENS: Final = 64
LOOK_SECONDS: Final = 1.0
TICKS: Final = os.sysconf("SC_CLK_TCK")
PAGE_MB: Final = os.sysconf("SC_PAGE_SIZE") / 2**20

Work = Callable[[loops.SamplingClient, loops.BatchSettings, Path, Path], Awaitable[loops.BatchReport]]


class Figures(Struct):
    """What one run over all rows took. Memory is in MB: after a fifth of the rows, and at most."""

    seconds: float
    rows_per_second: float
    steady_rows_per_second: float | None
    cpu_ms_per_row: float
    driver_mb: tuple[float, float]
    largest_worker_mb: tuple[float, float]


class Look(Struct):
    """What a run had done, and what it used, at a moment."""

    time: float
    written: int
    """Bytes of the output."""
    driver_mb: float
    largest_worker_mb: float


class Watch(threading.Thread):
    """Looks each second at the output of this process, at its memory, and at the processes that it has started."""

    def __init__(self, target: Path) -> None:
        super().__init__(daemon=True)
        self.looks: list[Look] = []
        self._target = target
        self._cpu: dict[int, float] = {}
        self._before: dict[int, float] = {}
        self._done = threading.Event()

    def __enter__(self) -> Watch:
        self._look()
        self._before = dict(self._cpu)
        self.looks.clear()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
        self._look()

    @property
    def cpu_seconds(self) -> float:
        """What all processes have used meanwhile."""
        return sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._cpu.items())

    def run(self) -> None:
        """Look, until the end."""
        while not self._done.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        workers = [0.0]
        for pid in (os.getpid(), *descendants(os.getpid())):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if "benchmarks.server" in command:
                continue
            self._cpu[pid] = (int(fields[11]) + int(fields[12])) / TICKS
            memory = int(fields[21]) * PAGE_MB
            if pid == os.getpid():
                own = memory
            elif "MapWorker" in command:
                workers.append(memory)
        self.looks.append(Look(time.perf_counter(), size(self._target), own, max(workers)))


def figures(watch: Watch, rows: int, seconds: float) -> Figures:
    """Return the figures of a run that was watched."""
    looks = watch.looks
    whole = looks[-1].written

    def after(share: float) -> Look:
        return next(look for look in looks if look.written >= share * whole)

    first, last, fifth = after(0.1), after(0.9), after(0.2)
    part, time = (last.written - first.written) / whole, last.time - first.time
    return Figures(
        seconds=round(seconds, 1),
        rows_per_second=round(rows / seconds),
        steady_rows_per_second=round(rows * part / time) if part > 0.5 else None,
        cpu_ms_per_row=round(1000 * watch.cpu_seconds / rows, 3),
        driver_mb=(round(fifth.driver_mb), round(max(look.driver_mb for look in looks))),
        largest_worker_mb=(round(fifth.largest_worker_mb), round(max(look.largest_worker_mb for look in looks))),
    )


def measure(url: str, source: Path, target: Path, rows: int, work: Work) -> Figures:
    """Sample all rows, and return the figures."""

    async def run() -> loops.BatchReport:
        async with loops.ServiceClient(base_url=url, api_key="benchmark", on_exit="leave") as service:
            sampler = await service.create_sampling_client("bench")
            params = loops.SamplingParams(max_tokens=TOKENS)
            return await work(sampler, loops.BatchSettings.of(sampler, sampling_params=params), source, target)

    with Watch(target) as watch:
        began = time.perf_counter()
        report = asyncio.run(run())
        seconds = time.perf_counter() - began
    assert report.answered == rows, report
    return figures(watch, rows, seconds)


async def in_one_process(
    sampler: loops.SamplingClient, settings: loops.BatchSettings, source: Path, target: Path
) -> loops.BatchReport:
    """Sample the file with one event loop."""
    return await loops.sample_file(sampler, source, target, settings=settings, limit=LIMIT)


def on_ray(workers: int) -> Work:
    """Return what samples the file on Ray."""
    import ray

    import loops_async.ray as loops_ray

    os.environ["BASETEN_API_KEY"] = "benchmark"  # which the workers read
    ray.init(num_cpus=workers + 2, include_dashboard=False, logging_level="error")

    async def work(
        sampler: loops.SamplingClient, settings: loops.BatchSettings, source: Path, target: Path
    ) -> loops.BatchReport:
        return await loops_ray.sample_files(
            source, target, sampler, settings=settings, workers=workers, limit=LIMIT * workers
        )

    return work


def write(file: Path, rows: int) -> None:
    """Write rows with short prompts."""
    with file.open("w") as lines:
        lines.writelines(json.dumps({"id": number, "prompt": [number % 50_000, 7, 8]}) + "\n" for number in range(rows))


def size(path: Path) -> int:
    """Return the bytes of a file, or of all records in a folder."""
    try:
        return sum(each.stat().st_size for each in (path.glob("part-*") if path.is_dir() else [path]))
    except FileNotFoundError:
        return 0


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, and those that these have."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from descendants(child)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows")
    parser.add_argument("--rows", type=int, help=f"how many rows; {ROWS} by default")
    parser.add_argument("--on-ray", action="store_true", help="also on Ray, which must be installed")
    parser.add_argument("--workers", type=int, default=2, help="the workers on Ray")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    given = parser.parse_args()
    rows = given.rows or (QUICK_ROWS if given.quick else ROWS)
    found: dict[str, Figures] = {}

    def show(name: str, work: Work, target: str) -> None:
        found[name] = figures = measure(url, folder / "in.jsonl", folder / target, rows, work)
        print(f"{name}: {rows} rows,", ", ".join(f"{field} {value}" for field, value in asdict(figures).items()))

    with serving(["--samples", "1"], pin=False) as url, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder / "in.jsonl", rows)
        load = os.getloadavg()[0]
        show("one process", in_one_process, "out.jsonl")
        if given.on_ray:
            show("on Ray", on_ray(given.workers), "out")
    result = {
        "rows": rows,
        "tokens": TOKENS,
        "workers": given.workers,
        "load_before": round(load, 1),
        **to_builtins(found),
    }
    if given.on_ray:
        alone, ray = found["one process"], found["on Ray"]
        result["ratio"] = round(ray.rows_per_second / alone.rows_per_second, 2)
        if ray.steady_rows_per_second and alone.steady_rows_per_second:
            result["steady_ratio"] = round(ray.steady_rows_per_second / alone.steady_rows_per_second, 2)
        print(f"on Ray / one process: {result['ratio']}, steady {result.get('steady_ratio', 'not known')}")
    if given.save:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
