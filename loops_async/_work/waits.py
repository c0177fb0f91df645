"""Waits that may last long: one that has no news for 30 s is told once, and again only after news."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from ..errors import LoopsError, without_quote
from .places import place_of
from .registry import CURRENT, Entry

log = logging.getLogger("loops_async")

SILENCE_SECONDS: Final = 30.0
"""The warning comes after so long without news."""


class Wait:
    """One thing that is waited for."""

    __slots__ = ("_queue", "answer", "entry", "since", "what")

    def __init__(self, what: str, queue: _Queue, entry: Entry) -> None:
        self.what = what
        self.since = time.monotonic()
        self.answer: str | None = None
        self.entry = entry
        self._queue = queue

    def heard(self, answer: str) -> None:
        """Record the last answer; if it differs from the one before, it is news."""
        if answer != self.answer:
            self.answer = answer
            self._queue.news()
            if not self.entry.is_over:
                self.entry.last_error = answer

    @contextmanager
    def hearing(self) -> Generator[None]:
        """Record the error of an attempt as the last answer."""
        try:
            yield
        except LoopsError as error:
            self.heard(without_quote(error))
            raise


class _Queue:
    """Waits for the same thing: news for one is news for all."""

    def __init__(self) -> None:
        self.waits: dict[Wait, None] = {}
        self.news()

    def news(self) -> None:
        self._heard = time.monotonic()
        self._is_said = False

    def warn(self) -> None:
        """Log a warning if there was no news for long, unless that was said."""
        now = time.monotonic()
        if self._is_said or now - self._heard < SILENCE_SECONDS:
            return
        self._is_said = True
        oldest = next(iter(self.waits))
        others = f" (and {len(self.waits) - 1} more)" if len(self.waits) > 1 else ""
        answer = f"; last answer: {oldest.answer}" if oldest.answer else ""
        place = place_of(oldest.entry.task)
        caller = f"; called at {place}" if place else ""
        log.warning(
            "still waiting for %s%s, for %.0f s now%s%s", oldest.what, others, now - oldest.since, answer, caller
        )


class Waits:
    """Everything that one client waits for.

    Of many waits for the same thing, only the oldest is named. One timer serves all, since there may be thousands.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def on(self, what: str, *, queue: str | None = None) -> Generator[Wait]:
        """Count the block as a wait for `what`; waits with the same `queue` are for the same thing."""
        name = queue or what
        waiting = self._queues.get(name)
        if waiting is None:
            waiting = self._queues[name] = _Queue()
        wait = Wait(what, waiting, CURRENT.get())
        waiting.waits[wait] = None
        if self._timer is None:
            self._start()
        try:
            yield wait
        finally:
            del waiting.waits[wait]
            waiting.news()
            if not waiting.waits:
                self._queues.pop(name, None)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SILENCE_SECONDS / 6, self._look)

    def _look(self) -> None:
        self._timer = None
        for queue in self._queues.values():
            queue.warn()
        if self._queues:
            self._start()
