"""A limit of sequences in flight that all workers of a job share."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any, Final
from uuid import uuid4

import ray

from .._arguments import check_at_least
from .._sampling.adaptive import Adaptive
from .._sampling.limiter import Limiter, follow, wake
from ..errors import LoopsError
from .shares import Report, Shares

__all__ = ["Follower", "SharedLimit"]

REPORT_SECONDS: Final = 1.0
"""How often workers report."""

log: logging.Logger = logging.getLogger("loops_async")


class _Keeper:
    """The actor that divides the limit, counts the records, and keeps why the job has stopped."""

    def __init__(self, limit: int | Adaptive, workers: int) -> None:
        self._shares = Shares(limit, workers)
        self._stopped: LoopsError | None = None
        self._answered = 0
        self._failed = 0

    def report(self, worker: str, report: Report) -> tuple[int, LoopsError | None]:
        self._answered += report.answered
        self._failed += report.failed
        return self._shares.report(worker, report, monotonic()), self._stopped

    def sampled(self) -> tuple[int, int]:
        return self._answered, self._failed

    def stop(self, reason: LoopsError) -> None:
        self._stopped = self._stopped or reason

    def stopped(self) -> LoopsError | None:
        return self._stopped


class SharedLimit:
    """The most sequences in flight of a whole job, whichever workers they are in.

    An actor, which needs no CPU, divides the limit among the workers by what they have to do. They report once a
    second; a place is granted to one worker only when another one has given it back, or has been silent for 5 s. It can
    be pickled.

    Args:
        limit: the most sequences in flight; an `Adaptive` follows what all workers report.
        workers: how many there will be: each has at least one place.

    Raises:
        InputError: the limit is smaller than the number of workers.

    Example:
        ::

            limit = loops_ray.SharedLimit(loops.Adaptive(maximum=20_000), workers=64)
            first = loops_ray.sample(ds, client, settings=settings, workers=64, limit=limit)
    """

    def __init__(self, limit: int | Adaptive, *, workers: int = 1) -> None:
        self.workers: int = check_at_least(workers, 1, "workers")
        first = Shares(limit, workers).limit  # which refuses what is wrong, here and not in the actor
        self.even_share: int = -(-first // workers)
        """What a worker has when all have the same to do, at the beginning."""
        keeper: Any = ray.remote(_Keeper)
        self._keeper: Any = keeper.options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote(limit, workers)

    async def report(self, worker: str, report: Report) -> tuple[int, LoopsError | None]:
        """Report for a worker; return its share, and why to ask for no more, if that is so."""
        answer: tuple[int, LoopsError | None] = await self._keeper.report.remote(worker, report)
        return answer

    async def stop(self, reason: LoopsError) -> None:
        """Let all workers ask for no more; the first reason is kept."""
        await self._keeper.stop.remote(reason)

    async def sampled(self) -> tuple[int, int]:
        """Return how many rows have been answered, and how many have failed; those that a death repeats count twice."""
        counts: tuple[int, int] = await self._keeper.sampled.remote()
        return counts

    async def stopped(self) -> LoopsError | None:
        """Return why the workers ask for no more; None if they do."""
        reason: LoopsError | None = await self._keeper.stopped.remote()
        return reason


class Follower:
    """The part of a shared limit in one worker: what its `Limiter` follows. Used on one event loop."""

    def __init__(self, shared: SharedLimit) -> None:
        self.limit = 0
        self.clock = monotonic()
        self.limiter = Limiter(1)
        follow(self.limiter, self)
        self._shared = shared
        self._name = uuid4().hex
        self._finished: list[tuple[int, int, float]] = []
        self._rejections = 0
        self._answered = 0
        self._failed = 0
        self._reporting: asyncio.Task[None] | None = None
        self._has_place = asyncio.Event()
        self._turn = asyncio.Lock()
        self.stopped: LoopsError | None = None

    async def ready(self) -> None:
        """Wait until there is a place here; without one, nothing may be sent."""
        if self._reporting is None:
            self._reporting = asyncio.create_task(self._report_on(), name="loops_async: report to the shared limit")
        await self._has_place.wait()

    async def stop(self, reason: LoopsError) -> None:
        """Stop the whole job."""
        self.stopped = self.stopped or reason
        await self._shared.stop(reason)

    def sampled(self, *, is_answer: bool) -> None:
        """Count a record."""
        self._answered += is_answer
        self._failed += not is_answer

    # --- events of the limiter ---

    def occupied(self, now: float, in_flight: int, waiting: int) -> None:
        self.clock = now

    def finished(self, count: int, tokens: int, began: float) -> None:
        self._finished.append((count, tokens, self.clock - began))

    def rejected(self) -> None:
        self._rejections += 1

    async def report(self) -> None:
        """Report now: what a worker has not told is lost when Ray ends it, as it does when no block is left."""
        async with self._turn:  # so that the newest answer is the last
            try:
                await self._report()
            except ray.exceptions.RayError as problem:
                log.warning("the shared limit does not answer; this worker keeps its share: %s", problem)

    async def _report_on(self) -> None:
        while True:
            await self.report()
            await asyncio.sleep(REPORT_SECONDS)

    async def _report(self) -> None:
        limiter = self.limiter
        report = Report(
            self.limit,
            limiter.in_flight,
            limiter.waiting,
            finished=tuple(self._finished),
            rejections=self._rejections,
            answered=self._answered,
            failed=self._failed,
        )
        self._finished, self._rejections, self._answered, self._failed = [], 0, 0, 0
        self.limit, stopped = await self._shared.report(self._name, report)
        if self.stopped is not None and stopped is None:  # it was killed, and started again
            await self._shared.stop(self.stopped)
        self.stopped = self.stopped or stopped
        if self.limit:
            self._has_place.set()
            wake(limiter)
