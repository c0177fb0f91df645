"""The page on reliability shows the table that the code has."""

from __future__ import annotations

from loops_async._http.retry import CALLS
from tools import retry_table


def test_the_page_is_up_to_date() -> None:
    page = retry_table.PAGE.read_text()
    assert page == retry_table.written(page), "run python tools/retry_table.py"


def test_every_kind_of_call_has_a_line() -> None:
    lines = retry_table.table().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [call.name for call in CALLS]
    assert "| raised at once |" in lines[3]
