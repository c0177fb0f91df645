"""Cut a release: set the version and the changelog's heading together, commit and tag.

Usage: python tools/release.py 1.2.3
"""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

UNRELEASED = "## [Unreleased]\n"


def released(changelog: str, version: str, day: str) -> str:
    """Return the changelog with its unreleased notes under `version`, and an empty heading for later notes."""
    before, heading, notes = changelog.partition(UNRELEASED)
    if not heading or not notes.partition("\n## ")[0].strip():
        raise SystemExit("error: CHANGELOG.md has nothing under '## [Unreleased]'")
    return f"{before}{UNRELEASED}\n## [{version}] - {day}\n{notes}"


def main(arguments: list[str]) -> None:
    """Write both files and commit them."""
    if len(arguments) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", arguments[0]):
        raise SystemExit("usage: make release VERSION=1.2.3")
    [version] = arguments
    if subprocess.run(["git", "status", "--porcelain"], check=True, capture_output=True).stdout:
        raise SystemExit("error: commit your changes first")
    changelog, source = Path("CHANGELOG.md"), Path("loops_async/_version.py")
    changelog.write_text(released(changelog.read_text(), version, datetime.now(UTC).date().isoformat()))
    source.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', source.read_text()))
    subprocess.run(["git", "commit", "--quiet", "--all", "--message", f"Release {version}"], check=True)
    subprocess.run(["git", "tag", f"v{version}"], check=True)
    print(f"committed and tagged v{version}; review it, then: make dist, git push --tags, twine upload dist/*")


if __name__ == "__main__":
    main(sys.argv[1:])
