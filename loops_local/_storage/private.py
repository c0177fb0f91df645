"""The files of the service are its user's alone: the data directory holds keys, and what was trained."""

from __future__ import annotations

from pathlib import Path

__all__ = ["make_private_directory", "make_private_file", "make_tree_private"]


def make_private_directory(path: Path) -> None:
    """Create a directory that only its owner can enter; change one that exists."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def make_private_file(path: Path) -> None:
    """Create a file that only its owner can read; change one that exists."""
    path.touch(mode=0o600)
    path.chmod(0o600)


def make_tree_private(directory: Path) -> None:
    """Change a directory and everything in it."""
    directory.chmod(0o700)
    for path in directory.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)
