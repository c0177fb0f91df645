"""One run at a time for each output: two would ask for the same rows, and mix their lines."""

from __future__ import annotations

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .._locks import FileLock, LockedError
from ..errors import InputError


@contextmanager
def only_run(lock: Path, target: str) -> Generator[None]:
    """Be the only run that writes an output, as long as this lasts.

    The lock is the operating system's, on a file beside the output: the file that a killed process leaves is taken
    over. File systems without locks have none.

    Args:
        lock: the file, which is removed in the end.
        target: how the error names the output.

    Raises:
        InputError: another run holds the lock.
        OSError: the file cannot be made.
    """
    here = f"process {os.getpid()} on {platform.node()}"
    try:
        held = FileLock(lock, mode=0o644, is_required=False)
    except LockedError as locked:
        holder = here if locked.is_here else _holder(lock)
        raise InputError(
            target,
            f"another run{holder and f', {holder},'} writes to it: wait until that has ended, or choose another "
            "output. Nothing was sent or changed",
        ) from None
    try:
        held.write(here)
        yield
    finally:
        held.release(removes_file=True)


def _holder(lock: Path) -> str:
    try:
        return lock.read_text()
    except OSError:  # it has just ended, or the system lets only the holder read
        return ""
