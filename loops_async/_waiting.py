"""Time limits, and warnings about what takes long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Final

from .errors import LoopsError, without_quote

log = logging.getLogger("loops_async")

LATE_SECONDS: Final = 0.1
"""A timer that fires so late shows that the program held the event loop; answers may have arrived that nothing read."""

GRACE_SECONDS: Final = 1.0
"""The extension of a late time limit, in which such answers are read."""

MOST_GRACES: Final = 10
"""The most extensions, so that a time limit ends even if the program always holds the event loop."""

HELD_SECONDS: Final = 1.0
"""A warning reports that the event loop was held for so long."""

SILENCE_SECONDS: Final = 30.0
"""The first warning comes after so long without news, each further one after twice the time."""


running_limits: set[TimeLimit] | None = None
"""The time limits that run, where something else than time makes them expire; None elsewhere."""


class TimeLimit:
    """Ends the block that it guards when `seconds` are over; None never does.

    If the block returns, the code after it runs only when the limit has expired::

        with TimeLimit(seconds):
            return await answer()
        raise TimeoutError

    Unlike `asyncio.timeout`, it first lets answers be read that arrived while the program held the event loop.
    """

    __slots__ = ("_cancelling", "_due", "_graces", "_has_expired", "_loop", "_task", "_timer", "seconds")

    _due: float
    _loop: asyncio.AbstractEventLoop
    _task: asyncio.Task[object]

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._graces = 0
        self._has_expired = False

    def __enter__(self) -> TimeLimit:
        if self.seconds is not None:
            task = asyncio.current_task()
            if task is None:
                raise RuntimeError("a time limit needs a task")
            self._loop, self._task, self._cancelling = task.get_loop(), task, task.cancelling()
            self._start(self.seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._stop()
        if not self._has_expired:
            return False
        # As in `asyncio.timeout`: a cancellation from elsewhere at the same time must not be swallowed.
        return self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError

    @contextmanager
    def paused(self) -> Generator[None]:
        """Do not count the time that the block takes."""
        if self._timer is None:
            yield
            return
        self._stop()
        left = self._due - self._loop.time()
        try:
            yield
        finally:
            self._start(left)

    def _start(self, seconds: float) -> None:
        self._due = self._loop.time() + seconds
        self._timer = self._loop.call_at(self._due, self._ring)
        if running_limits is not None:
            running_limits.add(self)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if running_limits is not None:
            running_limits.discard(self)

    def expire(self) -> None:
        """End the block now."""
        self._stop()
        self._has_expired = True
        self._task.cancel()

    @property
    def task(self) -> asyncio.Task[object]:
        """The task that runs the block."""
        return self._task

    @property
    def seconds_left(self) -> float:
        """In how many seconds it expires."""
        return self._due - self._loop.time()

    def _ring(self) -> None:
        late = -self.seconds_left
        if late < LATE_SECONDS or self._graces >= MOST_GRACES:
            self.expire()
            return
        self._graces += 1
        self._start(GRACE_SECONDS)
        if late >= HELD_SECONDS:
            hold_warning.say(late)


class _HoldWarning:
    """Warns once of each time that the event loop was held, although many time limits notice it."""

    def __init__(self) -> None:
        self._said = float("-inf")

    def say(self, seconds: float) -> None:
        now = time.monotonic()
        if now - self._said < HELD_SECONDS:
            return
        self._said = now
        log.warning(
            "the program held the event loop for at least %.1f s, so no answer could be read and time limits expire "
            "late; run blocking code with asyncio.to_thread",
            seconds,
        )


hold_warning: Final = _HoldWarning()


class Wait:
    """One thing that is waited for."""

    __slots__ = ("_queue", "answer", "since", "what")

    def __init__(self, what: str, queue: _Queue) -> None:
        self.what = what
        self.since = time.monotonic()
        self.answer: str | None = None
        self._queue = queue

    def heard(self, answer: str) -> None:
        """Record the last answer; if it differs from the one before, it is news."""
        if answer != self.answer:
            self.answer = answer
            self._queue.news()

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
        self._patience = SILENCE_SECONDS

    def warn(self) -> None:
        """Log a warning if there was no news for long."""
        now = time.monotonic()
        if now - self._heard < self._patience:
            return
        self._patience *= 2
        oldest = next(iter(self.waits))
        others = f" (and {len(self.waits) - 1} more)" if len(self.waits) > 1 else ""
        answer = f"; last answer: {oldest.answer}" if oldest.answer else ""
        log.warning("still waiting for %s%s, for %.0f s now%s", oldest.what, others, now - oldest.since, answer)


class Waits:
    """Everything that one client waits for; warns after 30 s without news, and then at growing intervals.

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
        wait = Wait(what, waiting)
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
