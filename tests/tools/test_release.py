"""What `make release` makes of the changelog, and what CI says of versions that are not the locked ones."""

from __future__ import annotations

import pytest

from tools.changed_since_lock import changes
from tools.release import released

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- New.\n\n## [0.1.0] - 2026-01-01\n\n- Old.\n"


def test_notes_move_under_their_version() -> None:
    after = released(CHANGELOG, "0.2.0", "2026-02-03")
    assert after == CHANGELOG.replace("## [Unreleased]\n", "## [Unreleased]\n\n## [0.2.0] - 2026-02-03\n")


@pytest.mark.parametrize("text", ["# Changelog\n", "## [Unreleased]\n\n## [0.1.0] - 2026-01-01\n\n- Old.\n"])
def test_nothing_to_release(text: str) -> None:
    with pytest.raises(SystemExit, match="nothing under"):
        released(text, "0.2.0", "2026-02-03")


def test_versions_that_are_not_the_locked_ones() -> None:
    lock = "a==1.0 ; python_version < '3.12' \\\n    --hash=sha256:0\na==1.1 ; python_version >= '3.12' \\\nb==2 \\\n"
    assert changes(lock, {"a": "1.1", "b": "2"}) == []
    assert changes(lock, {"a": "1.2", "b": "2", "c": "3"}) == [
        "a 1.2 (locked: 1.0 or 1.1)",
        "c 3 (locked: not at all)",
    ]
