"""Operations under way: submitted once, waited for any number of times."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar

from .._tasks import TaskOwner, check_loop
from ..errors import ClosedError, LoopsError, OperationTimeoutError, TransportError

T = TypeVar("T")

log = logging.getLogger("loops_async")


class OperationFuture(Generic[T]):
    """The result of an operation that the service has accepted.

    Any number of callers may wait. One that gives up (time-out, cancellation, Ctrl-C) harms neither the others nor the
    operation. An outcome, good or bad, is kept; a failure to reach the service is not an outcome, so waiting again
    asks again.

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
        self._waiters = 0
        self._task = self._follow()

    @property
    def operation_id(self) -> str:
        """The service's id of the operation (of its first part, where it was split)."""
        return self._operation_id

    def done(self) -> bool:
        """Whether the outcome is known here; makes no request."""
        return self._task.done() and not self._is_unknown()

    async def result(self, timeout: float | None = None) -> T:
        """Wait for the result.

        Args:
            timeout: seconds to wait at most; None waits as long as it takes.

        Raises:
            OperationTimeoutError: this wait is over; the operation goes on, and can be waited for again.
            RemoteOpError: the service ran the operation and it failed.
            UnknownRequestError: the service does not know the operation, or has forgotten it.
            ServerShutdownError: the trainer is going away.
            TransportError: the service could not be reached for two minutes; waiting again asks again.
            ClosedError: the client was closed before the outcome was known.
        """
        if not self.done():
            check_loop(self._task.get_loop())
            if self._task.done():
                self._task = self._follow()
            self._waiters += 1
            try:
                await asyncio.wait([self._task], timeout=timeout)
            finally:
                self._waiters -= 1
        if not self._task.done():
            raise OperationTimeoutError(
                f"no result within {timeout} s; the operation goes on and can be waited for again",
                operation_id=self._operation_id,
                operation=self._operation,
                run_id=self._run_id,
            )
        if self._task.cancelled():
            raise ClosedError(f"the client was closed before {self._operation} {self._operation_id} was done")
        error = self._task.exception()
        if error is not None:
            raise error.with_traceback(None)
        return self._task.result()

    async def settled(self) -> T | None:
        """Wait until there is an outcome, and return it, or None for a failure, which `result` raises."""
        await asyncio.wait([self._task])
        return None if self._task.cancelled() or self._task.exception() else self._task.result()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result().__await__()

    def __repr__(self) -> str:
        state = "done" if self.done() else "under way"
        return f"<OperationFuture {self._operation} {self._operation_id} {state}>"

    def _follow(self) -> asyncio.Task[T]:
        async def outcome() -> T:
            return await self._collect()

        task = self._tasks.start(outcome(), name=f"{self._operation} {self._operation_id}")
        task.add_done_callback(self._note)
        return task

    def _is_unknown(self) -> bool:
        return not self._task.cancelled() and isinstance(self._task.exception(), TransportError)

    def _note(self, task: asyncio.Task[T]) -> None:
        """Say that an operation failed when nobody is waiting to hear it."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, LoopsError) and not self._waiters:
            log.warning("%s failed, and nobody waits for it: %s", self._operation, error)
