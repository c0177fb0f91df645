"""An event loop whose clock jumps to the next timer, so that a simulation of hours takes seconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

THREAD_SECONDS: Final = 10.0
"""How long, in real time, a loop without timers waits for a thread before it reports that nothing can happen."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs callbacks as asyncio does; when there is nothing to run, `time` jumps to the next timer.

    It does not wait for threads while there is a timer, so what a simulation measures must not happen in threads.
    `time.monotonic` is not affected.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        """Move the clock forward."""
        self._now += seconds

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads in real time: a limit would be a timer, to which the clock jumps at once."""
        await super().shutdown_default_executor()


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(THREAD_SECONDS if timeout is None else 0)
        if timeout is None and not ready:
            raise RuntimeError("the simulation is stuck: every task waits, and there is no timer")
        if not ready and timeout is not None:
            self._loop.jump(timeout)
        return ready


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time, which begins at 0, and return its result."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
