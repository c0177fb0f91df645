"""The KV cache of a batch, in which each sequence takes the memory and the time of its own length.

A sequence is in a block of sequences whose capacity is the next size above its length, and moves to another block when
it has grown. Sequences that start with the same prefix can share its keys and values, which are then stored and read
once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention import next_layer

__all__ = ["KvCache", "Prefill", "Prefix", "capacity", "contents"]

SMALLEST_CAPACITY = 32

_T = TypeVar("_T")

_KeysValues: TypeAlias = "list[tuple[Tensor, Tensor]]"


@dataclass(frozen=True, eq=False)
class Prefix:
    """The keys and values (heads, length, width) of each layer for some tokens, and the last token's hidden state."""

    layers: _KeysValues
    last: Tensor

    def __len__(self) -> int:
        return self.layers[0][0].shape[1]

    @classmethod
    def of(cls, cache: Cache, row: int, length: int, last: Tensor) -> Prefix:
        """Copy the first `length` positions of a row of a prefill."""
        layers = [(keys[row, :, :length].clone(), values[row, :, :length].clone()) for keys, values in contents(cache)]
        return cls(layers, last.clone())

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer) + self.last.nbytes


def contents(cache: Cache) -> _KeysValues:
    """Return the keys and values (rows, heads, length, width) of each layer after a prefill."""
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


