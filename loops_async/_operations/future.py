"""Futures of submitted operations, whose results can be waited for any number of times."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar

from .._copies import SameWhenCopied
from .._other_names import KnowsOtherNames
from .._tasks import TaskOwner, check_loop
from .._waiting import TimeLimit
from ..errors import ClosedError, LoopsError, OperationError, OperationTimeoutError, UnsupportedError, without_quote

T = TypeVar("T")

log = logging.getLogger("loops_async.operations")


class OperationFuture(SameWhenCopied, KnowsOtherNames, Generic[T]):
    """The result of an operation that the service has accepted.

    Any number of callers may wait. A caller that stops waiting (timeout, cancellation, Ctrl-C) affects neither the
    others nor the operation. What the trainer says of the operation, a result or an error, is kept. Any other failure
    (no connection, a page of a gateway, a refused key) says nothing of it, so waiting again asks the service again.

    Example:
        ::

            step = await trainer.forward_backward(data)
            optim = await trainer.optim_step(loops.AdamParams())
            loss = (await step).loss
            await optim.result(timeout=60)
    """

    def __init__(
        self,
        collect: Callable[[], Awaitable[T]],
        *,
        tasks: TaskOwner,
        operation: str,
        operation_id: str,
        run_id: str | None,
    ) -> None:
        self._collect = collect
        self._tasks = tasks
        self._operation = operation
        self._operation_id = operation_id
        self._run_id = run_id
        self._is_failure_seen = False
        self._task = self._start_collecting()

    @property
    def operation_id(self) -> str:
        """The service's id of the operation (of its first part, if it was split)."""
        return self._operation_id

    def done(self) -> bool:
        """Whether the result or error is known without a request; makes no request."""
        return self._task.done() and not self._is_unknown()

    async def result(self, timeout: float | None = None) -> T:
        """Wait for the result.

        Args:
            timeout: the longest time to wait, in seconds; None for no limit.

        Raises:
            OperationTimeoutError: this wait timed out; the operation continues and can be waited for again.
            RemoteOpError: the service executed the operation, and it failed.
            UnknownRequestError: the service does not know the operation, or no longer does.
            ServerShutdownError: the trainer is shutting down; waiting again asks it again.
            TransportError: the service could not be reached for two minutes; waiting again asks it again.
            ApiError: the service refused to answer; waiting again asks it again.
            ClosedError: the client was closed before the operation was done.
        """
        if not self.done():
            check_loop(self._task.get_loop())
            if self._task.done():
                self._task = self._start_collecting()
            with TimeLimit(timeout):
                await asyncio.wait([self._task])
        if not self._task.done():
            raise OperationTimeoutError(
                f"no result within {timeout} s; the operation continues and can be waited for again",
                operation_id=self._operation_id,
                operation=self._operation,
                run_id=self._run_id,
            )
        if self._task.cancelled():
            raise ClosedError(f"the client was closed before {self._operation} {self._operation_id} was done")
        error = self._task.exception()
        if error is not None:
            self._is_failure_seen = True
            raise error.with_traceback(None)
        return self._task.result()

    async def settled(self) -> T | None:
        """Wait until the operation is done; return its result, or None if `result` would raise an error."""
        await asyncio.wait([self._task])
        return None if self._task.cancelled() or self._task.exception() else self._task.result()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result().__await__()

    def __repr__(self) -> str:
        state = "done" if self.done() else "pending"
        return f"<OperationFuture {self._operation} {self._operation_id} {state}>"

    def _start_collecting(self) -> asyncio.Task[T]:
        collect = self._collect  # not `self`, which the traceback of a failure would keep

        async def collected() -> T:
            return await collect()

        task = self._tasks.start(collected(), name=f"{self._operation} {self._operation_id}")
        task.add_done_callback(self._collected)
        return task

    def _is_unknown(self) -> bool:
        """Whether the wait failed without news of the operation."""
        error = None if self._task.cancelled() else self._task.exception()
        return isinstance(error, LoopsError) and not isinstance(error, OperationError | ClosedError | UnsupportedError)

    def _collected(self, task: asyncio.Task[T]) -> None:
        # A bound method: as a callback it keeps this future until there is an outcome to see.
        if not task.cancelled():
            task.exception()

    def __del__(self) -> None:
        """Log a failure that no caller has seen, once none can see it."""
        if self._is_failure_seen or not self._task.done() or self._task.cancelled():
            return
        if (error := self._task.exception()) is not None:
            log.warning("%s failed, and its result was never waited for: %s", self._operation, without_quote(error))


OperationFuture.__module__ = "loops_async"  # where users find it
