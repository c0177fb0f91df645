"""The KV cache of a batch: one tensor of keys and one of values for each layer, with one slot for each sequence.

Slots 0 to R - 1 are in use, without gaps, so that a decoding step works on a slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

__all__ = ["KvCache", "contents"]

_LENGTH_STEP = 128


def contents(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values (rows, heads, length, width) of each layer after a prefill."""
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


class KvCache:
    """A cache that grows with the number and the length of the sequences."""

    def __init__(self) -> None:
        self._layers: list[_Layer] = []
        self._lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, prefilled: DynamicCache, row: int, length: int) -> None:
        """Copy a row of a prefill, whose first `length` positions are its prompt, into the next slot."""
        filled = contents(prefilled)
        if not self._layers:
            self._layers = [_Layer(keys, values) for keys, values in filled]
        slot = len(self)
        for layer, (keys, values) in zip(self._layers, filled, strict=True):
            layer.reserve(slot + 1, length + 1, used=slot)
            layer.k[slot, :, :length] = keys[row, :, :length]
            layer.v[slot, :, :length] = values[row, :, :length]
        self._lengths.append(length)

    def remove(self, slot: int) -> None:
        """Free a slot; the sequence of the last slot moves into it."""
        last = len(self) - 1
        length = self._lengths[last]
        if slot != last:
            for layer in self._layers:
                layer.k[slot, :, :length] = layer.k[last, :, :length]
                layer.v[slot, :, :length] = layer.v[last, :, :length]
        self._lengths[slot] = length
        self._lengths.pop()
        if not self._lengths:
            self._layers = []

    def next(self) -> dict[str, Any]:
        """Add one position to every slot; return the arguments with which `Base.hidden` fills it."""
        positions = torch.tensor(self._lengths)
        self._lengths = [length + 1 for length in self._lengths]
        longest = max(self._lengths)
        for layer in self._layers:
            layer.reserve(len(self), longest, used=len(self))
            layer.positions, layer.length = positions, longest
        seen = torch.arange(longest) <= positions[:, None]
        return {
            "position_ids": positions[:, None],
            "attention_mask": seen[:, None, None],
            "cache": Cache(layers=[*self._layers]),
        }


class _Layer(CacheLayerMixin):
    """Keys and values (slots, heads, length, width) of one layer; each row is written at its own position."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        CacheLayerMixin.__init__(self)
        # The parent's `keys` and `values` may be None; these are always tensors.
        self.k = keys.new_empty(0, keys.shape[1], 0, keys.shape[3])
        self.v = values.new_empty(0, values.shape[1], 0, values.shape[3])
        self.is_initialized = True
        self.positions = torch.empty(0, dtype=torch.int64)
        self.length = 0

    def reserve(self, rows: int, length: int, *, used: int) -> None:
        """Grow to this size; the content of the first `used` slots is kept."""
        slots, _, capacity, _ = self.k.shape
        if rows <= slots and length <= capacity:
            return
        slots = slots if rows <= slots else 1 << (rows - 1).bit_length()
        capacity = capacity if length <= capacity else -(-length // _LENGTH_STEP) * _LENGTH_STEP
        self.k = _grown(self.k, slots, capacity, used)
        self.v = _grown(self.v, slots, capacity, used)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one position of every row, and return all positions that attention may use."""
        rows = torch.arange(len(self.positions))
        self.k[rows, :, self.positions] = key_states[:, :, 0]
        self.v[rows, :, self.positions] = value_states[:, :, 0]
        used = slice(len(rows)), slice(None), slice(self.length)
        return self.k[used], self.v[used]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the layer is initialized by its constructor")


def _grown(old: Tensor, slots: int, length: int, used: int) -> Tensor:
    new = old.new_empty(slots, old.shape[1], length, old.shape[3])
    # Unused positions are multiplied by weights of zero, where an old NaN would spread.
    new.zero_()
    new[:used, :, : old.shape[2]] = old[:used]
    return new
