"""Large request bodies, sent without holding the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

SLICE_SECONDS: Final = 0.002
"""Work this long without a break at most, unless a single datum takes longer."""

SEND_BYTES: Final = 256 * 1024
"""Hand this much to the network at a time."""


class Pacer:
    """Gives the event loop a turn whenever a slice of work has been done."""

    def __init__(self) -> None:
        self._resumed = time.perf_counter()

    async def pause(self) -> None:
        """Let others run if the slice is over."""
        if time.perf_counter() - self._resumed >= SLICE_SECONDS:
            await asyncio.sleep(0)
            self._resumed = time.perf_counter()


class Body:
    """A request body in pieces."""

    __slots__ = ("parts", "size")

    def __init__(self, *parts: bytes | bytearray) -> None:
        self.parts = parts
        self.size = sum(map(len, parts))

    async def stream(self) -> AsyncIterator[memoryview]:
        """Yield the pieces, cut but not copied; may be called once for each attempt."""
        pacer = Pacer()
        for part in self.parts:
            for start in range(0, len(part), SEND_BYTES):
                yield memoryview(part)[start : start + SEND_BYTES]
                await pacer.pause()  # a fast network takes all of it without a pause
