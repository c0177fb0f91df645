"""Which kind a value of unknown type is, told so that type checkers also know what its items are: anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

__all__ = ["dict_or_empty", "is_dict", "is_iterable", "is_list", "is_mapping"]


def is_dict(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a dict, e.g. an object of decoded JSON."""
    return isinstance(value, dict)


def dict_or_empty(value: Any) -> dict[str, Any]:
    """Return a dict as it is, and an empty one for anything else."""
    return value if is_dict(value) else {}


def is_iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether a value can be iterated over."""
    return isinstance(value, Iterable)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value is a list."""
    return isinstance(value, list)


def is_mapping(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is a dict or another mapping, e.g. a row of a table."""
    return isinstance(value, Mapping)
