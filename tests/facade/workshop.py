"""A core object with everything that a bridge can meet, and its blocking form, written by hand."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, asynccontextmanager
from itertools import islice
from typing import Any, Generic, Self, TypeVar

import loops_async
from loops_async._tasks import TaskOwner, run_to_completion
from loops_sync import OperationFuture
from loops_sync._bridge import Items
from loops_sync._handle import Entered, Handle, Opened
from tests.support.patience import PATIENCE_SECONDS

T = TypeVar("T")


def interrupt() -> None:
    """Send Ctrl-C to the main thread, whichever thread calls."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def eventually(condition: Callable[[], object]) -> bool:
    """Whether something happens in time that nobody waits for."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


class Tool:
    """A light value, as a sampling client is one."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def use(self) -> str:
        return self._name

    async def nap(self) -> None:
        """Wait until cancelled."""
        await asyncio.sleep(3600)

    async def jam(self) -> None:
        raise asyncio.CancelledError

    def __repr__(self) -> str:
        return f"<Tool {self._name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tool, (self._name,)


class Belt(Generic[T]):
    """Passes items to functions that work on them, each in a task of its own, as a stream of rollouts does it."""

    def __init__(self, work: Callable[[Tool, int], Awaitable[T]], items: Iterable[int], at_once: int) -> None:
        self._work = work
        self._items = iter(items)
        self._at_once = at_once
        self._tasks: set[asyncio.Task[T]] = set()
        self._done: asyncio.Queue[asyncio.Task[T]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._entered_in = asyncio.current_task()
        for number in islice(self._items, self._at_once):
            self._begin(number)
        return self

    async def __aexit__(self, *details: object) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await run_to_completion(asyncio.wait(tasks)) if tasks else None
        print("belt: left", "in one task" if self._entered_in is asyncio.current_task() else "IN ANOTHER TASK")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if not self._tasks and self._done.empty():
            raise StopAsyncIteration
        done = await self._done.get()
        for number in islice(self._items, 1):
            self._begin(number)
        try:
            return done.result()
        finally:
            del done  # its error refers to this frame

    def _begin(self, number: int) -> None:
        task = asyncio.ensure_future(self._work(Tool(f"tool {number}"), number))
        task.set_name(f"loops_async: item {number}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._done.put_nowait)


class Workshop:
    def __init__(self, name: str = "workshop", *, is_interrupted: bool = False) -> None:
        self._name = name
        self._is_interrupted = is_interrupted
        self._tasks = TaskOwner()
        self.tool = Tool("own")

    async def __aenter__(self) -> Workshop:
        try:
            if self._is_interrupted:
                interrupt()
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            print(f"{self._name}: not opened")
            raise
        print(f"{self._name}: open")
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._tasks.close()
        print(f"{self._name}: closed")

    async def add(self, number: int) -> int:
        return number + 2

    async def process_id(self) -> int:
        return os.getpid()

    async def fail(self, error: BaseException) -> None:
        raise error

    async def fail_behind(self, error: BaseException) -> None:
        await asyncio.wait([self._tasks.start(self.fail(error), name="failing")])

    async def nap_interrupted(self, cleanup_seconds: float = 0.0, *, is_interrupted_twice: bool = False) -> None:
        try:
            interrupt()
            await asyncio.sleep(60)
        finally:
            if is_interrupted_twice:
                interrupt()
            await asyncio.sleep(cleanup_seconds)
            print("nap: cleaned up")

    async def start(self, text: str, until: Callable[[], bool] = lambda: True) -> loops_async.OperationFuture[str]:
        async def work() -> str:
            while not until():  # noqa: ASYNC110 - it is for a thread to say
                await asyncio.sleep(0.01)
            return text

        return loops_async.OperationFuture(work, tasks=self._tasks, operation="work", operation_id=text, run_id=None)

    async def steps(self, count: int, *, fail_at: int | None = None) -> AsyncIterator[int]:
        """Count, in a cancel scope as rollouts do it."""
        task = asyncio.current_task()
        try:
            async with asyncio.timeout(60):
                for number in range(count):
                    if number == fail_at:
                        raise ValueError(f"step {number}")
                    await asyncio.sleep(0)
                    yield number
        finally:
            print("steps: cleaned up", "in one task" if task is asyncio.current_task() else "IN ANOTHER TASK")

    @asynccontextmanager
    async def borrow(self, *, forgives: bool = False, is_interrupted: bool = False) -> AsyncGenerator[str]:
        task = asyncio.current_task()
        try:
            async with asyncio.timeout(60):
                if is_interrupted:
                    interrupt()
                    await asyncio.sleep(60)
                yield "saw"
        except ValueError:
            if not forgives:
                raise
        finally:
            print("borrow: given back", "in one task" if task is asyncio.current_task() else "IN ANOTHER TASK")

    def belt(self, work: Callable[[Tool, int], Awaitable[T]], items: Iterable[int], *, at_once: int = 3) -> Belt[T]:
        return Belt(work, items, at_once)

    async def count(
        self,
        to: int,
        on_progress: Callable[[int], object] | None = None,
        *,
        pause: float = 0.0,
        is_interrupted: bool = False,
    ) -> int:
        """Report each number; like provisioning, report the end also when that is a failure."""
        try:
            if is_interrupted:
                interrupt()
            for number in range(to):
                if on_progress:
                    on_progress(number)
                await asyncio.sleep(pause)
        except BaseException as failure:
            failure.add_note("something was left behind")
            if on_progress:
                on_progress(-1)
            raise
        return to


class BlockingTool(Handle[Tool]):
    def use(self) -> str:
        return self._bridge.run(self._impl.use)

    def nap(self) -> None:
        self._bridge.run(self._impl.nap)

    def jam(self) -> None:
        self._bridge.run(self._impl.jam)


class BlockingBelt(Entered[Belt[T]], Generic[T]):
    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        return self._bridge.advance(self._impl.__anext__)


class BlockingWorkshop(Opened[Workshop]):
    def __init__(self, name: str = "workshop", *, is_interrupted: bool = False) -> None:
        self._open(Workshop, name, is_interrupted=is_interrupted)

    @classmethod
    def elsewhere(cls, name: str) -> BlockingWorkshop:
        return cls._opened(Workshop, name)

    @property
    def tool(self) -> BlockingTool:
        return self._part(BlockingTool, self._impl.tool)

    def make_tool(self, name: str) -> BlockingTool:
        return BlockingTool._of(self._bridge.call(Tool, name), self)

    def add(self, number: int) -> int:
        return self._bridge.run(self._impl.add, number)

    def process_id(self) -> int:
        return self._bridge.run(self._impl.process_id)

    def fail(self, error: BaseException) -> None:
        self._bridge.run(self._impl.fail, error)

    def fail_behind(self, error: BaseException) -> None:
        self._bridge.run(self._impl.fail_behind, error)

    def nap_interrupted(self, cleanup_seconds: float = 0.0, *, is_interrupted_twice: bool = False) -> None:
        self._bridge.run(self._impl.nap_interrupted, cleanup_seconds, is_interrupted_twice=is_interrupted_twice)

    def start(self, text: str, until: Callable[[], bool] = lambda: True) -> OperationFuture[str]:
        return OperationFuture[str]._of(self._bridge.run(self._impl.start, text, until), self)

    def steps(self, count: int, *, fail_at: int | None = None) -> Items[int]:
        return self._bridge.iterate(self._impl.steps, count, fail_at=fail_at)

    def borrow(self, *, forgives: bool = False, is_interrupted: bool = False) -> AbstractContextManager[str]:
        return self._bridge.hold(self._impl.borrow, forgives=forgives, is_interrupted=is_interrupted)

    def count(
        self,
        to: int,
        on_progress: Callable[[int], object] | None = None,
        *,
        pause: float = 0.0,
        is_interrupted: bool = False,
    ) -> int:
        relay = self._bridge.relay(on_progress)
        return relay.run(self._impl.count, to, on_progress=relay.post, pause=pause, is_interrupted=is_interrupted)

    def belt(
        self, work: Callable[[BlockingTool, int], T], items: Iterable[int], *, at_once: int = 3
    ) -> BlockingBelt[T]:
        return BlockingBelt._of(
            self._bridge.call(
                self._impl.belt, work=self._in_threads(BlockingTool, "work", work), items=items, at_once=at_once
            ),
            self,
        )


class Stuck:
    """Work that waits in a call of the client until it is cancelled, and then uses the client once more."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.seen: list[str] = []

    def __call__(self, tool: BlockingTool, number: int) -> None:
        try:
            self.has_begun.set()
            tool.nap()
        except asyncio.CancelledError:
            self.seen.append(f"cancelled {number}")
            raise
        finally:
            self.seen.append(tool.use())
