"""Time that a test can let pass without waiting."""

from __future__ import annotations

import asyncio
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from loops_async import _waiting
from loops_async._http import retry
from loops_async._work import waits


class Clock:
    """Time in seconds since the test began; it passes in `asyncio.sleep` only, and there at once.

    Other threads, such as those of an embedded service or of `loops_sync` that several tests use, sleep as they always
    do.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self._yield = asyncio.sleep
        self._thread = threading.get_ident()

    async def sleep(self, seconds: float, result: object = None) -> object:
        if threading.get_ident() != self._thread:
            return await self._yield(seconds, result)
        if seconds > 0:
            self.pauses.append(seconds)
            self.now += seconds
        await self._yield(0)
        return result

    def monotonic(self) -> float:
        return self.now

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(asyncio, "sleep", self.sleep)
        # For budgets of retries only: the event loop has to know what time it is.
        patch.setattr(retry, "time", SimpleNamespace(monotonic=self.monotonic))


class LoopClock:
    """The time of an event loop: when nothing is left to do, it jumps to the next timer.

    Only for tests without sockets and threads, whose events take real time. A test that adds to `now` is a program
    that holds the event loop for so long.
    """

    def __init__(self) -> None:
        self.now = float(math.ceil(asyncio.get_running_loop().time()))  # whole seconds, whose sums are exact

    def install(self, patch: pytest.MonkeyPatch) -> None:
        loop: Any = asyncio.get_running_loop()
        select = loop._selector.select

        def skip(timeout: float | None) -> Any:
            events = select(0 if timeout else timeout)
            if timeout and not events:
                self.now += timeout
            return events

        patch.setattr(loop._selector, "select", skip)
        patch.setattr(loop, "time", lambda: self.now)
        for module in (_waiting, waits):
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
