"""Write the table of what is repeated into docs/reliability.md, from the one in `loops_async._http.retry`.

Usage: python tools/retry_table.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from loops_async._http.retry import CALLS, Failure, RetryPolicy

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- table of loops_async._http.retry -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """Return the table in Markdown."""
    head = ["call", *(failure.value for failure in Failure)]
    rows = [[call.name, *(cell(call.policy(failure)) for failure in Failure)] for call in CALLS]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(policy: RetryPolicy | None) -> str:
    """Return what is done after failures of one kind."""
    return "raised at once" if policy is None else f"{policy.seconds:g} s, {policy.tries} tries"


def written(page: str) -> str:
    """Return the page with the table as it is now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write the page, or check it, and return the exit code."""
    page = PAGE.read_text()
    if "--check" in sys.argv[1:]:
        if page != written(page):
            print(f"{PAGE.name}: its table is not that of the code; run python tools/retry_table.py")
            return 1
        return 0
    PAGE.write_text(written(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
