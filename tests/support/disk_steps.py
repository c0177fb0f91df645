"""What a killed process would leave on disk: copies of a directory, one for each step of the work on it."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

_CHANGES = ("mkdir", "unlink", "rmdir", "rename", "replace", "chmod")


class DiskSteps:
    """Copies `directory` before each change that Python makes to files, and before each statement of SQLite.

    Made before the directory's database is opened. A kill loses memory, so between two copies nothing else matters.

    Attributes:
        copies: the copies, each of which differs from the one before it.
    """

    def __init__(self, directory: Path, scratch: Path, patch: pytest.MonkeyPatch) -> None:
        self.copies: list[Path] = []
        self._directory = directory
        self._scratch = scratch
        self._is_recording = False
        self._is_copying = False
        self._lock = threading.RLock()
        self._last: object = None
        for name in _CHANGES:
            patch.setattr(os, name, self._as_step(getattr(os, name)))
        patch.setattr(io, "open", self._as_step(io.open))
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=self._connection_class()))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Copy each state of the directory that there is inside the block."""
        self._is_recording = True
        yield
        self._copy()
        self._is_recording = False

    def _as_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            with self._lock:  # so that a copy is of one moment
                self._copy()
                result = function(*args, **options)
                self._copy()
                return result

        return step

    def _connection_class(self) -> type[sqlite3.Connection]:
        as_step = self._as_step

        class Connection(sqlite3.Connection):
            execute = as_step(sqlite3.Connection.execute)
            executemany = as_step(sqlite3.Connection.executemany)

        return Connection

    def _copy(self) -> None:
        if not self._is_recording or self._is_copying:
            return
        self._is_copying = True  # copying takes steps too
        if (state := _state(self._directory)) != self._last:
            self._last = state
            self.copies.append(self._scratch / f"step-{len(self.copies)}")
            shutil.copytree(self._directory, self.copies[-1])
        self._is_copying = False


def _state(directory: Path) -> list[tuple[str, int]]:
    """Return all paths with their sizes; of SQLite's log, which may be written again from its start, the time too."""
    paths = sorted(directory.rglob("*"))
    return [(str(path), path.stat().st_size if path.is_file() else path.stat().st_mtime_ns) for path in paths]
