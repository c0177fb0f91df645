"""Text of others, made harmless: a service may send anything, and it ends in terminals and in lines of logs."""

from __future__ import annotations

import json
import re
from typing import Final

_UNSEEN: Final = re.compile(
    # Control characters without \t and \n: they move the cursor, clear the screen, set the title, ...
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    # Marks and overrides of the writing direction: they show a text in another order than it has.
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    # Characters without width, and halves of surrogate pairs, which cannot be written at all.
    "\u00ad\u200b\u2060-\u2065\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Return `text` with all unseen characters as their escapes, e.g. ``\x1b``; line breaks and tabs stay."""
    return _UNSEEN.sub(lambda unseen: unseen[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def one_line(text: str, most: int) -> str:
    """Return at most `most` characters of `text` in one line, with the same escapes."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def visible_json(text: str) -> str:
    """Return the same JSON with all unseen characters escaped."""
    return _UNSEEN.sub(lambda unseen: json.dumps(unseen[0])[1:-1], text)
