"""Where work with long texts is done, so that it never holds up the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from anyio import CapacityLimiter, to_thread

__all__ = ["LONG_TEXT", "Worker"]

LONG_TEXT: Final = 8192
"""From this number of characters on, work with a text takes longer than an event loop may be held."""

T = TypeVar("T")


class Worker:
    """Works with texts: with a long one in a thread, one at a time.

    One, because the event loop competes with it for the interpreter, and waits a few milliseconds for each thread that
    does. Its own, because the shared worker threads may all be those of agents, which wait for what is done here.
    """

    def __init__(self) -> None:
        self._limiter: CapacityLimiter = CapacityLimiter(1)

    async def run(self, size: int, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``, whose work is like that with `size` characters."""
        if size < LONG_TEXT:
            return function(*args)
        return await to_thread.run_sync(function, *args, limiter=self._limiter)
