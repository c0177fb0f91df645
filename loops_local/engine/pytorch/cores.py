"""How the engine's threads share the machine: each gets its part of the cores while several work, all when alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["adjust", "working"]

_lock = threading.Lock()
_working = 0
_all_cores = torch.get_num_threads()


class _Mine(threading.local):
    cores = 0


_mine = _Mine()


@contextmanager
def working() -> Iterator[None]:
    """Count this thread among those that work, and take its part of the cores."""
    global _working
    with _lock:
        _working += 1
    try:
        adjust()
        yield
    finally:
        with _lock:
            _working -= 1


def adjust() -> None:
    """Take the part that is due now; long work calls this now and then, as others begin and end."""
    cores = max(1, _all_cores // max(1, _working))
    if cores != _mine.cores:
        _mine.cores = cores
        torch.set_num_threads(cores)
