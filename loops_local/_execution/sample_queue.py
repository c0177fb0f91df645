"""Samples that were handed in to be generated sometime, and what came of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec

from loops_async import protocol as wire

from .engine import RefusedError
from .operations import failed, shutting_down
from .web import HttpError

__all__ = ["SampleQueue"]

logger = logging.getLogger(__name__)

Generate: TypeAlias = Callable[[], Awaitable[wire.Completions]]


class SampleQueue:
    """The samples of all samplers, each generated at most once.

    They are generated side by side, for the engine batches them, and kept in memory for `retention_seconds` after
    they are done; a service that was started anew knows none.
    """

    def __init__(self, *, retention_seconds: float) -> None:
        self._retention_seconds = retention_seconds
        self._samples: dict[tuple[str, str], asyncio.Task[bytes]] = {}
        self._done: deque[tuple[float, tuple[str, str]]] = deque()
        self._closing = False

    def submit(self, sampler_id: str, operation_id: str, generate: Generate) -> None:
        """Begin to generate, unless a sample of this id is known already."""
        if self._closing:
            raise shutting_down()
        self._forget_old()
        key = sampler_id, operation_id
        if key not in self._samples:
            task = self._samples[key] = asyncio.create_task(_outcome(generate), name=f"sample {operation_id}")
            task.add_done_callback(lambda _: self._done.append((time.monotonic(), key)))

    async def answer(self, sampler_id: str, operation_id: str, *, hold_seconds: float) -> bytes | None:
        """Wait for a sample; return its encoded answer, or None when it is still under way.

        Raises:
            KeyError: no such sample; it was cancelled, or done too long ago.
        """
        self._forget_old()
        task = self._samples[sampler_id, operation_id]
        await asyncio.wait([task], timeout=hold_seconds)
        if not task.done():
            return None
        if task.cancelled():
            if self._closing:
                raise shutting_down()
            raise KeyError(operation_id)
        return task.result()

    def cancel(self, sampler_id: str, operation_id: str) -> bool:
        """Give up a sample; return whether it was not done before.

        Raises:
            KeyError: no such sample.
        """
        return self._samples[sampler_id, operation_id].cancel()

    async def close(self) -> None:
        """Give up all samples."""
        self._closing = True
        for task in self._samples.values():
            task.cancel()
        await asyncio.gather(*self._samples.values(), return_exceptions=True)

    def _forget_old(self) -> None:
        while self._done and self._done[0][0] < time.monotonic() - self._retention_seconds:
            del self._samples[self._done.popleft()[1]]


async def _outcome(generate: Generate) -> bytes:
    """Generate; return what a poll answers."""
    try:
        return msgspec.json.encode({"status": "done", "result": await generate()})
    except (RefusedError, HttpError) as refused:
        return failed(str(refused), "ValueError")
    except Exception as error:
        logger.exception("a queued sample failed")
        return failed(str(error) or repr(error), type(error).__name__)
