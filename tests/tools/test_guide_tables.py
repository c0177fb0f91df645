"""The guides show the tables that the code has."""

from __future__ import annotations

import pytest

from loops_async import errors
from loops_async.protocol import LOSSES
from tools import guide_tables


@pytest.mark.parametrize("name", guide_tables.PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    page = guide_tables.path_of(name).read_text()
    assert page == guide_tables.written(name, page), "run python tools/guide_tables.py"


def test_every_loss_and_every_setting_has_a_line() -> None:
    assert [row[0] for row in guide_tables.loss_inputs()[1:]] == [f"`{name}`" for name in LOSSES]
    settings = {name for rule in LOSSES.values() for name in rule.settings}
    assert {row[1] for row in guide_tables.loss_settings()[1:]} == {f"`{name}`" for name in settings}


def test_every_error_has_a_line_below_its_kind() -> None:
    rows = [row[0] for row in guide_tables.error_tree()[1:]]
    kinds = {name for name in errors.__all__ if issubclass(getattr(errors, name), errors.LoopsError)}
    assert sorted(row.lstrip("· ").strip("`") for row in rows) == sorted(kinds)
    at = rows.index("· · `RequestTimeoutError`")
    assert rows[at + 1] == "· · · `SampleTimeoutError`"
