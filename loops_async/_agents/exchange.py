"""One answer, and those who wait for it: a client and its retries."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from .._tasks import take_exception
from .errors import RefusedCall
from .records import Call

__all__ = ["Exchange"]


class Exchange:
    """The work on one request, which lives for `grace` seconds when its connection is lost, unless a retry joins."""

    def __init__(self, task: asyncio.Task[list[Call]], grace: float) -> None:
        self._task = task
        self._grace = grace
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        task.add_done_callback(take_exception)

    @property
    def has_failed(self) -> bool:
        """Whether there is no answer, and will be none."""
        return self._task.done() and (self._task.cancelled() or self._task.exception() is not None)

    @contextmanager
    def joined(self) -> Generator[None]:
        """Wait for the answer inside the block; the last to leave it before the end starts the `grace`."""
        self._waiting += 1
        if self._timer is not None:
            self._timer.cancel()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting and not self._task.done():
                self._timer = asyncio.get_running_loop().call_later(self._grace, self._task.cancel)

    async def wait(self, seconds: float | None = None) -> bool:
        """Return whether the answer has come, or has failed, after so many seconds at most."""
        await asyncio.wait([self._task], timeout=seconds)  # it cancels nothing when it is cancelled
        return self._task.done()

    def result(self) -> list[Call]:
        """Return the calls that the request became, once `wait` has returned True.

        Raises:
            RefusedCall: the request cannot be answered.
        """
        if self._task.cancelled():
            raise RefusedCall(410, "rollout_closed", "the rollout was closed while this waited for the sampler")
        return self._task.result()
