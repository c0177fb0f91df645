"""The attention of the engine's networks: transformers' own, but a layer of the sampler's cache attends by itself.

A batch that decodes has sequences of very different lengths, and groups that share a prompt. Transformers' attention
would read every sequence up to the longest length, and the prompt once for each sequence of the group.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["NAME", "CachedLayer", "next_layer"]

NAME = "loops"
"""The name under which transformers knows this attention."""


class CachedLayer(Protocol):
    """A layer of a cache that computes the attention to what it holds."""

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Return (rows, heads, count, width) for queries of that shape."""


class _Next(threading.local):
    layer: CachedLayer | None = None


_next = _Next()


def next_layer(layer: CachedLayer | None) -> None:
    """Let `layer` compute the next attention in this thread; a model updates its cache just before it attends."""
    _next.layer = layer


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    layer, _next.layer = _next.layer, None
    if layer is None:
        plain: tuple[Tensor, Tensor | None]
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return plain
    attended = layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return attended.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
