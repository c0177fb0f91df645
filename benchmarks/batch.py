"""A batch of many rows: throughput and memory, in one process and on Ray, against a service that is faster than both.

``python -m benchmarks.batch`` samples 200,000 rows with `sample_file`; ``tools/ray.sh -m benchmarks.batch --on-ray``
does so with `loops_async.ray.sample_files` too, and prints the ratio. ``--quick`` takes 2,000 rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import loops_async as loops

from .harness import serving

ROWS: Final = 200_000
QUICK_ROWS: Final = 2_000
LIMIT: Final = 64
TOKENS: Final = 64

Work = Callable[[loops.SamplingClient, loops.BatchSettings, Path], Awaitable[loops.BatchReport]]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows")
    parser.add_argument("--rows", type=int, help=f"how many rows; {ROWS} by default")
    parser.add_argument("--on-ray", action="store_true", help="also on Ray, which must be installed")
    parser.add_argument("--workers", type=int, default=2, help="the workers on Ray")
    given = parser.parse_args()
    rows = given.rows or (QUICK_ROWS if given.quick else ROWS)
    with serving(["--samples", "1"], pin=False) as url, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder / "in.jsonl", rows)
        alone = measure("one process", url, folder, rows, in_one_process)
        if given.on_ray:
            import ray

            ray.init(num_cpus=given.workers + 2, include_dashboard=False, logging_level="error")

            async def on_ray(
                sampler: loops.SamplingClient, settings: loops.BatchSettings, folder: Path
            ) -> loops.BatchReport:
                import loops_async.ray as loops_ray

                return await loops_ray.sample_files(
                    folder / "in.jsonl",
                    folder / "out",
                    sampler,
                    settings=settings,
                    workers=given.workers,
                    limit=LIMIT * given.workers,
                )

            print(f"on Ray / one process: {measure('on Ray', url, folder, rows, on_ray) / alone:.2f}")


def measure(name: str, url: str, folder: Path, rows: int, work: Work) -> float:
    """Sample all rows, print figures, and return the rows per second."""

    async def run() -> loops.BatchReport:
        async with loops.ServiceClient(base_url=url, api_key="benchmark", on_exit="leave") as service:
            sampler = await service.create_sampling_client("bench")
            params = loops.SamplingParams(max_tokens=TOKENS)
            return await work(sampler, loops.BatchSettings.of(sampler, sampling_params=params), folder)

    before, began = peak_mb(), time.perf_counter()
    report = asyncio.run(run())
    seconds = time.perf_counter() - began
    assert report.answered == rows, report
    print(
        f"{name}: {rows} rows in {seconds:.1f} s, {rows / seconds:.0f} rows/s, peak of this process "
        f"{peak_mb():.0f} MB ({before:.0f} MB before)"
    )
    return rows / seconds


async def in_one_process(
    sampler: loops.SamplingClient, settings: loops.BatchSettings, folder: Path
) -> loops.BatchReport:
    """Sample the file with one event loop."""
    target = folder / "out.jsonl"
    report = await loops.sample_file(sampler, str(folder / "in.jsonl"), str(target), settings=settings, limit=LIMIT)
    target.unlink()
    return report


def write(file: Path, rows: int) -> None:
    """Write rows with short prompts."""
    with file.open("w") as lines:
        lines.writelines(json.dumps({"id": number, "prompt": [number % 50_000, 7, 8]}) + "\n" for number in range(rows))


def peak_mb() -> float:
    """Return the peak of this process's memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


if __name__ == "__main__":
    main()
