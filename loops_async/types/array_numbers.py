"""Numbers that stay a numpy array until they are read or encoded.

Making Python numbers of a large batch takes longer than all else that happens to it, and would hold the event loop of a
caller who makes its datums there. So a field that was given an array holds an `ArrayNumbers`, which an encoder turns
into a list, one tensor at a time, and which becomes a list for good when a program reads the field.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Final

from msgspec import Struct

__all__ = ["ArrayNumbers", "array_numbers", "keep_arrays", "kept_numbers"]

_KINDS: Final = "iufb"
"""Of numpy's dtypes: integers, floats and bools."""


class ArrayNumbers:
    """A flat copy of an array, with what is needed of a list while it is no list."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array: Any = array.flatten()  # always a copy, in row-major order

    def tolist(self) -> list[Any]:
        """Return the numbers as Python numbers."""
        numbers: list[Any] = self.array.tolist()
        return numbers

    def count(self, number: float) -> int:
        """Return how many are equal to `number`."""
        return int((self.array == number).sum())

    def are_integers(self) -> bool:
        return self.array.dtype.kind in "iu"

    def lie_within(self, least: float, most: float) -> bool:
        """Whether all are numbers from `least` to `most`; NaN is not."""
        return least <= float(self.array.min()) and float(self.array.max()) <= most

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Any:
        return self.array[index].item()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return self.tolist() == (other.tolist() if isinstance(other, ArrayNumbers) else other)

    def __repr__(self) -> str:
        return repr(self.tolist())

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self.tolist(),)


def array_numbers(value: Any) -> ArrayNumbers | None:
    """Return the numbers of a numpy array that has any; None for anything else. It does not import numpy."""
    numpy = sys.modules.get("numpy")
    # Not its subclasses: a masked array means something else.
    if numpy is None or type(value) is not numpy.ndarray or value.dtype.kind not in _KINDS or not value.size:
        return None
    return ArrayNumbers(value) if value.shape else None


def keep_arrays(kind: type[Struct], field: str) -> None:
    """Let a field of `kind` hold an `ArrayNumbers`, which is a list to all who read the field.

    msgspec reads and writes the slot itself, so it sees what is held, and gives it to the hook of an encoder.
    """
    slot: Any = vars(kind)[field]

    def read(struct: Any) -> Any:
        held = slot.__get__(struct)
        if type(held) is ArrayNumbers:
            held = held.tolist()
            slot.__set__(struct, held)
        return held

    _SLOTS[kind, field] = slot
    setattr(kind, field, property(read, slot.__set__))


def kept_numbers(struct: Struct, field: str) -> Any:
    """Return what a field holds, an `ArrayNumbers` or a list, and leave it as it is."""
    return _SLOTS[type(struct), field].__get__(struct)


_SLOTS: Final[dict[tuple[type[Struct], str], Any]] = {}
