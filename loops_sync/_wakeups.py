"""Calls of functions on the event loops that wait for started calls.

Each time that one thread wakes another, the two compete for Python's lock. Where many calls end in one iteration of the
bridge's loop, waking their waiters one by one costs more than the calls themselves do here.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Final

from loops_async._futures import is_running_here

__all__ = ["Wakeups", "wakeups"]


class Wakeups(threading.local):
    """Calls functions on event loops from any thread, each once, in the order in which a thread asks for them.

    The thread whose own loop is `gathering` wakes each other loop once for all functions that one iteration of its own
    has for it, at the start of the next iteration; any other thread wakes a loop for each function.
    """

    def __init__(self) -> None:
        self._own: asyncio.AbstractEventLoop | None = None
        self._gathered: dict[asyncio.AbstractEventLoop, deque[Callable[[], object]]] = {}

    @contextmanager
    def gathering(self, loop: asyncio.AbstractEventLoop) -> Generator[None]:
        """Gather while `loop` runs in this thread; what is left at the end is sent then."""
        self._own = loop
        try:
            yield
        finally:
            self._own = None
            self._send()

    def call_soon(self, loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
        """Call `function` on `loop` soon, unless it is closed, so that nothing waits there."""
        if self._own is None or not is_running_here(self._own):
            _wake(loop, deque([function]))
            return
        if not self._gathered:
            self._own.call_soon(self._send)
        self._gathered.setdefault(loop, deque()).append(function)

    def _send(self) -> None:
        gathered, self._gathered = self._gathered, {}
        for loop, functions in gathered.items():
            _wake(loop, functions)


def _wake(loop: asyncio.AbstractEventLoop, functions: deque[Callable[[], object]]) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_call_all, loop, functions)


def _call_all(loop: asyncio.AbstractEventLoop, functions: deque[Callable[[], object]]) -> None:
    try:
        while functions:
            functions.popleft()()
    finally:
        if functions:  # one has failed, or Ctrl-C came
            loop.call_soon(_call_all, loop, functions)


wakeups: Final = Wakeups()
"""Those of each thread."""
