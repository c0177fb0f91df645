"""Large request bodies, sent without blocking the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

SLICE_SECONDS: Final = 0.002
"""The longest slice of work between two yields to the event loop, unless a single datum takes longer."""

SEND_BYTES: Final = 256 * 1024
"""The size of one write to the network."""


class Pacer:
    """Yields to the event loop after each slice of work."""

    def __init__(self) -> None:
        self._resumed = time.perf_counter()

    async def pause(self) -> None:
        """Let other tasks run if the slice is over."""
        if time.perf_counter() - self._resumed >= SLICE_SECONDS:
            await asyncio.sleep(0)
            self._resumed = time.perf_counter()


class Body:
    """A request body in pieces."""

    __slots__ = ("parts", "size")

    def __init__(self, *parts: bytes | bytearray) -> None:
        self.parts: tuple[bytes | bytearray, ...] = parts
        self.size: int = sum(map(len, parts))

    async def stream(self) -> AsyncIterator[memoryview]:
        """Yield the pieces as slices that are not copied; call it once for each attempt."""
        pacer = Pacer()
        for part in self.parts:
            for start in range(0, len(part), SEND_BYTES):
                yield memoryview(part)[start : start + SEND_BYTES]
                await pacer.pause()  # a fast network would accept the whole body without a pause
