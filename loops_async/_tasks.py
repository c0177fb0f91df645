"""Background tasks and their owner."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import anyio

from .errors import ClosedError, LoopsError

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


async def to_the_end(coroutine: Coroutine[Any, Any, T]) -> T:
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


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all of them and return their results in order; the first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except* LoopsError as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
