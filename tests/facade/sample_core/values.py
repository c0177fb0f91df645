"""Values, the same on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Level", "Report"]

Level: TypeAlias = Literal["low", "high"]


@dataclass(frozen=True)
class Report:
    """What a worker has done."""

    text: str
