"""Files that are there whole or not at all, whenever the process or the machine ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["flush", "write_whole"]


def write_whole(path: Path, parts: Iterable[bytes], *, draft: Path | None = None, is_private: bool = False) -> None:
    """Write a file, which is on disk afterwards; if this is cut short, it is as it was before.

    Args:
        path: the file; one that is replaced hands its mode on.
        parts: what it will hold.
        draft: where that is written first; None is a name beside it that no other writer has.
        is_private: let only its owner read it, whatever the mode of an earlier one.

    Raises:
        OSError: the file cannot be written, e.g. its folder does not exist.
    """
    new = path.with_name(f".{path.name}.{uuid4().hex}") if draft is None else draft
    new.unlink(missing_ok=True)  # of a process that was killed
    try:
        with open(new, "xb", opener=partial(os.open, mode=0o600 if is_private else 0o666)) as file:
            file.writelines(parts)
            flush(file)
        if not is_private and path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    _flush_folder(path.parent)


def flush(file: BinaryIO) -> None:
    """Write a file through to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush the new name of a file to disk, where the system can."""
    with suppress(OSError):  # Windows opens no folders, and some network disks flush none
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
