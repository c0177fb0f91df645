"""Sampling any number of prompts in constant memory, on one event loop or on several processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

from anyio import CancelScope, to_thread

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

T = TypeVar("T")
R = TypeVar("R")

Source: TypeAlias = Iterable[T] | AsyncIterable[T]

CHUNKS_PER_SHARE: Final = 2
"""Chunks into which a process's share of the limit is cut, so that one slow sample does not keep all others waiting."""

STOP_SECONDS: Final = 0.1
"""How soon a worker process notices that nobody wants its result."""


class BoundedMap(Generic[T, R]):
    """Calls `work` on each item of a source, at most `limit` at a time, and reads no further ahead than that.

    Invariant: each item that was read and whose result was not yet given out holds one of `limit` places.
    """

    def __init__(self, source: Source[T], work: Callable[[T], Awaitable[R]], *, limit: int, ordered: bool) -> None:
        self._source = source
        self._work = work
        self._ordered = ordered
        self._places = asyncio.Semaphore(limit)
        self._under_way: dict[asyncio.Future[R], int] = {}
        self._ended: asyncio.Queue[asyncio.Future[R] | None] = asyncio.Queue()
        self._results: dict[int, R] = {}
        self._next = 0

    async def results(self) -> AsyncGenerator[tuple[int, R]]:
        """Yield ``(index, result)``; the first error cancels what is under way and is raised."""
        reader = asyncio.create_task(self._read(), name="loops_async: read prompts")
        reader.add_done_callback(lambda _: self._ended.put_nowait(None))
        try:
            while self._under_way or not reader.done():
                ended = await self._ended.get()
                if ended is None:  # all is read; what is under way goes on
                    continue
                index = self._under_way.pop(ended)
                self._results[index] = ended.result()
                for due in self._due(index):
                    yield due, self._results.pop(due)
                    self._places.release()
            await reader
        finally:
            await _cancel([reader, *self._under_way])

    def _due(self, index: int) -> Iterator[int]:
        """Yield the indices whose results can be given out, now that `index` has one."""
        if not self._ordered:
            yield index
            return
        while self._next in self._results:
            yield self._next
            self._next += 1

    async def _read(self) -> None:
        index = 0
        async for item in each(self._source):
            await self._places.acquire()
            work = asyncio.ensure_future(self._work(item))
            self._under_way[work] = index
            work.add_done_callback(self._ended.put_nowait)
            index += 1


async def _cancel(tasks: list[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def each(source: Source[T]) -> AsyncIterator[T]:
    """Yield the items of any iterable."""
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item


async def in_processes(
    source: Source[T], work: Callable[[list[T]], list[R]], *, processes: int, limit: int, ordered: bool
) -> AsyncGenerator[tuple[int, R]]:
    """Yield ``(index, result)`` of a blocking `work` on chunks of the source, done by worker processes.

    `work` has to use `run_here`, which ends it soon after the caller has lost interest.
    """
    from concurrent.futures import ProcessPoolExecutor  # these cost 10 ms, and few need them
    from multiprocessing import get_context

    size = max(1, limit // (processes * CHUNKS_PER_SHARE))
    spawn = get_context("spawn")  # a fork of a process with threads may hang
    stop = spawn.Event()
    pool = ProcessPoolExecutor(processes, spawn, initializer=_begin, initargs=(stop,))

    async def outside(chunk: list[T]) -> list[R]:
        # The first submission starts the processes, which is nothing for the event loop to wait for.
        submitted = await to_thread.run_sync(lambda: pool.submit(work, chunk))
        return await asyncio.wrap_future(submitted)

    chunks = BoundedMap(_chunks(source, size), outside, limit=processes * CHUNKS_PER_SHARE, ordered=ordered)
    try:
        async with aclosing(chunks.results()) as finished:
            async for number, results in finished:
                for offset, result in enumerate(results):
                    yield number * size + offset, result
    finally:
        stop.set()
        with CancelScope(shield=True):
            await to_thread.run_sync(lambda: pool.shutdown(cancel_futures=True))


async def _chunks(source: Source[T], size: int) -> AsyncIterator[list[T]]:
    chunk: list[T] = []
    async for item in each(source):
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# --- in a worker process ---


class _Worker:
    """This process's one event loop, so that connections are kept from chunk to chunk, and the word to stop."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop
        self.runner = asyncio.Runner()

    async def unless_stopped(self, work: Awaitable[R]) -> R:
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait([task], timeout=STOP_SECONDS))[0]:
            if self.stop.is_set():
                task.cancel()
        return task.result()


_worker: _Worker | None = None


def _begin(stop: Event) -> None:
    global _worker
    _worker = _Worker(stop)


def run_here(work: Awaitable[R]) -> R:
    """Run a coroutine in a worker process until it is done, or nobody wants its result any more."""
    if _worker is None:
        raise RuntimeError("run_here is for the worker processes of in_processes")
    return _worker.runner.run(_worker.unless_stopped(work))
