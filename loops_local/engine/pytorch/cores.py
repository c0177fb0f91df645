"""How the engine's threads share the cores: a thread has all of them while it works alone, else an equal part."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["adjust", "working"]

_lock = threading.Lock()
_working = 0
_all_cores = torch.get_num_threads()


class _Current(threading.local):
    cores = 0


_current = _Current()


@contextmanager
def working() -> Iterator[None]:
    """Count this thread as working inside the block, and set the number of cores that it uses."""
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
    """Set the number of cores again; long work calls this regularly, because other threads start and stop."""
    cores = max(1, _all_cores // max(1, _working))
    if cores != _current.cores:
        _current.cores = cores
        torch.set_num_threads(cores)
