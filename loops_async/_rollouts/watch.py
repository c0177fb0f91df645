"""Warnings while a stream runs: a batch that does not come, and an event loop that is held."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from .._waiting import HELD_SECONDS, hold_warning
from .._work.waits import SILENCE_SECONDS
from .metrics import Meter

__all__ = ["LoopWatch", "warn_of_waiting"]

log = logging.getLogger("loops_async")

LOOK_SECONDS: Final = 0.5


class LoopWatch:
    """Measures how late the event loop is, since rollouts that hold it delay all others."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._look_again()

    def stop(self) -> None:
        """Stop measuring."""
        self._timer.cancel()

    def _look_again(self) -> None:
        self._due = self._loop.time() + LOOK_SECONDS
        self._timer = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        late = self._loop.time() - self._due
        self._meter.lag_max = max(self._meter.lag_max, late)
        if late >= HELD_SECONDS:
            hold_warning.say(late)
        self._look_again()


@contextmanager
def warn_of_waiting(describe: Callable[[], str]) -> Generator[None]:
    """Warn when the block takes 30 s, and each time that its duration has doubled if there is something else to say."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    timer: asyncio.TimerHandle
    said = ""

    def warn() -> None:
        nonlocal timer, said
        waited, text = loop.time() - began, describe()
        if text != said:
            said = text
            log.warning("no batch for %.0f s: %s", waited, text)
        timer = loop.call_later(waited, warn)

    timer = loop.call_later(SILENCE_SECONDS, warn)
    try:
        yield
    finally:
        timer.cancel()
