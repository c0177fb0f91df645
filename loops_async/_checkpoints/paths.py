"""Where the files of a checkpoint may go: inside their directory, and no two to one place."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath

from ..errors import ProtocolError
from ..types import CheckpointFile


def places_of(files: list[CheckpointFile], *, reserved: str) -> list[PurePosixPath]:
    """Return the place of each file below the directory, or refuse the whole listing.

    Files of one name from several nodes go to ``node-<rank>/`` each. `reserved` is a name at the top that is taken.
    """
    names = [_parts(file.relative_file_name) for file in files]
    is_shared = len({tuple(parts) for parts in names}) < len(names)
    places = [
        PurePosixPath(*([f"node-{file.node_rank}"] if is_shared else []), *parts)
        for file, parts in zip(files, names, strict=True)
    ]
    folded = [PurePosixPath(_folded(str(place))) for place in places]
    directories = {parent for place in folded for parent in place.parents}
    is_taken = any(place.parts[0] == _folded(reserved) for place in folded)
    if len(set(folded)) < len(places) or directories.intersection(folded) or is_taken:
        raise ProtocolError("the checkpoint's listing names the same file twice; nothing was written")
    return places


def refuse_links(root: Path, paths: list[Path]) -> None:
    """Refuse paths below `root` that a symbolic link leads elsewhere."""
    real_root = root.resolve()
    for path in paths:
        if not path.parent.resolve().is_relative_to(real_root) or path.is_symlink():
            raise ProtocolError(f"{path} leaves the directory through a symbolic link; nothing was written")


def _folded(text: str) -> str:
    """Return the same text for names that some disk takes for one: upper and lower case, composed and not."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _parts(name: str) -> list[str]:
    """Split a file's name into safe path segments."""
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
