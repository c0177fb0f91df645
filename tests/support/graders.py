"""Functions that tests run in other processes, which import them from here."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path


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


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
