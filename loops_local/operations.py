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
from .tasks import Tasks
from .web import HttpError

__all__ = ["Operations"]

logger = logging.getLogger(__name__)

Work = Callable[[], Awaitable[Any]]
_PURGE_SECONDS = 60.0


class _Operation(Struct, eq=False):
    id: str
    name: str
    work: Work
    log: Log
    answer: asyncio.Future[bytes]


class Operations:
    """The queues of all runs.

    Each run has at most one operation at work, the oldest, so runs that share a training thread take turns. An
    answer is in the store before anybody hears it, and is kept for `retention_seconds`. Operations that a kill
    interrupts are unknown afterwards.
    """

    def __init__(self, store: Store, tasks: Tasks, *, retention_seconds: float) -> None:
        self._store = store
        self._tasks = tasks
        self._retention_seconds = retention_seconds
        self._waiting: dict[str, deque[_Operation]] = {}
        self._pending: dict[tuple[str, str], _Operation] = {}
        self._finished: dict[tuple[str, str], float] = {}
        self._purged = time.time()

    async def open(self) -> None:
        """Learn which operations finished before the service was started."""
        self._finished = await self._store.finished()
        self._purge(time.time())

    def submit(self, run_id: str, operation_id: str, name: str, work: Work, log: Log) -> None:
        """Queue `work` behind the run's other operations, unless an operation of this id is known already."""
        self._purge_sometimes()
        key = run_id, operation_id
        if key in self._pending or key in self._finished:
            return
        operation = _Operation(operation_id, name, work, log, asyncio.get_running_loop().create_future())
        self._pending[key] = operation
        waiting = self._waiting.get(run_id)
        if waiting is None:
            waiting = self._waiting[run_id] = deque()
            self._tasks.start(self._work_off(run_id, waiting), name=f"run {run_id}")
        waiting.append(operation)

    async def answer(self, run_id: str, operation_id: str, *, hold_seconds: float) -> bytes | None:
        """Wait for an operation; return its encoded answer, or None when it is still under way.

        Raises:
            KeyError: no such operation, or it finished too long ago.
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

    def abandon(self) -> None:
        """Tell everybody who polls that the service shuts down."""
        for operation in self._pending.values():
            if not operation.answer.done():
                operation.answer.set_exception(_shutdown())
                operation.answer.exception()  # marks it as seen when nobody polls

    async def _work_off(self, run_id: str, waiting: deque[_Operation]) -> None:
        while waiting:
            operation = waiting.popleft()
            answer = await _outcome(operation)
            await self._store.finish(run_id, operation.id, answer)
            self._finished[run_id, operation.id] = time.time()
            del self._pending[run_id, operation.id]
            if not operation.answer.done():
                operation.answer.set_result(answer)
        del self._waiting[run_id]

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
    """Do the work of an operation; return what a poll answers."""
    started = time.perf_counter()
    try:
        answer = msgspec.json.encode({"status": "done", "result": await operation.work()})
    except (RefusedError, HttpError) as refused:
        operation.log.write("WARNING", f"{operation.name} refused: {refused}", request_id=operation.id)
        # The wire's examples name Python's own class for a bad argument.
        return _failed(str(refused), "ValueError")
    except Exception as error:
        logger.exception("operation %s (%s) failed", operation.id, operation.name)
        operation.log.write("ERROR", f"{operation.name} failed: {error!r}", request_id=operation.id)
        return _failed(str(error) or repr(error), type(error).__name__)
    took = time.perf_counter() - started
    operation.log.write("INFO", f"{operation.name} done in {took:.3f} s", request_id=operation.id)
    return answer


def _failed(message: str, error_class: str) -> bytes:
    return msgspec.json.encode({"status": "error", "error": message, "error_class": error_class})


def _shutdown() -> HttpError:
    message = "the service is shutting down"
    return HttpError(503, "SHUTTING_DOWN", message, error=message)
