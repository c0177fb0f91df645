"""What a session has used: counters that the event loop increments, and snapshots of them for users."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ..types import Usage

COUNTED: Final = tuple(name for name in Usage.__struct_fields__ if name not in ("up_seconds", "by_run"))


class Counts(Struct, eq=False):
    """The counters of one run, or of all that belongs to none; `Usage` explains them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    trained_tokens: int = 0
    datums: int = 0
    samples: int = 0
    operations: int = 0
    requests: int = 0
    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def add(self, other: Counts, sign: int = 1) -> None:
        """Add the counts of `other`, or subtract them."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + sign * getattr(other, name))

    def sampled(self, prompt: int, completion: int) -> None:
        """Count the answer to a sample."""
        self.samples += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion


class Up(Struct, frozen=True):
    """For how long a run or a sampler was there."""

    id: str
    is_run: bool
    seconds: float


def total_of(counts: Iterable[Counts], up: Iterable[Up]) -> Usage:
    """Return the sum, without that of each run."""
    total = Counts()
    for each in counts:
        total.add(each)
    return _usage(total, sum(each.seconds for each in up), {})


def usage_of(counts: dict[str | None, Counts], up: Sequence[Up]) -> Usage:
    """Return a snapshot; in any thread."""
    seconds = {each.id: each.seconds for each in up if each.is_run}
    found: dict[str | None, Counts] = dict(counts)  # a copy, which other threads do not change
    runs = [run_id for run_id in [*found, *(seconds.keys() - found.keys())] if run_id is not None]
    by_run = {run_id: _usage(found.get(run_id) or Counts(), seconds.get(run_id, 0.0), {}) for run_id in runs}
    return replace(total_of(found.values(), up), by_run=by_run)


def _usage(counts: Counts, up_seconds: float, by_run: dict[str, Usage]) -> Usage:
    numbers = {name: getattr(counts, name) for name in COUNTED}
    return Usage(**numbers, up_seconds=up_seconds, by_run=by_run)
