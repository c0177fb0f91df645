"""Functions and rollouts that tests run in other processes, which import them from here."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any


def double(number: int) -> int:
    return 2 * number


def fail(text: str) -> None:
    raise KeyError(text)


def end_badly() -> None:
    os._exit(3)


class UnreadableError(Exception):
    """An error that cannot be pickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("two arguments", threading.Lock())


def fail_unreadably() -> None:
    raise UnreadableError(1, 2)


def hang(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(1000.0)


def end_after_a_fork(file: Path) -> None:
    """End the worker, and leave a process that it has forked."""
    if os.fork() == 0:
        note(file, str(os.getpid()))
        time.sleep(1000.0)
        os._exit(0)
    while not file.exists():
        time.sleep(0.01)
    os._exit(3)


def grade_in_a_process() -> int:
    """Run code in a process that can be ended, as graders of programs do."""
    from_there, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=there.send, args=(42,))
    process.start()
    process.join()
    return int(from_there.recv())


def interrupt() -> str:
    """Do what Ctrl-C in a terminal does to every process."""
    os.kill(os.getpid(), signal.SIGINT)
    return "went on"


async def interrupt_rolling_out(policy: Any, task: Any) -> str:
    return interrupt()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def exit_quietly() -> None:
    raise SystemExit(3)


def warn(text: str) -> None:
    logging.getLogger("graders").warning("a grader says %s", text)


async def give_back(policy: Any, task: Any) -> tuple[Any, Any]:
    await asyncio.sleep(0)
    return policy, task


async def fail_rolling_out(policy: Any, text: str) -> None:
    raise KeyError(text)


async def fail_rolling_out_unreadably(policy: Any, task: Any) -> None:
    raise UnreadableError(1, 2)


async def wait_forever(policy: Any, file: Path) -> None:
    """Note the process, and then that this was cancelled."""
    note(file, str(os.getpid()))
    try:
        await asyncio.Event().wait()
    finally:
        note(file, "cancelled")


async def hold_the_loop(policy: Any, file: Path) -> None:
    hang(file)


async def die(policy: Any, task: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def wait_for(policy: Any, file: Path) -> str:
    """Return what another rollout writes."""
    while True:
        if text := noted(file):
            return text
        await asyncio.sleep(0.01)


def give_back_plainly(policy: Any, task: Any) -> tuple[Any, Any]:
    return policy, task


async def write(text: str, file: Path) -> None:
    note(file, text)


def note(file: Path, text: str) -> None:
    file.write_text(text)


def noted(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def wait_and_double(file: Path, number: int) -> int:
    """Wait for a file, and then double the number."""
    while not file.exists():
        time.sleep(0.01)
    return 2 * number