class Prefill:
    """The keys and values of rows whose prompts are computed together, in one pass or in several.

    Args:
        positions: the length of the longest row.
        prefixes: what the rows have already: each its first `done` positions.
        done: the number of positions that are computed.
    """

    def __init__(self, positions: int, prefixes: Sequence[Prefix | None] = (), done: int = 0) -> None:
        self.done: int = done
        self.positions = positions
        self.mask: Tensor | None = None
        """(count, length): what to add to the scores of the next positions; None in the first pass."""
        # Declared as a class, and only called.
        self.cache: Cache = Cache(layer_class_to_replicate=cast("Any", partial(_PrefillLayer, self)))
        if done:
            own = zip(*(prefix.layers for prefix in prefixes if prefix), strict=True)
            for index, rows in enumerate(own):
                keys, values = (torch.stack([part[:, :done] for part in parts]) for parts in zip(*rows, strict=True))
                self.cache.update(keys, values, index)

    def next(self, count: int) -> dict[str, Any]:
        """Return the arguments with which `Base.hidden` computes the next `count` positions of all rows."""
        next_layer(None)
        done, self.done = self.done, self.done + count
        if not done:
            return {"cache": self.cache}
        like = contents(self.cache)[0][0]
        at = torch.arange(done, self.done, device=like.device)
        unseen = torch.arange(self.done, device=like.device) > at[:, None]
        self.mask = like.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        return {
            "cache": self.cache,
            "position_ids": at[None],
            # Not read, since these layers attend by themselves; without it, transformers would build one.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        }


class KvCache(Generic[_T]):
    """The sequences that are under way, each with the object that the caller knows it by.

    Each object occurs once. Its sequence has a shared prefix, or none, and its own positions after that.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[Prefix | None, int], _Block[_T]] = {}

    def __len__(self) -> int:
        return sum(len(block.rows) for block in self._blocks.values())

    def add(self, row: _T, prefix: Prefix, *, shared: bool) -> None:
        """Start a sequence with a prefix: shared with other sequences, or copied to its own positions."""
        if shared:
            self._block(prefix, 0, like=prefix.layers).append(row, prefix.layers, 0)
        else:
            self._block(None, len(prefix), like=prefix.layers).append(row, prefix.layers, len(prefix))

    def sharing(self, prefix: Prefix) -> bool:
        """Return whether a sequence shares this prefix."""
        return any(shared is prefix for shared, _ in self._blocks)

    def remove(self, rows: Sequence[_T]) -> None:
        """Free the memory of these sequences."""
        gone = {id(row) for row in rows}
        for key, block in [*self._blocks.items()]:
            for slot in reversed([slot for slot, row in enumerate(block.rows) if id(row) in gone]):
                block.remove(slot)
            if not block.rows:
                del self._blocks[key]

    def positions(self) -> int:
        """Return the positions that the next step needs memory for; that of a shared prefix counts once."""
        prefixes = {prefix for prefix, _ in self._blocks if prefix is not None}
        own = sum(capacity(length + 1) for block in self._blocks.values() for length in block.lengths)
        return sum(map(len, prefixes)) + own

    def next(self) -> tuple[list[_T], dict[str, Any]]:
        """Add one position to every sequence.

        Returns:
            The objects of the sequences, in the order of the batch, and the arguments with which `Base.hidden` fills
            the new positions.
        """
        for full in [block for block in self._blocks.values() if max(block.lengths) == block.capacity]:
            self._move_full(full)
        blocks = [*self._blocks.values()]
        next_layer(None)
        steps = [block.step() for block in blocks]
        layers = [_Layer(index, steps) for index in range(len(blocks[0].layers))]
        positions = torch.cat([step.positions for step in steps])
        return [row for block in blocks for row in block.rows], {
            "position_ids": positions[:, None],
            # Not read, since these layers attend by themselves; without it, transformers would build one.
            "attention_mask": positions.new_ones(len(positions), 1, 1, 1, dtype=torch.bool),
            "cache": Cache(layers=[*layers]),
        }

    def _block(self, prefix: Prefix | None, length: int, *, like: _KeysValues) -> _Block[_T]:
        key = prefix, capacity(length + 1)
        if key not in self._blocks:
            self._blocks[key] = _Block(*key, like)
        return self._blocks[key]

    def _move_full(self, block: _Block[_T]) -> None:
        """Move the sequences that have no position left to the next size."""
        for slot in reversed([slot for slot, length in enumerate(block.lengths) if length == block.capacity]):
            length = block.lengths[slot]
            own = [(k[slot], v[slot]) for k, v in block.layers]
            self._block(block.prefix, length, like=own).append(block.rows[slot], own, length)
            block.remove(slot)
        if not block.rows:
            del self._blocks[block.prefix, block.capacity]


def capacity(length: int) -> int:
    """Return the size of the block for a sequence with `length` own positions: 32, 48, 64, 96, 128, 192, ..."""
    size = max(SMALLEST_CAPACITY, 1 << (length - 1).bit_length())
    return size * 3 // 4 if size > SMALLEST_CAPACITY and length <= size * 3 // 4 else size


class _Block(Generic[_T]):
    """Sequences of one capacity and one shared prefix, in slots 0 to R - 1 of one tensor pair for each layer."""

    def __init__(self, prefix: Prefix | None, capacity: int, like: _KeysValues) -> None:
        self.prefix = prefix
        self.capacity = capacity
        self.rows: list[_T] = []
        self.lengths: list[int] = []
        # Unused positions are multiplied by weights of zero, where a NaN would spread; so memory is always zeroed.
        self.layers = [
            (k.new_zeros(0, k.shape[0], capacity, k.shape[2]), v.new_zeros(0, v.shape[0], capacity, v.shape[2]))
            for k, v in like
        ]

    def append(self, row: _T, source: _KeysValues, length: int) -> None:
        """Add a sequence whose own positions are the first `length` of `source`."""
        slot = len(self.rows)
        if slot == len(self.layers[0][0]):
            self.layers = [(_doubled(k), _doubled(v)) for k, v in self.layers]
        for (k, v), (keys, values) in zip(self.layers, source, strict=True):
            if length:
                k[slot, :, :length] = keys[:, :length]
                v[slot, :, :length] = values[:, :length]
        self.rows.append(row)
        self.lengths.append(length)

    def remove(self, slot: int) -> None:
        """Free a slot; the sequence of the last slot moves into it."""
        last = len(self.rows) - 1
        length = self.lengths[last]
        if slot != last:
            for k, v in self.layers:
                k[slot, :, :length] = k[last, :, :length]
                v[slot, :, :length] = v[last, :, :length]
        self.rows[slot], self.lengths[slot] = self.rows[last], length
        self.rows.pop()
        self.lengths.pop()
        slots = len(self.layers[0][0])
        if len(self.rows) * 4 <= slots:
            self.layers = [(k[: slots // 2].clone(), v[: slots // 2].clone()) for k, v in self.layers]

    def step(self) -> _Step:
        """Add one position to every sequence."""
        k = self.layers[0][0]
        at = torch.tensor(self.lengths, device=k.device)
        self.lengths = [length + 1 for length in self.lengths]
        longest = max(self.lengths)
        unseen = torch.arange(longest, device=k.device) > at[:, None]
        mask = k.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None, None]
        return _Step(self.prefix, self.layers, at, mask)


@dataclass(eq=False)
class _Step:
    """One decoding step of a block: R sequences get a token at their own positions `at`."""

    prefix: Prefix | None
    layers: _KeysValues
    at: Tensor
    mask: Tensor
    """(R, 1, 1, longest): what to add to the scores, so that a sequence sees its own positions only."""
    slots: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.slots = torch.arange(len(self.at), device=self.at.device)

    @property
    def positions(self) -> Tensor:
        return self.at + (0 if self.prefix is None else len(self.prefix))

    def write(self, index: int, key: Tensor, value: Tensor) -> None:
        """Store the keys and values (R, heads, width) of the new tokens in a layer."""
        k, v = self.layers[index]
        k[self.slots, :, self.at] = key
        v[self.slots, :, self.at] = value

    def attend(self, index: int, query: Tensor) -> Tensor:
        """Attend with scaled queries (R, heads of the keys, queries of each head, width)."""
        rows, longest = len(self.at), self.mask.shape[-1]
        k, v = (part[:rows, :, :longest] for part in self.layers[index])
        scores = query @ k.transpose(2, 3) + self.mask
        if self.prefix is None:
            return scores.softmax(-1) @ v
        # One product for all sequences: their queries are the rows of one matrix, and the prefix is read once.
        keys, values = self.prefix.layers[index]
        shared = _split(_joined(query) @ keys.transpose(1, 2), rows)
        of_prefix, of_own = torch.cat([shared, scores], -1).softmax(-1).split([len(self.prefix), longest], -1)
        attended: Tensor = _split(_joined(of_prefix) @ values, rows) + of_own @ v
        return attended


def _joined(parts: Tensor) -> Tensor:
    """(rows, heads, queries, n) to (heads, rows * queries, n)."""
    return parts.transpose(0, 1).flatten(1, 2)


def _split(parts: Tensor, rows: int) -> Tensor:
    """The reverse of `_joined`."""
    split: Tensor = parts.unflatten(1, (rows, -1)).transpose(0, 1)
    return split


class _OwnLayer(CacheLayerMixin):  # type: ignore[misc]  # mypy does not read transformers
    """One layer of a cache, as transformers sees it: it does not ask about lengths, since positions are given."""

    is_sliding = False

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the layer is initialized by its constructor")


class _PrefillLayer(_OwnLayer):
    """One layer of a prefill. The first pass attends as transformers does, later ones to what is stored."""

    keys: Tensor
    values: Tensor

    def __init__(self, prefill: Prefill) -> None:
        _OwnLayer.__init__(self)
        self._prefill = prefill
        self._stored: tuple[Tensor, Tensor] | None = None
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new positions; if a mask is given, the attention that follows is `attend`."""
        keys, values = self._stored = self._stored or (self._empty(key_states), self._empty(value_states))
        start, self._length = self._length, self._length + key_states.shape[2]
        keys[:, :, start : self._length] = key_states
        values[:, :, start : self._length] = value_states
        self.keys, self.values = keys[:, :, : self._length], values[:, :, : self._length]
        if self._prefill.mask is not None:
            next_layer(self)
        return key_states, value_states

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        rows, heads, count, width = query.shape
        groups = heads // self.keys.shape[1]
        # The queries that share keys are rows of one matrix, so that the keys are not copied for each of them.
        joined = query.reshape(rows, -1, groups * count, width)
        mask = None if self._prefill.mask is None else self._prefill.mask.repeat(groups, 1)
        attended = scaled_dot_product_attention(joined, self.keys, self.values, attn_mask=mask, scale=scaling)
        return attended.reshape(rows, heads, count, -1)

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:2], self._prefill.positions, like.shape[3])


class _Layer(_OwnLayer):
    """One layer of a decoding step."""

    def __init__(self, index: int, steps: Sequence[_Step]) -> None:
        _OwnLayer.__init__(self)
        self._index = index
        self._steps = steps
        self._rows = [len(step.at) for step in steps]
        self._heads = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one position of every sequence; the attention that follows is `attend`."""
        self._heads = key_states.shape[1]
        keys, values = key_states[:, :, 0].split(self._rows), value_states[:, :, 0].split(self._rows)
        for step, key, value in zip(self._steps, keys, values, strict=True):
            step.write(self._index, key, value)
        next_layer(self)
        return key_states, value_states

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        rows, heads, _, _ = query.shape
        queries = (query * scaling).view(rows, self._heads, heads // self._heads, -1).split(self._rows)
        attended = [step.attend(self._index, part) for step, part in zip(self._steps, queries, strict=True)]
        return torch.cat(attended).reshape(rows, heads, 1, -1)


def _doubled(old: Tensor) -> Tensor:
    return torch.cat([old, torch.zeros_like(old) if len(old) else old.new_zeros(1, *old.shape[1:])])
