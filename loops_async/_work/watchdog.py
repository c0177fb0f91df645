"""A thread that looks at the event loops of all clients, and says what holds one while it is held.

The loop itself can only say afterwards that it was held, and never, if that does not end. A client has no thread by
itself, so this one runs only where the log is shown on standard error: one for the process, while anything is under
way.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextlib import suppress
from typing import Final

from .._logs import is_shown
from .._waiting import HELD_SECONDS, hold_warning
from .places import stack_of
from .registry import Work, open_works

LOOK_SECONDS: Final = 0.25


class Watchdog:
    """Looks at the loops in a daemon thread, which exists while anything is under way."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """Look from now on, while anything is under way, if the log is shown; called on event loops."""
        if is_shown() and (self._thread is None or not self._thread.is_alive()):  # it is not in a forked child
            self._thread = threading.Thread(target=self._look, name="loops_async: watchdog", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        while look():
            time.sleep(LOOK_SECONDS)
        self._thread = None
        if look():  # it began before the line above, and `watch` found this thread
            self.watch()


def look() -> bool:
    """Say what holds any of the loops; return whether anything is under way in one of them."""
    watched = [work for work in open_works() if work.thread_id is not None]
    for work in watched:
        _check(work)
    return bool(watched)


def _check(work: Work) -> None:
    held = work.lag
    if held < HELD_SECONDS:
        return
    stack = stack_of_loop(work)
    if stack and work.lag >= held:  # otherwise it has gone on meanwhile
        hold_warning.say_while_held(held, _task_of(work), stack)


def stack_of_loop(work: Work) -> list[str]:
    """Return the places of the program's own code that run in the thread of a loop."""
    # The documented way to the stack of another thread.
    frames = sys._current_frames()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    return stack_of(frames.get(work.thread_id or 0))


def _task_of(work: Work) -> str:
    with suppress(RuntimeError):  # the table of tasks changed meanwhile
        task = None if work.loop is None else asyncio.current_task(work.loop)
        if task is not None:
            return f", in the task {task.get_name()}"
    return ""


watchdog: Final = Watchdog()
