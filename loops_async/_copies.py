"""What a copy of a client is."""

from __future__ import annotations

from typing import Any, Self


class SameWhenCopied:
    """`copy.copy`, `copy.deepcopy` and `dataclasses.asdict` return the object itself: connections have no copies."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
