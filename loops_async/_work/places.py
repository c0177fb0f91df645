"""Where a program is: the places in its own code, not in ours or Python's."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import FrameType
from typing import Any, Final

MOST_PLACES: Final = 4

_FOREIGN: Final = (
    str(Path(os.__file__).parent),  # Python's own modules
    *(str(Path(__file__).parents[2] / name) for name in ("loops_async", "loops_sync")),
    "<frozen",
)
_LIBRARIES: Final = ("site-packages", "dist-packages")


def place_of(task: asyncio.Task[Any] | None) -> str | None:
    """Return where the program's own code of a task waits, e.g. ``train (/home/me/train.py:12)``."""
    frames = [] if task is None else _awaiting(task.get_coro())
    own = [frame for frame in frames if is_own(frame)]
    return place(own[-1]) if own else None


def stack_of(frame: FrameType | None) -> list[str]:
    """Return the places of a running frame: the innermost one of the program's own code, and its callers there."""
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return [place(each) for each in frames if is_own(each)][:MOST_PLACES]


def is_own(frame: FrameType) -> bool:
    """Whether a frame is of the program, and not of Python, a library or ours."""
    file = frame.f_code.co_filename
    return not file.startswith(_FOREIGN) and not any(name in file for name in _LIBRARIES)


def place(frame: FrameType) -> str:
    """Return the place of a frame as text."""
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _awaiting(awaited: Any) -> list[FrameType]:
    """Return the frames of a suspended coroutine, and of what it awaits in turn."""
    frames: list[FrameType] = []
    while awaited is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaited, f"{kind}_frame", None)
            if frame is not None:
                frames.append(frame)
                break
        else:
            return frames
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await", None)
    return frames
