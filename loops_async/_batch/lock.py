"""One run at a time for each output: two would ask for the same rows, and mix their lines."""

from __future__ import annotations

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


@contextmanager
def only_run(lock: Path, target: str) -> Generator[None]:
    """Be the only run that writes an output, as long as this lasts.

    The lock is the operating system's, on a file beside the output: it ends with its process, however that ends, and
    the file that a killed process leaves is taken over. Windows, and file systems without locks, have none.

    Args:
        lock: the file, which is removed in the end.
        target: how the error names the output.

    Raises:
        InputError: another run holds the lock.
        OSError: the file cannot be made.
    """
    try:
        file = _locked(lock)
    except BlockingIOError:
        raise InputError(
            target,
            f"another run{_holder(lock)} writes to it: wait until that has ended, or choose another output. "
            "Nothing was sent or changed",
        ) from None
    try:
        if file is not None:
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        if file is not None:
            lock.unlink(missing_ok=True)  # while it is held, so that none is removed that another run has made
            os.close(file)


def _locked(lock: Path) -> int | None:
    """Return the open file, which is locked where the system can do so.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise
        except OSError:  # this file system has no locks
            return file
        if _is_there(file, lock):
            return file
        os.close(file)  # the run that held it has removed it since we opened it


def _is_there(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _holder(lock: Path) -> str:
    try:
        return f", {holder}," if (holder := lock.read_text()) else ""
    except FileNotFoundError:  # it has just ended
        return ""
