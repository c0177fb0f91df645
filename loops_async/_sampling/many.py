"""Sampling any number of prompts in constant memory, on one event loop or in several processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any, Final, Generic, TypeAlias, TypeVar

from .._executors.processes import LocalProcess, Processes
from .._executors.waiting import close_all
from ..errors import BudgetExceededError, LoopsError, WorkerDiedError

T = TypeVar("T")
R = TypeVar("R")

Source: TypeAlias = Iterable[T] | AsyncIterable[T]

CHUNKS_PER_PROCESS: Final = 2
"""Chunks in flight per process; together they have its part of the limit. With one, a slow sample would stop it."""


class BoundedMap(Generic[T, R]):
    """Calls `work` on each item of a source, and reads no further ahead than `most` allows.

    Invariant: no item is started while `most()` were started whose results are not yet yielded.
    """

    def __init__(
        self, source: Source[T], work: Callable[[T], Awaitable[R]], *, most: Callable[[], int], ordered: bool
    ) -> None:
        self._source = source
        self._work = work
        self._ordered = ordered
        self._most = most
        self._unyielded = 0
        self._yielded = asyncio.Event()
        self._in_flight: dict[asyncio.Future[R], int] = {}
        self._completed: asyncio.Queue[asyncio.Future[R] | None] = asyncio.Queue()
        self._results: dict[int, R] = {}
        self._next = 0

    async def results(self) -> AsyncGenerator[tuple[int, R]]:
        """Yield ``(index, result)``; the first error cancels the items in flight and is raised."""
        reader = asyncio.create_task(self._read(), name="loops_async: read prompts")
        reader.add_done_callback(lambda _: self._completed.put_nowait(None))
        try:
            while self._in_flight or not reader.done():
                completed = await self._completed.get()
                if completed is None:  # everything is read; items in flight continue
                    continue
                index = self._in_flight.pop(completed)
                self._results[index] = completed.result()
                for ready in self._ready(index):
                    yield ready, self._results.pop(ready)
                    self._unyielded -= 1
                    self._yielded.set()
            await reader
        finally:
            await _cancel([reader, *self._in_flight])

    def _ready(self, index: int) -> Iterator[int]:
        """Yield the indices whose results can be yielded, now that `index` has one."""
        if not self._ordered:
            yield index
            return
        while self._next in self._results:
            yield self._next
            self._next += 1

    async def _read(self) -> None:
        index = 0
        async for item in each(self._source):
            work = asyncio.ensure_future(self._work(item))
            self._in_flight[work] = index
            work.add_done_callback(self._completed.put_nowait)
            index += 1
            self._unyielded += 1
            while self._unyielded >= self._most():
                self._yielded.clear()
                await self._yielded.wait()


async def _cancel(tasks: list[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def each(source: Source[T]) -> AsyncGenerator[T]:
    """Yield the items of any iterable."""
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item


async def map_in_processes(
    source: Source[T],
    work: Callable[[list[T]], Awaitable[list[R]]],
    *,
    watch: Callable[[list[T]], AbstractContextManager[Callable[[list[R]], object]]],
    lost: Callable[[list[T], LoopsError], list[R]],
    processes: int,
    limit: int,
    ordered: bool,
) -> AsyncGenerator[tuple[int, R]]:
    """Yield ``(index, result)`` of a coroutine function that worker processes call with chunks of the source.

    `watch` is entered for the time of each chunk; it may refuse the chunk with a `BudgetExceededError`, and its value
    gets the results. `lost` gives the results of a chunk that was refused, or whose process ended, or raises.
    """
    size = max(1, limit // (processes * CHUNKS_PER_PROCESS))
    workers = Processes(processes, CHUNKS_PER_PROCESS, partial(LocalProcess, are_rollouts=True))

    async def submit(chunk: list[T]) -> list[R]:
        try:
            with watch(chunk) as count:
                results: list[R] = await asyncio.wrap_future(workers.start(work, (chunk,)))
                count(results)
        except (WorkerDiedError, BudgetExceededError) as error:
            return lost(chunk, error)
        return results

    chunks = BoundedMap(_chunks(source, size), submit, most=lambda: processes * CHUNKS_PER_PROCESS, ordered=ordered)
    try:
        async with aclosing(chunks.results()) as finished:
            async for number, results in finished:
                for offset, result in enumerate(results):
                    yield number * size + offset, result
    finally:
        await close_all(workers)


async def _chunks(source: Source[T], size: int) -> AsyncIterator[list[T]]:
    chunk: list[T] = []
    async for item in each(source):
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
