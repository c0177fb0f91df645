"""Time limits that forgive an event loop that was held, and the warning that says so."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final

log = logging.getLogger("loops_async")

LATE_SECONDS: Final = 0.1
"""A timer that fires so late shows that the program held the event loop; answers may have arrived that nothing read."""

GRACE_SECONDS: Final = 1.0
"""The extension of a late time limit, in which such answers are read."""

MOST_GRACES: Final = 10
"""The most extensions, so that a time limit ends even if the program always holds the event loop."""

HELD_SECONDS: Final = 1.0
"""A warning reports that the event loop was held for so long."""


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


class HoldWarning:
    """Warns once of each time that the event loop was held, whatever notices it, and of each culprit once.

    The culprit is known where a thread looked while the loop was held. Where it is not, a warning follows only on one
    that said much less.
    """

    def __init__(self) -> None:
        self._noticed = float("-inf")
        self._culprit: str | None = None
        self._longest = 0.0

    def say(self, seconds: float) -> None:
        """Warn that the loop was held until now, unless that was said while it was."""
        if self._is_new(seconds) and seconds >= 2 * self._longest:
            self._longest = seconds
            log.warning(
                "the program held the event loop for at least %.1f s, so no answer could be read and time limits "
                "expire late; run blocking code with asyncio.to_thread",
                seconds,
            )

    def say_while_held(self, seconds: float, task: str, stack: Sequence[str]) -> None:
        """Warn that the loop is being held by a function, the first of `stack`, unless that was said before."""
        if self._is_new(seconds) and stack[0] != self._culprit:
            self._culprit = stack[0]
            log.warning(
                "the program holds the event loop, for %.1f s now%s, in %s; until it returns, no answer can be read "
                "and time limits expire late; run blocking code with asyncio.to_thread",
                seconds,
                task,
                ", called by ".join(stack),
            )

    def _is_new(self, seconds: float) -> bool:
        now = time.monotonic()
        is_new = now - self._noticed >= seconds + HELD_SECONDS
        self._noticed = now
        return is_new


hold_warning: Final = HoldWarning()
