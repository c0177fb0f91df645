"""A thread that looks at the event loops of all clients, and says what holds one while it is held.

The loop itself could only say afterwards that it was held, and never, if that does not end. There is one thread for the
process, which sleeps while nothing is under way.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextlib import suppress
from typing import Final

from .._waiting import HELD_SECONDS, hold_warning
from .places import stack_of
from .registry import Work, open_works

LOOK_SECONDS: Final = 0.25


class Watchdog:
    """Looks at the loops in a daemon thread, which starts with the first work of a process."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._has_work = threading.Event()

    def watch(self) -> None:
        """Look from now on, while anything is under way; called on event loops."""
        if self._thread is None or not self._thread.is_alive():  # a forked child has no thread of its parent
            self._has_work = threading.Event()
            self._thread = threading.Thread(
                target=self._look, args=(self._has_work,), name="loops_async: watchdog", daemon=True
            )
            self._thread.start()
        self._has_work.set()

    def _look(self, has_work: threading.Event) -> None:
        while True:
            has_work.wait()
            has_work.clear()
            while _check_all():
                time.sleep(LOOK_SECONDS)


def _check_all() -> bool:
    """Check all loops; return whether anything is under way in any of them."""
    watched = [work for work in open_works() if work.thread_id is not None]
    for work in watched:
        _check(work)
    return bool(watched)


def _check(work: Work) -> None:
    held = work.lag
    if held < HELD_SECONDS:
        return
    # The documented way to the stack of another thread.
    frames = sys._current_frames()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    stack = stack_of(frames.get(work.thread_id or 0))
    if stack and work.lag >= held:  # otherwise it has gone on meanwhile
        hold_warning.say_while_held(held, _task_of(work), stack)


def _task_of(work: Work) -> str:
    with suppress(RuntimeError):  # the table of tasks changed meanwhile
        task = None if work.loop is None else asyncio.current_task(work.loop)
        if task is not None:
            return f", in the task {task.get_name()}"
    return ""


watchdog: Final = Watchdog()
