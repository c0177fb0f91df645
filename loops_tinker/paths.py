"""Paths of checkpoints: ``tinker://RUN/KIND/NAME`` in scripts, ``bt://loops:RUN/KIND/NAME`` at the service."""

from __future__ import annotations

from typing import Final

__all__ = ["from_loops", "parts", "to_loops"]

OURS: Final = "tinker://"
THEIRS: Final = "bt://loops:"


def to_loops(path: str) -> str:
    """Return the service's form of a path; a path in that form, or of a file, is returned as it is."""
    return THEIRS + path.removeprefix(OURS) if path.startswith(OURS) else path


def from_loops(path: str) -> str:
    """Return the script's form of a path of the service."""
    return OURS + path.removeprefix(THEIRS) if path.startswith(THEIRS) else path


def parts(path: str) -> tuple[str, str, str]:
    """Return the run, the kind and the name of a path in either form, or raise a `ValueError`."""
    found = from_loops(path).removeprefix(OURS).split("/")
    if not from_loops(path).startswith(OURS) or len(found) != 3 or not all(found):
        raise ValueError(f"Invalid tinker path: {path}")
    return found[0], found[1], found[2]
