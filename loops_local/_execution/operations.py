"""Operations of trainers: run in order within each run, and answered to whoever polls."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct

from .engine import RefusedError
from .journal import Log
from .store import Store
from .web import HttpError

__all__ = ["Operations", "failed", "shutting_down"]

logger = logging.getLogger(__name__)

Step = Callable[[], Awaitable[Any]]
_PURGE_SECONDS = 60.0


class _Operation(Struct, eq=False):
    id: str
    name: str
    prepare: Step
    work: Step
    log: Log
    answer: asyncio.Future[bytes]
    at_work: bool = False


class _Queue(Struct, eq=False):
    """The operations of one run: the one that is under way, and those behind it."""

    waiting: deque[_Operation]
    current: _Operation | None = None
    task: asyncio.Task[None] | None = None


class Operations:
    """The queues of all runs.

    Each run has at most one operation under way, the oldest, so runs that share a training thread take turns. An
    answer is in the store before anybody hears it, and is kept for `retention_seconds`. Operations that the end of
    the service interrupts are unknown afterwards, and were not done.
    """

    def __init__(self, store: Store, *, retention_seconds: float) -> None:
        self._store = store
        self._retention_seconds = retention_seconds
        self._queues: dict[str, _Queue] = {}
        self._pending: dict[tuple[str, str], _Operation] = {}
        self._finished: dict[tuple[str, str], float] = {}
        self._purged = time.time()
        self._closing = False

    async def open(self) -> None:
        """Learn which operations finished before the service was started."""
        self._finished = await self._store.finished()
        self._purge(time.time())

    def submit(self, run_id: str, operation_id: str, name: str, *, prepare: Step, work: Step, log: Log) -> None:
        """Queue an operation behind the run's others, unless one of this id is known already.

        Args:
            run_id: whose turn it takes.
            operation_id: the caller's name for it; each is done at most once in a run.
            name: what it is called on the wire.
            prepare: waits until the work can begin; may be interrupted.
            work: does the work and returns what the wire shows; is never interrupted once it trains.
            log: is told how it went.
        """
        if self._closing:
            raise shutting_down()
        self._purge_sometimes()
        key = run_id, operation_id
        if key in self._pending or key in self._finished:
            return
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        operation = self._pending[key] = _Operation(operation_id, name, prepare, work, log, answer)
        queue = self._queues.get(run_id)
        if queue is None:
            queue = self._queues[run_id] = _Queue(deque())
            queue.task = asyncio.create_task(self._work_off(run_id, queue), name=f"operations of run {run_id}")
        queue.waiting.append(operation)

    async def answer(self, run_id: str, operation_id: str, *, hold_seconds: float) -> bytes | None:
        """Wait for an operation; return its encoded answer, or None when it is still under way.

        Raises:
            KeyError: no such operation, or it finished too long ago.
            HttpError: the service shuts down without having done it.
        """
        operation = self._pending.get((run_id, operation_id))
        if operation is not None:
            done, _ = await asyncio.wait([operation.answer], timeout=hold_seconds)
            return operation.answer.result() if done else None
        self._purge_sometimes()
        stored = None
        if (run_id, operation_id) in self._finished:
            stored = await self._store.answer(run_id, operation_id)
        if stored is None:
            raise KeyError(operation_id)
        return stored

    async def close(self) -> None:
        """Finish what is at work, drop the rest, and tell those who wait for it."""
        self._closing = True
        tasks = [queue.task for queue in self._queues.values() if queue.task is not None]
        for queue in self._queues.values():
            if queue.task is not None and not (queue.current and queue.current.at_work):
                queue.task.cancel()
        for operation in self._pending.values():
            if not operation.at_work:
                _abandon(operation)
        await asyncio.gather(*tasks, return_exceptions=True)
        for operation in self._pending.values():
            _abandon(operation)

    async def _work_off(self, run_id: str, queue: _Queue) -> None:
        while queue.waiting and not self._closing:
            operation = queue.current = queue.waiting.popleft()
            answer = await _outcome(operation)
            await self._store.finish(run_id, operation.id, answer)
            self._finished[run_id, operation.id] = time.time()
            del self._pending[run_id, operation.id]
            operation.answer.set_result(answer)
        del self._queues[run_id]

    def _purge_sometimes(self) -> None:
        now = time.time()
        if now - self._purged > min(_PURGE_SECONDS, self._retention_seconds):
            self._purge(now)

    def _purge(self, now: float) -> None:
        self._purged = now
        before = now - self._retention_seconds
        old = [key for key, finished in self._finished.items() if finished < before]
        for key in old:
            del self._finished[key]
        if old:
            self._store.forget_finished(before)


async def _outcome(operation: _Operation) -> bytes:
    """Do an operation; return what a poll answers."""
    started = time.perf_counter()
    try:
        await operation.prepare()
        operation.at_work = True
        answer = msgspec.json.encode({"status": "done", "result": await operation.work()})
    except (RefusedError, HttpError) as refused:
        operation.log.write("WARNING", f"{operation.name} refused: {refused}", request_id=operation.id)
        # The wire's examples name Python's own class for a bad argument.
        return failed(str(refused), "ValueError")
    except Exception as error:
        logger.exception("operation %s (%s) failed", operation.id, operation.name)
        operation.log.write("ERROR", f"{operation.name} failed: {error!r}", request_id=operation.id)
        return failed(str(error) or repr(error), type(error).__name__)
    took = time.perf_counter() - started
    operation.log.write("INFO", f"{operation.name} done in {took:.3f} s", request_id=operation.id)
    return answer


def failed(message: str, error_class: str) -> bytes:
    """Encode the answer of an operation that failed."""
    return msgspec.json.encode({"status": "error", "error": message, "error_class": error_class})


def _abandon(operation: _Operation) -> None:
    if not operation.answer.done():
        operation.answer.set_exception(shutting_down())
        operation.answer.exception()  # marks it as seen when nobody polls


def shutting_down() -> HttpError:
    """Make the refusal of a service that ends."""
    message = "the service is shutting down"
    return HttpError(503, "SHUTTING_DOWN", message, error=message)
