"""Operations of trainers: those of one run are executed in order, and their outcomes are kept for polls."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import islice
from typing import Any

from msgspec import Struct

from .._errors import shutting_down
from .._storage.logs import DeploymentLog
from .._storage.store import Store
from .outcomes import Work, run_to_outcome

__all__ = ["Operations", "UnfinishedOperation"]

_PURGE_SECONDS = 60.0


class UnfinishedOperation(Struct, frozen=True, kw_only=True):
    """An operation that waits for its turn, or is executed, and the seconds since it was submitted."""

    id: str
    run_id: str
    name: str
    started: bool
    age: float


class _Operation(Struct, eq=False):
    id: str
    name: str
    prepare: Work
    work: Work
    log: DeploymentLog
    outcome: asyncio.Future[bytes]
    submitted: float
    started: bool = False

    async def run(self) -> bytes:
        """Run to the outcome; `started` becomes true when the preparations are done."""
        return await run_to_outcome(self._run, name=self.name, operation_id=self.id, log=self.log)

    async def _run(self) -> Any:
        await self.prepare()
        self.started = True
        return await self.work()

    def abandon(self) -> None:
        """Report the shutdown of the service to all waiting polls."""
        if not self.outcome.done():
            self.outcome.set_exception(shutting_down())
            self.outcome.exception()  # marks it as retrieved, since there may be no poll


class _Queue(Struct, eq=False):
    """The operations of one run: the current one, and those after it."""

    waiting: deque[_Operation]
    current: _Operation | None = None
    task: asyncio.Task[None] | None = None


class Operations:
    """The queues of all runs.

    Each run executes at most one operation at a time, the oldest, so runs that share a training thread take turns. An
    outcome is stored before any poll returns it, and is kept for `retention_seconds`. Operations that a shutdown of
    the service interrupts are unknown afterwards; they had no effect.
    """

    def __init__(self, store: Store, *, retention_seconds: float) -> None:
        self._store = store
        self._retention_seconds = retention_seconds
        self._queues: dict[str, _Queue] = {}
        self._pending: dict[tuple[str, str], _Operation] = {}
        self._finished: dict[tuple[str, str], float] = {}
        self._last_purge = time.time()
        self._closing = False

    async def open(self) -> None:
        """Read which operations finished before the service was started."""
        self._finished = await self._store.finished_operations()
        self._purge(time.time())

    def submit(
        self, run_id: str, operation_id: str, name: str, *, prepare: Work, work: Work, log: DeploymentLog
    ) -> None:
        """Add an operation to the end of its run's queue, unless this id was submitted before.

        Args:
            run_id: the run.
            operation_id: the id that the caller gave it; each is executed at most once in a run.
            name: its name on the wire.
            prepare: waits until the work can start; may be cancelled.
            work: does the work and returns the result as the wire shows it; is never cancelled.
            log: gets one line on how it ended.
        """
        if self._closing:
            raise shutting_down()
        self._purge_if_due()
        key = run_id, operation_id
        if key in self._pending or key in self._finished:
            return
        outcome: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        operation = self._pending[key] = _Operation(operation_id, name, prepare, work, log, outcome, time.monotonic())
        queue = self._queues.get(run_id)
        if queue is not None:
            queue.waiting.append(operation)
        else:
            # Filled before its task is created: a loop with eager tasks runs that at once.
            queue = self._queues[run_id] = _Queue(deque([operation]))
            queue.task = asyncio.create_task(self._run_queue(run_id, queue), name=f"operations of run {run_id}")

    @property
    def counts(self) -> tuple[int, int]:
        """The number of operations that are executed, and of those that wait."""
        started = sum(queue.current is not None and queue.current.started for queue in self._queues.values())
        return started, len(self._pending) - started

    def oldest(self, most: int) -> list[UnfinishedOperation]:
        """Return the oldest operations that have not ended."""
        now = time.monotonic()
        return [
            UnfinishedOperation(
                id=each.id, run_id=run_id, name=each.name, started=each.started, age=now - each.submitted
            )
            for (run_id, _), each in islice(self._pending.items(), most)
        ]

    async def outcome(self, run_id: str, operation_id: str, *, hold_seconds: float) -> bytes | None:
        """Return an operation's outcome as JSON, None if it has not ended within `hold_seconds`.

        Raises:
            KeyError: there is no such operation, or its outcome was deleted.
            HttpError: the service shuts down before the operation.
        """
        operation = self._pending.get((run_id, operation_id))
        if operation is not None:
            done, _ = await asyncio.wait([operation.outcome], timeout=hold_seconds)
            return operation.outcome.result() if done else None
        self._purge_if_due()
        stored = None
        if (run_id, operation_id) in self._finished:
            stored = await self._store.outcome(run_id, operation_id)
        if stored is None:
            raise KeyError(operation_id)
        return stored

    async def close(self) -> None:
        """Finish the operations that have started, and abandon the others."""
        self._closing = True
        tasks = [queue.task for queue in self._queues.values() if queue.task is not None]
        for queue in self._queues.values():
            if queue.task is not None and not (queue.current and queue.current.started):
                queue.task.cancel()
        for operation in self._pending.values():
            if not operation.started:
                operation.abandon()
        await asyncio.gather(*tasks, return_exceptions=True)
        for operation in self._pending.values():
            operation.abandon()

    async def _run_queue(self, run_id: str, queue: _Queue) -> None:
        while queue.waiting and not self._closing:
            operation = queue.current = queue.waiting.popleft()
            outcome = await operation.run()
            await self._store.put_outcome(run_id, operation.id, outcome)
            self._finished[run_id, operation.id] = time.time()
            del self._pending[run_id, operation.id]
            operation.outcome.set_result(outcome)
        del self._queues[run_id]

    def _purge_if_due(self) -> None:
        now = time.time()
        if now - self._last_purge > min(_PURGE_SECONDS, self._retention_seconds):
            self._purge(now)

    def _purge(self, now: float) -> None:
        self._last_purge = now
        before = now - self._retention_seconds
        old = [key for key, finished in self._finished.items() if finished < before]
        for key in old:
            del self._finished[key]
        if old:
            self._store.delete_outcomes(before)
