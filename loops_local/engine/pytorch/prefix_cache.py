"""Prompts whose keys and values are kept for later requests: samples of one group, and turns of one conversation."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from .adapter import LoraAdapter
from .kv_cache import Prefix

__all__ = ["PrefixCache"]

MAX_PREFIXES = 256
"""The largest number of prompts, since each look-up compares with all of them."""

SHORTEST_REUSE = 16
"""Fewer positions are not reused, because prompts are faster together in one pass than each after its own prefix."""


class PrefixCache:
    """Keeps the most recently used prompts of each adapter, up to a number of bytes.

    A prompt belongs to the adapter object that computed it, so the next version of the weights never gets it. The cache
    does not keep adapters alive.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self.nbytes: int = 0

    def find(self, adapter: LoraAdapter | None, tokens: Sequence[int]) -> tuple[Prefix | None, int]:
        """Return the prefix that has most of these tokens, and how many it has.

        All of them only if the prefix ends there; otherwise at least one has to be computed, for its hidden state.
        """
        wanted = np.array(tokens)
        own = [entry for entry in self._entries if entry.is_of(adapter)]
        if not own:
            return None, 0
        length, is_whole, best = max(
            ((entry.common(wanted), len(entry.tokens) == len(wanted), entry) for entry in own), key=itemgetter(0, 1)
        )
        if not (is_whole and length == len(wanted)):
            length = min(length, len(wanted) - 1)
            if length < SHORTEST_REUSE:
                return None, 0
        self._entries.remove(best)
        self._entries.append(best)
        return best.prefix, length

    def add(self, adapter: LoraAdapter | None, tokens: Sequence[int], prefix: Prefix, *, limit: int) -> None:
        """Keep a prompt; prompts that it starts with, and then the least recently used, make room for it."""
        of = None if adapter is None else weakref.ref(adapter)
        added = _Entry(of, np.array(tokens), prefix)
        kept = [
            entry
            for entry in self._entries
            if entry.is_alive() and not (entry.is_of(adapter) and entry.common(added.tokens) == len(entry.tokens))
        ]
        self._entries = [*kept, added][-MAX_PREFIXES:]
        self.nbytes = sum(entry.prefix.nbytes for entry in self._entries)
        while self._entries and self.nbytes > limit:
            self.nbytes -= self._entries.pop(0).prefix.nbytes


@dataclass(frozen=True, eq=False)
class _Entry:
    adapter: weakref.ref[LoraAdapter] | None
    tokens: NDArray[np.int64]
    prefix: Prefix

    def is_alive(self) -> bool:
        return self.adapter is None or self.adapter() is not None

    def is_of(self, adapter: LoraAdapter | None) -> bool:
        return adapter is None if self.adapter is None else adapter is not None and self.adapter() is adapter

    def common(self, tokens: NDArray[np.int64]) -> int:
        """Return the number of tokens at the start that are the same."""
        length = min(len(self.tokens), len(tokens))
        different = np.flatnonzero(self.tokens[:length] != tokens[:length])
        return int(different[0]) if len(different) else length
