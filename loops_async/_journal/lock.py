"""One program at a time on one journal: a lock that the system releases when the process ends, however it ends."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Final

from ..errors import JournalError

_held: Final[set[tuple[int, str]]] = set()
"""By process and path: the system's lock does not keep a second client of the same process out."""

_holding: Final = threading.Lock()


class Lock:
    """The lock of the journal at `path`, in a file beside it.

    Raises:
        JournalError: another program, or another client of this one, uses the journal.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._name = os.getpid(), os.path.realpath(path)
        with _holding:
            if self._name in _held:
                raise JournalError(f"the journal {path} is in use by another client of this program: close that first")
            self._descriptor = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _lock(self._descriptor)
            except OSError as error:
                os.close(self._descriptor)
                raise JournalError(
                    f"the journal {path} is in use by another program ({error.strerror}): wait until it has ended, or "
                    "give this one a journal of its own"
                ) from None
            _held.add(self._name)

    def release(self) -> None:
        """Let others use the journal."""
        with _holding:
            _held.discard(self._name)
            os.close(self._descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        # Not `flock`: a child process would inherit it, and keep it when this process is killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
