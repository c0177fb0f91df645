"""Several adapters in one batch: their ranks side by side, and a gate that lets each row use only its own.

With A = [A1; A2], B = [B1 B2] and a row's gate zero outside its own ranks, B (gate * A x) is exactly its own
adapter's term. That is one product for the whole batch, whatever the ranks, and rows of the base model have a gate of
zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .adapter import LoraAdapter
from .lora import Active, Pair

__all__ = ["Mixer"]


class Mixer:
    """Makes what a batch's rows use, and keeps the weights that it put together while the same adapters are in use."""

    def __init__(self) -> None:
        self._adapters: list[LoraAdapter] = []
        self._weights: dict[str, Pair] = {}

    def mix(self, rows: Sequence[LoraAdapter | None]) -> Active | None:
        """Return what these rows add to the base; None where all are the base itself."""
        distinct = sorted({id(row): row for row in rows if row is not None}.values(), key=id)
        if distinct != self._adapters:
            self._adapters, self._weights = distinct, _side_by_side(distinct)
        if not distinct:
            return None
        if len(distinct) == 1 and None not in rows:
            return Active(self._weights, distinct[0].scale)
        return Active(self._weights, torch.stack([self._gate(row) for row in rows])[:, None])

    def _gate(self, row: LoraAdapter | None) -> torch.Tensor:
        return torch.cat([torch.full((own.rank,), own.scale if own is row else 0.0) for own in self._adapters])


def _side_by_side(adapters: Sequence[LoraAdapter]) -> dict[str, Pair]:
    if len(adapters) < 2:
        return adapters[0].weights if adapters else {}
    mixed: dict[str, Pair] = {}
    for name in adapters[0].weights:
        a, b = zip(*(adapter.weights[name] for adapter in adapters), strict=True)
        mixed[name] = torch.cat(a), torch.cat(b, dim=1)
    return mixed
