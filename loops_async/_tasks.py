"""Background tasks, their owner, and values that many callers make once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any, Generic, TypeVar

import anyio

from .errors import ClosedError, LoopsError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def check_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Raise `ClosedError` outside `loop`: to wait there for what happens in `loop` would never end."""
    if asyncio.get_running_loop() is not loop:
        raise ClosedError(
            "this client belongs to another event loop: make one ServiceClient in each loop, "
            "or use loops_sync, which may be called from any thread"
        )


class TaskOwner:
    """Owns background tasks: when `close` returns, none of them is left."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run `coroutine` until it ends or the owner closes."""
        task = asyncio.create_task(coroutine, name=f"loops_async: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def run(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> T:
        """Run `coroutine` in the caller's place, but end it when the owner closes, which waits for its clean-up.

        A caller that is cancelled waits for the clean-up, too.

        Raises:
            ClosedError: the owner was closed before it ended.
        """
        task = self.start(coroutine, name=name)
        try:
            # Shielded, since a cancel scope cancels again and again, and would cancel the clean-up.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ClosedError(f"the client was closed before it was done: {name}") from None
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
            raise

    async def close(self) -> None:
        """Cancel every task and wait until all have ended."""
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


class SingleFlight(Generic[K, T]):
    """Values that are made once each, however many callers ask for one at the same time.

    The owner's task makes the value, so a caller that is cancelled does not stop it for the others. A value is kept
    until it is discarded; a failure is raised to everyone who waits for it and then forgotten, so the next call tries
    again.
    """

    def __init__(self, owner: TaskOwner) -> None:
        self._owner = owner
        self._making: dict[K, asyncio.Task[T]] = {}

    def start(self, key: K, make: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Return the task that makes the value of `key`, starting `make` unless there is one that has not failed."""
        task = self._making.get(key)
        if task is None or _has_failed(task):
            task = self._making[key] = self._owner.start(make(), name=f"make {key}")
        return task

    async def get(self, key: K, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the value of `key`, made by `make` unless it was made before or is being made.

        Raises:
            ClosedError: the owner was closed before it was made.
        """
        task = self.start(key, make)
        await asyncio.wait([task])
        if task.cancelled():
            raise ClosedError(f"the client was closed while it waited for {key}")
        if error := task.exception():
            raise error.with_traceback(None)
        return task.result()

    def made(self, key: K) -> T | None:
        """Return the value of `key` if it was made."""
        task = self._making.get(key)
        return None if task is None or not task.done() or _has_failed(task) else task.result()

    def discard(self, key: K) -> None:
        """Forget the value of `key`; the next call makes it again."""
        self._making.pop(key, None)


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def run_to_completion(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a clean-up to its end though the caller is cancelled meanwhile, and only then let the cancellation on."""
    task = asyncio.create_task(coroutine)
    cancellation: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # holds against cancel scopes, which cancel again and again
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as cancelled:  # by `Task.cancel`, against which no shield holds
                cancellation = cancelled
    if cancellation is not None:
        raise cancellation
    return task.result()


async def gather_or_raise(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all of them and return their results in order; the first failure cancels the others and is raised."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except* LoopsError as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
