"""Several adapters in one batch: their ranks are concatenated, and a gate lets each row use only its own adapter.

With A = [A1; A2], B = [B1 B2] and a gate that is zero outside a row's own ranks, B (gate * A x) is exactly the term of
the row's own adapter. This is one product for the whole batch, also for different ranks. The gate of a row of the base
model is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .adapter import LoraAdapter
from .lora import Active, Pair
from .models import Base

__all__ = ["AdapterBatch"]


class AdapterBatch:
    """Concatenates the adapters of a batch, and keeps the result while the same adapters are used."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._adapters: list[LoraAdapter] = []
        self._weights: Mapping[str, Pair] = {}

    def combine(self, rows: Sequence[LoraAdapter | None]) -> Active | None:
        """Return the term of these rows; None if all of them use the base model."""
        distinct = sorted({id(row): row for row in rows if row is not None}.values(), key=id)
        if distinct != self._adapters:
            self._adapters, self._weights = distinct, self._base.active(_concatenated(distinct), 1.0).weights
        if not distinct:
            return None
        if len(distinct) == 1 and None not in rows:
            return Active(self._weights, distinct[0].scale)
        gate = torch.stack([self._gate(row) for row in rows])[:, None]
        return Active(self._weights, gate.to(self._base.device, self._base.dtype))

    def _gate(self, row: LoraAdapter | None) -> torch.Tensor:
        return torch.cat([torch.full((own.rank,), own.scale if own is row else 0.0) for own in self._adapters])


def _concatenated(adapters: Sequence[LoraAdapter]) -> dict[str, Pair]:
    if len(adapters) < 2:
        return adapters[0].weights if adapters else {}
    combined: dict[str, Pair] = {}
    for name in adapters[0].weights:
        a, b = zip(*(adapter.weights[name] for adapter in adapters), strict=True)
        combined[name] = torch.cat(a), torch.cat(b, dim=1)
    return combined
