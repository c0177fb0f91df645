"""Locks of the operating system: one holder at a time, until it releases the lock or its process ends, however."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["FileLock", "LockedError"]

_held: Final[set[tuple[int, str]]] = set()
"""By process and path: the system's lock does not keep a second holder of the same process out."""

_guard: Final = threading.Lock()


class LockedError(Exception):
    """Another one holds the lock; `is_here` if that is in this process."""

    def __init__(self, *, is_here: bool) -> None:
        super().__init__("the lock is held")
        self.is_here = is_here


class FileLock:
    """The lock on the file at `path`, which is made if it is not there; a forked child does not hold it.

    Args:
        path: the file. Its holder must not open it again: closing that would release the lock.
        mode: the mode of a new file.
        is_required: whether to fail where the file system has no locks, instead of doing without.

    Raises:
        LockedError: another one holds it.
        OSError: the file cannot be made, or cannot be locked.
    """

    def __init__(self, path: Path, *, mode: int, is_required: bool = True) -> None:
        self._path = path
        self._holder = os.getpid(), os.path.realpath(path)
        with _guard:
            if self._holder in _held:
                raise LockedError(is_here=True)
            self._descriptor = _locked(path, mode, is_required=is_required)
            _held.add(self._holder)

    def write(self, text: str) -> None:
        """Replace what is in the file."""
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, text.encode())

    def release(self, *, removes_file: bool = False) -> None:
        """Let others hold it."""
        with _guard:
            _held.discard(self._holder)
            removes_file = removes_file and self._holder[0] == os.getpid()  # not in a forked child
            if removes_file and sys.platform != "win32":
                self._path.unlink(missing_ok=True)  # while it is held, so that none is removed that another has made
            os.close(self._descriptor)
            if removes_file and sys.platform == "win32":  # where no open file can be removed
                with suppress(OSError):
                    self._path.unlink()


def _locked(path: Path, mode: int, *, is_required: bool) -> int:
    """Return the open file, which is locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
        try:
            _lock(descriptor)
            if _is_there(descriptor, path):
                return descriptor
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise LockedError(is_here=False) from None
        except OSError:  # this file system has no locks
            if not is_required:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it since it was opened


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        # Not `flock`: a child process would inherit it, and keep it when this process is killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
