"""Which warnings are errors, in the tests and in the programs that they start."""

from __future__ import annotations

import os
from typing import Final

TOLERATED: Final = (
    ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
    if os.environ.get("LOOPS_TOLERATE_DEPRECATIONS")
    else ()
)
"""CI sets the variable where the versions are not the locked ones: there, libraries may announce changes."""

WARNINGS: Final = ["-W", "error", *(option for name in TOLERATED for option in ("-W", f"default::{name}"))]
"""Options of a Python that treats warnings as the tests do."""
