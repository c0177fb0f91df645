"""Local paths of checkpoint files: inside their directory, and all different."""

from __future__ import annotations

import errno
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final

from ..errors import ProtocolError
from ..types import CheckpointFile

LONGEST_SEGMENT: Final = 255
"""Bytes of one path segment that common file systems can hold."""

_FORBIDDEN: Final = frozenset('\\<>:"|?*')
"""Characters that no name on Windows has; a colon there begins a drive, or a second stream of a file."""
_DEVICES: Final = frozenset(
    {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
    | {f"{device}{number}" for device in ("COM", "LPT") for number in "0123456789\u00b9\u00b2\u00b3"}
)
"""Names of devices on Windows, with any extension."""

_NAME_ERRORS: Final = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


def local_paths(files: list[CheckpointFile], *, reserved: str) -> list[PurePosixPath]:
    """Return the path of each file relative to the directory, or reject the whole listing.

    If nodes have files of the same name, each node's files go to ``node-<rank>/``. `reserved` is a top-level name that
    no file may use.
    """
    names = [_safe_parts(file.relative_file_name) for file in files]
    is_shared = len({tuple(parts) for parts in names}) < len(names)
    paths = [
        PurePosixPath(*([f"node-{file.node_rank}"] if is_shared else []), *parts)
        for file, parts in zip(files, names, strict=True)
    ]
    folded = [PurePosixPath(_fold(str(path))) for path in paths]
    directories = {parent for path in folded for parent in path.parents}
    uses_reserved = any(path.parts[0] == _fold(reserved) for path in folded)
    if len(set(folded)) < len(paths) or directories.intersection(folded) or uses_reserved:
        raise ProtocolError("the checkpoint's listing names the same file twice; nothing was written")
    return paths


@contextmanager
def name_errors(name: str) -> Generator[None]:
    """Raise a `ProtocolError` if the file system cannot hold this name of the listing."""
    try:
        yield
    except (OSError, UnicodeEncodeError) as problem:
        if isinstance(problem, OSError) and problem.errno not in _NAME_ERRORS:
            raise
        raise ProtocolError(
            f"this file system cannot hold {name!r:.300} of the checkpoint's listing in this directory: {problem}"
        ) from problem


def reject_symlinks(root: Path, paths: list[Path]) -> None:
    """Reject paths below `root` that lead outside it through a symbolic link, or are one."""
    real_root = root.resolve()
    for path in paths:
        if not path.parent.resolve().is_relative_to(real_root) or path.is_symlink():
            raise ProtocolError(f"{path} leaves the directory through a symbolic link; nothing was written")


def _fold(text: str) -> str:
    """Return equal text for names that a file system may treat as equal: by case or by Unicode composition."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _safe_parts(name: str) -> list[str]:
    """Split a file's name into path segments, or reject an unsafe one."""
    parts = name.split("/")
    if not name.isprintable() or not all(map(_is_safe, parts)):
        raise ProtocolError(f"the checkpoint's listing has an unsafe file name {name!r:.300}; nothing was written")
    return parts


def _is_safe(part: str) -> bool:
    """Whether a path segment has the same meaning on every system, Windows included."""
    stem = part.partition(".")[0].rstrip(" ").upper()
    return (
        part not in ("", ".", "..")
        and not part.endswith((".", " "))
        and not _FORBIDDEN.intersection(part)
        and stem not in _DEVICES
        and len(part.encode()) <= LONGEST_SEGMENT
    )
