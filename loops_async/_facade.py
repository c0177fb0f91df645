"""Marks for `tools/gen_sync.py`, which writes `loops_sync` from this package. They change nothing here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def blocking_property(method: F) -> F:
    """Mark a coroutine method without arguments that is a property in `loops_sync`, asking anew at each access."""
    return method
