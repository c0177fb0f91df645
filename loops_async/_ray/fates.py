"""What becomes of the records of an output when a batch goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
from msgspec import Struct

from .keys import Keys, are_in, joined

STALE: Final = "_stale"
"""The folder of records of rows that are gone."""

ITS_PLACE: Final = ""


class Found(Struct):
    """The records of one file of the output."""

    keys: Keys
    is_answer: Any
    is_retryable: Any
    settings: set[str]


class Fate(Struct):
    """What becomes of the records of one file: each field says it for each of them."""

    is_done: Any
    """It stays, and its row is not asked again."""
    is_kept: Any
    """It stays: what is done, and with `append` also what is of no row of this input and these settings."""
    is_stale: Any
    """It is an answer to a row that is gone."""

    def steps(self) -> Iterator[tuple[str, Any]]:
        """Yield the changes in their order: a folder, and which records of the file to write there.

        Each is done whole or not at all. What is kept replaces the file itself: with another name, the output would
        have these records twice until the file is deleted.
        """
        if self.is_stale.any():  # first, so that a kill may double a stale answer, but not lose one
            yield STALE, self.is_stale
        if not self.is_kept.all():
            yield ITS_PLACE, self.is_kept


def fates(found: Mapping[str, Found], wanted: Keys, *, retry_errors: bool, append: bool) -> dict[str, Fate]:
    """Return what becomes of the records of each file, given the keys of the input, sorted.

    A key that several files have stays in one of them. Such files are of earlier versions, or of a task that outlived
    its driver, for example on a machine that was cut off, and wrote when the next run already asked for the same rows.
    """
    files = found.values()
    keys = joined(each.keys for each in files)
    is_answer = _flags(each.is_answer for each in files)
    is_retryable = _flags(each.is_retryable for each in files)
    is_wanted = are_in(keys, wanted)
    may_stay = np.where(is_wanted, is_answer | ~(is_retryable | retry_errors), append)
    is_kept = _once(keys, may_stay, is_answer)
    is_done = is_kept & is_wanted
    is_stale = ~is_wanted & is_answer & (not append)
    bounds = pairwise(accumulate((len(each.keys) for each in files), initial=0))
    return {
        path: Fate(is_done[start:end], is_kept[start:end], is_stale[start:end])
        for path, (start, end) in zip(found, bounds, strict=True)
    }


def _once(keys: Keys, is_kept: Any, is_answer: Any) -> Any:
    """Return the same without repeated keys; an answer comes before an error."""
    places = np.flatnonzero(is_kept)
    places = places[np.argsort(~is_answer[places], kind="stable")]
    first = np.zeros(len(keys), bool)
    first[places[np.unique(keys[places], return_index=True)[1]]] = True
    return first


def _flags(arrays: Iterable[Any]) -> Any:
    return np.concatenate([np.zeros(0, bool), *arrays])
