"""How far a batch is, in words: once a minute where nothing else shows it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from .._tasks import cancel_and_wait
from .report import BatchReport

PROGRESS_SECONDS: Final = 60.0
"""How often a line is told."""


def has_terminal() -> bool:
    """Whether standard error is a terminal, where a person may be watching."""
    return sys.stderr is not None and sys.stderr.isatty()


def how_far(report: BatchReport) -> str:
    """Return e.g. ``1,200 of 9,000 prompts answered, 3 failed``."""
    return f"{report.answered:,} of {report.rows:,} prompts answered, {report.failed:,} failed"


def progress_line(before: BatchReport, now: BatchReport, seconds: float) -> str:
    """Return how far a batch is, how fast it was in the last `seconds`, and how long it still takes at that rate."""
    line = how_far(now)
    if not before.rows:  # the input was still being read
        return line
    done = now.answered + now.failed
    rate = (done - before.answered - before.failed) / seconds
    if rate <= 0:
        return f"{line}; none in the last {seconds:.0f} s"
    return f"{line}; {rate:,.1f} a second, about {timedelta(seconds=round((now.rows - done) / rate))} left"


@asynccontextmanager
async def told_each_minute(
    now: Callable[[], Awaitable[BatchReport]], tell: Callable[[str], object]
) -> AsyncGenerator[None]:
    """Within the block, pass a line of progress to `tell` each minute; `now` returns how far the batch is."""

    async def lines() -> None:
        clock = asyncio.get_running_loop().time
        before, looked_at = await now(), clock()
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            report, time = await now(), clock()
            if report.rows:
                tell(progress_line(before, report, time - looked_at))
            before, looked_at = report, time

    telling = asyncio.create_task(lines(), name="loops_async: lines of progress")
    try:
        yield
    finally:
        await cancel_and_wait([telling])
