"""Time that a test can let pass without waiting."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from loops_async._http import retry


class Clock:
    """Time in seconds since the test began; it passes in `asyncio.sleep` only, and there at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self._yield = asyncio.sleep

    async def sleep(self, seconds: float, result: object = None) -> object:
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
