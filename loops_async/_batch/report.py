"""The state of a batch."""

from __future__ import annotations

from msgspec import Struct

from .._values import Value
from ..errors import LoopsError


class BatchReport(Value, Struct, frozen=True, kw_only=True):
    """The state of a batch after a run, or in the middle of one.

    `rows` are those of the input. `answered` of them have completions now, and `already` of these had them before the
    run. `failed` have an error instead, and the next run asks again for the `retryable` ones of these. The others are
    missing, and the next run asks for them, too. `stale` counts the records of rows that are gone, which this run
    moved away. `stopped` says why the run asked for no more before its end, e.g. an `AuthenticationError`; None if it
    did not stop.
    """

    rows: int = 0
    already: int = 0
    answered: int = 0
    failed: int = 0
    retryable: int = 0
    stale: int = 0
    stopped: LoopsError | None = None
