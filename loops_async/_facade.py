"""Marks that the generator of the blocking twin reads; they change nothing here."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def blocking_property(method: T) -> T:
    """Mark a coroutine method without arguments whose blocking twin is a property."""
    return method
