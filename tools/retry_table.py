"""Write the table of what is repeated into docs/reliability.md, from the one in `loops_async._http.retry`.

Usage: python tools/retry_table.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - found in ROOT
from loops_async._http.retry import CALLS, Failure, RetryPolicy
from tools import tables_in_pages
from tools.tables_in_pages import replaced, write_or_check

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table of loops_async._http.retry -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """Return the table in Markdown."""
    head = ["call", *(failure.value for failure in Failure)]
    return tables_in_pages.table(
        [head, *([call.name, *(cell(call.policy(failure)) for failure in Failure)] for call in CALLS)]
    )


def cell(policy: RetryPolicy | None) -> str:
    """Return what is done after failures of one kind."""
    return "raised at once" if policy is None else f"{policy.seconds:g} s, {policy.tries} tries"


def written(page: str) -> str:
    """Return the page with the table as it is now."""
    return replaced(page, BEGIN, END, table())


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, written))
