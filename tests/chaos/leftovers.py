"""What a process holds on to: tasks, sockets, files and threads."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SETTLE_SECONDS = 5.0
"""How long what ends by itself may take, e.g. threads of an executor."""


def holdings() -> Counter[str]:
    """Return what this process holds, by kind and name."""
    return Counter([*_tasks(), *_files(), *_threads()])


def left_over(before: Counter[str]) -> Counter[str]:
    """Return what this process holds above `before`, after a moment for what is ending."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        gc.collect()
        more = holdings() - before
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.05)


def _tasks() -> Iterator[str]:
    """Yield the tasks of every event loop."""
    for thing in gc.get_objects():
        # By its type: `isinstance` would touch objects of others that warn when they are.
        if issubclass(type(thing), asyncio.Task) and not thing.done():
            yield (
                f"task {thing.get_name()}" if not thing.get_name().startswith("Task-") else f"task {thing.get_coro()!r}"
            )


def _files() -> Iterator[str]:
    """Yield the open files and sockets, where the system tells them."""
    directory = Path("/proc/self/fd")
    if not directory.is_dir():
        return
    for entry in directory.iterdir():
        try:
            target = str(entry.readlink())
        except OSError:  # the one that listed the directory
            continue
        # The number in "socket:[123]" is another for each socket.
        yield target.split(":[")[0] if ":[" in target else f"file {target}"


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        yield f"thread {thread.name}"
