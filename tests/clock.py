"""Time that a test can let pass without waiting."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest


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

    def _datetime(self, *_: object) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.now)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(asyncio, "sleep", self.sleep)
        # backoff measures how long it has been trying with its own clock.
        patch.setattr("backoff._async.datetime", SimpleNamespace(datetime=SimpleNamespace(now=self._datetime)))
