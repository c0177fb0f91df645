"""Time limits that end at an event, so that what they leave time for does not depend on the machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loops_async._waiting import TimeLimit

LOOK_SECONDS = 0.005


def expire_when(condition: Callable[[], object], patch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """Let time limits of `seconds` expire as soon as the condition holds, and not before."""
    start = TimeLimit._start

    def start_watching(limit: TimeLimit, left: float) -> None:
        start(limit, left)
        if limit.seconds == seconds:
            look(limit)

    def look(limit: TimeLimit) -> None:
        assert limit._timer is not None
        limit._timer.cancel()
        if condition():
            limit._due = limit._loop.time()
            limit._timer = limit._loop.call_soon(limit._ring)
        else:
            limit._timer = limit._loop.call_later(LOOK_SECONDS, look, limit)

    patch.setattr(TimeLimit, "_start", start_watching)
