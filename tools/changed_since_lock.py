"""Print the packages of this environment whose versions differ from the lock.

Usage: python tools/changed_since_lock.py locks/dev.txt
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def changes(lock: str, installed: dict[str, str]) -> list[str]:
    """Return a line for each package whose installed version is not in the lock."""
    locked: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE):
        locked.setdefault(name, []).append(version)
    return [
        f"{name} {version} (locked: {' or '.join(locked.get(name, ['not at all']))})"
        for name, version in sorted(installed.items())
        if version not in locked.get(name, [])
    ]


def main() -> None:
    """Compare the running interpreter's environment with the lock in the argument."""
    installed = {re.sub(r"[-_.]+", "-", each.name).lower(): each.version for each in distributions()}
    ours = {"loops-async", "pip", "torch"}
    found = changes(Path(sys.argv[1]).read_text(), {name: installed[name] for name in installed.keys() - ours})
    print("\n".join(found) or "nothing changed since the lock")


if __name__ == "__main__":
    main()
