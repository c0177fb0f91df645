"""Everything that an error could show to anybody."""

from __future__ import annotations

import pickle
import traceback
from typing import Any


def all_that_it_shows(error: BaseException) -> str:
    """Return the text of an error, of its fields, its notes, its pickle and of every error that it hangs on."""
    seen: list[BaseException] = []
    shown: list[str] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        shown += [str(one), repr(one), repr(one.args), repr(_fields(one))]
        waiting += [one.__cause__, one.__context__]
    shown += traceback.format_exception(error)
    shown.append(pickle.dumps(error).decode("latin-1"))
    return "\n".join(shown)


def _fields(error: BaseException) -> dict[str, Any]:
    return dict(getattr(error, "__dict__", {}))
