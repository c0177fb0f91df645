"""Waiting: how long it may take, and what is said while it takes long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Final

from .errors import LoopsError

log = logging.getLogger("loops_async")

LATE_SECONDS: Final = 0.1
"""A timer that fires this late shows that the program held the event loop, so answers may have arrived unread."""

GRACE_SECONDS: Final = 1.0
"""How long a late time limit is extended, to read them."""

MOST_GRACES: Final = 10
"""A program that always holds the event loop must not make a time limit endless."""

HELD_SECONDS: Final = 1.0
"""A hold of the event loop that is worth a warning."""

SILENCE_SECONDS: Final = 30.0
"""Waiting without news for this long is worth a warning; the next ones come after twice the time each."""


class TimeLimit:
    """Ends the block that it guards when `seconds` are over; None never does.

    A block that ends otherwise leaves the function, so what follows it is for a limit that has expired::

        with TimeLimit(seconds):
            return await answer()
        raise TimeoutError

    Unlike `asyncio.timeout`, it does not expire before answers were read that arrived while the program held the event
    loop.
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
        if self._timer is not None:
            self._timer.cancel()
        if not self._has_expired:
            return False
        # As in `asyncio.timeout`: a cancellation by somebody else at the same time is let on.
        return self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError

    @contextmanager
    def paused(self) -> Generator[None]:
        """Let time pass that does not count."""
        if self._timer is None:
            yield
            return
        self._timer.cancel()
        left = self._due - self._loop.time()
        try:
            yield
        finally:
            self._start(left)

    def _start(self, seconds: float) -> None:
        self._due = self._loop.time() + seconds
        self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        late = self._loop.time() - self._due
        if late < LATE_SECONDS or self._graces >= MOST_GRACES:
            self._has_expired = True
            self._task.cancel()
            return
        self._graces += 1
        self._start(GRACE_SECONDS)
        if late >= HELD_SECONDS:
            _hold_warning.say(late)


class _HoldWarning:
    """Says once for each hold of the event loop, which many time limits notice."""

    def __init__(self) -> None:
        self._said = float("-inf")

    def say(self, seconds: float) -> None:
        now = time.monotonic()
        if now - self._said < HELD_SECONDS:
            return
        self._said = now
        log.warning(
            "the program held the event loop for %.1f s or longer, so no answer could be read and time limits end "
            "late; call what blocks with asyncio.to_thread",
            seconds,
        )


_hold_warning: Final = _HoldWarning()


class Wait:
    """One thing that is waited for."""

    __slots__ = ("_queue", "answer", "since", "what")

    def __init__(self, what: str, queue: _Queue) -> None:
        self.what = what
        self.since = time.monotonic()
        self.answer: str | None = None
        self._queue = queue

    def heard(self, answer: str) -> None:
        """Note the last answer; another one than before is news."""
        if answer != self.answer:
            self.answer = answer
            self._queue.news()

    @contextmanager
    def hearing(self) -> Generator[None]:
        """Take the error of one of several attempts as the last answer."""
        try:
            yield
        except LoopsError as error:
            self.heard(str(error))
            raise


class _Queue:
    """What waits for the same thing: news for one of them is news for all."""

    def __init__(self) -> None:
        self.waits: dict[Wait, None] = {}
        self.news()

    def news(self) -> None:
        self._heard = time.monotonic()
        self._patience = SILENCE_SECONDS

    def warn(self) -> None:
        """Say what is waited for if there was no news for long."""
        now = time.monotonic()
        if now - self._heard < self._patience:
            return
        self._patience *= 2
        oldest = next(iter(self.waits))
        others = f" (and {len(self.waits) - 1} more)" if len(self.waits) > 1 else ""
        answer = f"; last answer: {oldest.answer}" if oldest.answer else ""
        log.warning("still waiting for %s%s, for %.0f s now%s", oldest.what, others, now - oldest.since, answer)


class Waits:
    """All that one client waits for: each says so after 30 s without news, and then at growing intervals.

    Of many that wait for the same, only the oldest is named. One timer serves all, since there may be thousands.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def on(self, what: str, *, queue: str | None = None) -> Generator[Wait]:
        """Count the block as waiting for `what`; those with the same `queue` wait for the same."""
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
        """Say nothing from now on."""
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
