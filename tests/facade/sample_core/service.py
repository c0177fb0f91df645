"""The entry point."""

from __future__ import annotations

import asyncio
from typing import Self

from loops_async._tasks import TaskOwner

from ._signals import interrupt
from .workers import Worker

__all__ = ["Service"]


class Service:
    """Makes workers.

    Example:
        ::

            import loops_async as loops

            async with loops.Service("works") as service:
                worker = await service.hire("anna")
    """

    def __init__(self, name: str = "service", *, is_interrupted: bool = False) -> None:
        """Prepare a service; with `is_interrupted` the main thread is, while it opens."""
        self._name = name
        self._is_interrupted = is_interrupted
        self._tasks: TaskOwner | None = None

    @classmethod
    def local(cls, *, name: str = "local") -> Self:
        """Make one without a network."""
        return cls(name)

    @classmethod
    async def count(cls) -> int:
        """Return how many services there are."""
        return 1

    async def open(self) -> Self:
        """Open it."""
        try:
            if self._is_interrupted:
                interrupt()
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            print(f"{self._name}: not opened")
            raise
        self._tasks = TaskOwner()
        print(f"{self._name}: open")
        return self

    async def close(self) -> None:
        """Close it; closing twice does nothing."""
        if self._tasks is not None:
            await self._tasks.close()
            self._tasks = None
            print(f"{self._name}: closed")

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *details: object) -> None:
        await self.close()

    @property
    def is_open(self) -> bool:
        """Whether it is open."""
        return self._tasks is not None

    async def hire(self, name: str) -> Worker:
        """Hire a worker."""
        assert self._tasks is not None
        return Worker(name, self._tasks)
