"""Text of others, before it is shown."""

from __future__ import annotations

import json

import pytest

from loops_async._text import one_line, visible, visible_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, caf\u00e9, \u65e5\u672c, \U0001f469\u200d\U0001f4bb", None),
        ("two\n\tlines", None),
        ("two\r\nlines", "two\nlines"),
        ("over\rwritten", r"over\rwritten"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("\x00\x08\x7f", r"\x00\x08\x7f"),
        ("\u202egnp.exe\u2069", r"\u202egnp.exe\u2069"),
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("\ud83d", r"\ud83d"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_unseen_characters_are_made_visible(text: str, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown)


def test_one_line() -> None:
    assert one_line("a\r\n b\u2028c\x1b\t\n", 20) == r"a b c\x1b"
    assert one_line("x" * 10, 10) == "x" * 10
    assert one_line("x" * 11, 10) == "x" * 9 + "\u2026"


def test_json_means_the_same() -> None:
    value = {"name": "\x1b[2J\x9b\x7f\u202e\U000e0041 caf\u00e9"}
    shown = visible_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(shown) == value
    assert "caf\u00e9" in shown
    assert visible(shown) == shown
