"""The queue of serverless samplers: samples are submitted, then polled or cancelled."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from .._errors import shutting_down
from .outcomes import Work, run_to_outcome

__all__ = ["SampleQueue"]


class SampleQueue:
    """The samples of all samplers, each generated at most once.

    They are generated concurrently, for the engine batches them, and kept in memory for `retention_seconds` after
    they ended. They do not survive a restart of the service.
    """

    def __init__(self, *, retention_seconds: float) -> None:
        self._retention_seconds = retention_seconds
        self._samples: dict[tuple[str, str], asyncio.Task[bytes]] = {}
        self._ended: deque[tuple[float, tuple[str, str]]] = deque()
        self._closing = False

    def submit(self, sampler_id: str, operation_id: str, generate: Work) -> None:
        """Start to generate a sample, unless this id was submitted before."""
        if self._closing:
            raise shutting_down()
        self._purge()
        key = sampler_id, operation_id
        if key not in self._samples:
            sample = run_to_outcome(generate, name="sample", operation_id=operation_id)
            task = self._samples[key] = asyncio.create_task(sample, name=f"sample {operation_id}")
            task.add_done_callback(lambda _: self._ended.append((time.monotonic(), key)))

    async def outcome(self, sampler_id: str, operation_id: str, *, hold_seconds: float) -> bytes | None:
        """Return a sample's outcome as JSON, None if it has not ended within `hold_seconds`.

        Raises:
            KeyError: there is no such sample, it was cancelled, or it ended too long ago.
            HttpError: the service shuts down before the sample has ended.
        """
        self._purge()
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
        """Cancel a sample; return whether it had not ended before.

        Raises:
            KeyError: there is no such sample.
        """
        return self._samples[sampler_id, operation_id].cancel()

    async def close(self) -> None:
        """Cancel all samples."""
        self._closing = True
        for task in self._samples.values():
            task.cancel()
        await asyncio.gather(*self._samples.values(), return_exceptions=True)

    def _purge(self) -> None:
        while self._ended and self._ended[0][0] < time.monotonic() - self._retention_seconds:
            del self._samples[self._ended.popleft()[1]]
