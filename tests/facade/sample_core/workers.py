"""What a service makes.

Prose with await in it stays as it is.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

from loops_async import OperationFuture
from loops_async._facade import blocking_property
from loops_async._tasks import TaskOwner

from ._signals import interrupt
from .values import Level, Report

__all__ = ["Job", "Tool", "Worker", "greet"]

Job: TypeAlias = OperationFuture[Report]

DEFAULT_NAME = "nobody"

trace: ContextVar[str] = ContextVar("trace", default="none")


async def greet(name: str = DEFAULT_NAME, *others: str, **more: int) -> str:
    """Greet everybody."""
    return " ".join([name, *others, *map(str, more.values())])


class Tool:
    """A tool, which may be handed to other workers.

    Example:
        ::

            tool = await worker.make_tool("hammer")
    """

    def __init__(self, name: str) -> None:
        self._name = name

    async def use(self) -> str:
        """Use it."""
        return self._name

    def __repr__(self) -> str:
        return f"<Tool {self._name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tool, (self._name,)


class Worker:
    """Does things.

    Example:
        ::

            async with worker:
                job = await worker.start(
                    "dig",  # a hole
                )
                print(worker.name, (await job).text)
                await job
                skill = await worker.skill()
                report = await (await worker.start("dig")).result(timeout=5)
                text = (await (await worker.start("dig"))).text
                async for step in worker.steps(3):
                    print(step)
    """

    def __init__(self, name: str, tasks: TaskOwner) -> None:
        self._name = name
        self._tasks = tasks
        self._thread = threading.get_ident()

    @property
    def name(self) -> str:
        """The name."""
        return self._name

    @property
    def favourite(self) -> Tool:
        """The tool that is always at hand."""
        return Tool(f"{self._name}'s own")

    @blocking_property
    async def skill(self) -> int:
        """Ask for the skill."""
        return 7

    def is_on_its_thread(self) -> bool:
        """Whether it is called where it was made."""
        return threading.get_ident() == self._thread

    async def add(self, left: int, /, right: int = 2, *, level: Level = "low") -> int:
        """Add.

        Args:
            left: one.
            right: another.
            level: does nothing.
        """
        return left + right

    async def nap_interrupted(self, cleanup_seconds: float = 0.0) -> None:
        """Sleep while the main thread is interrupted."""
        try:
            interrupt()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(cleanup_seconds)
            print("nap: cleaned up")

    async def fail(self, error: BaseException) -> None:
        """Raise `error`."""
        raise error

    async def fail_behind(self, error: BaseException) -> None:
        """Let a background task raise `error`."""

        async def failing() -> None:
            raise error

        await asyncio.wait([self._tasks.start(failing(), name="failing")])

    async def traced(self) -> str:
        """Return what a context variable is here."""
        return trace.get()

    async def process_id(self) -> int:
        """Return where this runs."""
        return os.getpid()

    async def start(self, text: str, until: Callable[[], bool] | None = None) -> Job:
        """Start a job that lasts until `until` is true; its report is waited for separately."""

        async def work() -> Report:
            while until and not until():  # noqa: ASYNC110 - it is for a thread to say
                await asyncio.sleep(0.01)
            return Report(text)

        return OperationFuture(work, tasks=self._tasks, operation="work", operation_id=text, run_id=None)

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
    async def borrow(self, name: str, *, forgives: bool = False, is_interrupted: bool = False) -> AsyncGenerator[Tool]:
        """Borrow a tool."""
        task = asyncio.current_task()
        try:
            async with asyncio.timeout(60):
                if is_interrupted:
                    interrupt()
                    await asyncio.sleep(60)
                yield Tool(name)
        except ValueError:
            if not forgives:
                raise
        finally:
            print("borrow: given back", "in one task" if task is asyncio.current_task() else "IN ANOTHER TASK")

    async def make_tool(self, name: str) -> Tool:
        """Make a tool."""
        return Tool(name)

    async def find_tool(self, name: str | None = None) -> Tool | None:
        """Find a tool, if there is one."""
        return Tool(name) if name else None

    async def all_tools(self) -> list[Tool]:
        """Find all tools."""
        return [Tool("hammer"), Tool("saw")]

    async def join(self, tool: Tool, others: list[Tool], spare: Tool | None = None) -> list[str]:
        """Return the names of tools that came back from here."""
        return [await each.use() for each in [tool, *others, *([spare] if spare else [])]]

    async def told(self, on_progress: Callable[[int], Awaitable[str]] | None = None) -> str | None:
        """Call an awaitable callback."""
        return await on_progress(1) if on_progress else None

    async def tell(self, on_progress: Callable[[int], None]) -> None:
        """Call a plain callback."""
        on_progress(1)

    async def collect(self, items: Iterable[int] | AsyncIterable[int]) -> list[int]:
        """Collect what an iterable has."""
        if isinstance(items, AsyncIterable):
            return [item async for item in items]
        return list(items)

    async def close(self) -> None:
        """Go home."""
        print(f"{self._name}: closed")

    async def __aenter__(self) -> Worker:
        return self

    async def __aexit__(self, *details: object) -> None:
        await self.close()
