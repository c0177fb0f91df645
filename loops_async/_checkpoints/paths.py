"""Local paths of checkpoint files: inside their directory, and all different."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath

from ..errors import ProtocolError
from ..types import CheckpointFile


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
    is_unsafe = (
        not name
        or "\\" in name
        or not name.isprintable()
        or any(part in ("", ".", "..") or part[1:2] == ":" or part.endswith((".", " ")) for part in parts)
    )
    if is_unsafe:
        raise ProtocolError(f"the checkpoint's listing has an unsafe file name {name!r}; nothing was written")
    return parts
