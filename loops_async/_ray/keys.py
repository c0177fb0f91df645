"""Many keys, 16 bytes each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np

KEY: Final = np.dtype("V16")

Keys = Any
"""An array of keys; sorted where it is searched."""


def packed(keys: Iterable[str]) -> Keys:
    """Return keys of 32 hexadecimal digits as an array."""
    return np.frombuffer(b"".join(bytes.fromhex(key) for key in keys), KEY)


def joined(arrays: Iterable[Keys]) -> Keys:
    """Return the keys of all arrays."""
    return np.concatenate([np.frombuffer(b"", KEY), *arrays])


def are_in(keys: Keys, these: Keys) -> Any:
    """Return for each key whether it is among sorted ones."""
    if not len(these):
        return np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(these, keys), len(these) - 1)
    return these[places] == keys


def ordered(keys: Keys) -> tuple[Keys, int]:
    """Return the different keys in order, and how many are repetitions."""
    different = np.unique(keys)
    return different, len(keys) - len(different)
