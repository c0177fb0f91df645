"""Background tasks, their owner, and values that are created once for many callers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Hashable, Sequence
from typing import Any, Generic, TypeVar

import anyio

from .errors import ClosedError, LoopsError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

log = logging.getLogger("loops_async")


def check_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Raise `ClosedError` outside `loop`, since waiting for it from another loop would never end."""
    if asyncio.get_running_loop() is not loop:
        raise ClosedError(
            "this client belongs to another event loop: create one ServiceClient in each loop, "
            "or use loops_sync, which can be called from any thread"
        )


def is_being_cancelled() -> bool:
    """Whether the current task was cancelled; otherwise a `CancelledError` in it is the mistake of what it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def cancel_and_wait(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until all have ended."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


class TaskOwner:
    """Owns background tasks: when `close` returns, all of them have ended."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run `coroutine` until it ends or the owner closes."""
        task = asyncio.create_task(coroutine, name=f"loops_async: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def start_unattended(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `coroutine`, whose end no caller waits for, until the owner closes; its failure is logged."""
        task = self.start(coroutine, name=name)
        task.add_done_callback(_log_failure)
        return task

    async def run(
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        name: str,
        discard: Callable[[T], Coroutine[Any, Any, object]] | None = None,
    ) -> T:
        """Run `coroutine` and return its result; `close` cancels it and waits for its cleanup.

        A caller that is cancelled also cancels it and waits for its cleanup; if it has succeeded in that very moment,
        `discard` gets the result, which no caller receives.

        Raises:
            ClosedError: the owner was closed before `coroutine` ended.
        """
        task = self.start(coroutine, name=name)
        try:
            # Shielded, since an anyio cancel scope cancels repeatedly, and would also cancel the cleanup.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ClosedError(f"the client was closed before this was done: {name}") from None
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
                if discard is not None and not _has_failed(task):
                    await discard(task.result())
            raise

    async def close(self) -> None:
        """Cancel every task and wait until all have ended."""
        while tasks := list(self._tasks):
            await cancel_and_wait(tasks)


def _log_failure(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        log.error("the background task %s failed", task.get_name(), exc_info=error)


def take_exception(future: asyncio.Future[Any]) -> None:
    """Keep asyncio from logging a failure whose waiters have all been cancelled."""
    if not future.cancelled():
        future.exception()


class SingleFlight(Generic[K, T]):
    """A cache that creates each value once, however many callers request it at the same time.

    A task of the owner creates the value, so a cancelled caller does not affect the others. A value is kept until it is
    discarded; a failure is raised to all callers that wait for it and is not kept, so the next call tries again.
    """

    def __init__(self, owner: TaskOwner) -> None:
        self._owner = owner
        self._tasks: dict[K, asyncio.Task[T]] = {}

    def start(self, key: K, make: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Return the task that creates the value of `key`; start `make` if there is none or it has failed."""
        task = self._tasks.get(key)
        if task is None or _has_failed(task):
            task = self._tasks[key] = self._owner.start(make(), name=f"make {key}")
            task.add_done_callback(take_exception)
        return task

    async def get(self, key: K, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the value of `key`, created by `make` unless it exists or is being created.

        Raises:
            ClosedError: the owner was closed before the value was created.
        """
        task = self.start(key, make)
        await asyncio.wait([task])
        if task.cancelled():
            raise ClosedError(f"the client was closed while it waited for {key}")
        if error := task.exception():
            raise error.with_traceback(None)
        return task.result()

    def peek(self, key: K) -> T | None:
        """Return the value of `key` if it exists, else None."""
        task = self._tasks.get(key)
        return None if task is None or not task.done() or _has_failed(task) else task.result()

    def discard(self, key: K) -> None:
        """Remove the value of `key`; the next call creates it again."""
        self._tasks.pop(key, None)


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def run_to_completion(coroutine: Coroutine[Any, Any, T], *, on_cancel: Callable[[], object] | None = None) -> T:
    """Run a cleanup to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards.

    `on_cancel` is called each time that the caller is cancelled.
    """
    task = asyncio.create_task(coroutine)
    cancellation: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # protects against cancel scopes, which cancel repeatedly
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as cancelled:  # by `Task.cancel`, which ignores shields
                cancellation = cancelled
                if on_cancel is not None:
                    on_cancel()
    if cancellation is not None:
        raise cancellation
    return task.result()


async def gather_or_raise(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all coroutines and return their results in order; the first failure cancels the others and is raised."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except* LoopsError as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
