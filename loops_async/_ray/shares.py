"""The law of a limit that several workers share; it knows nothing of Ray."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from .._arguments import check_at_least
from .._sampling.adaptive import Adaptive, HillClimb
from ..errors import InputError

SILENT_SECONDS: Final = 5.0
"""After so long without a report, the share of a worker is free again."""


class Report(Struct, frozen=True):
    """What a worker says of itself.

    `share` is the one that it follows. Since the last report, `finished` has ``(sequences, tokens, seconds)`` of each
    request that ended, `rejections` counts the 429 and 503, and `answered` and `failed` count records.
    """

    share: int
    in_flight: int = 0
    waiting: int = 0
    finished: tuple[tuple[int, int, float], ...] = ()
    rejections: int = 0
    answered: int = 0
    failed: int = 0


class _Held(Struct):
    share: int
    """What the worker was told."""
    places: int
    """What it may have in flight: more than its share until it has given the rest back."""
    demand: int
    in_flight: int
    waiting: int
    heard_at: float


class Shares:
    """Divides a limit among workers by what they have to do.

    Invariant: the places of all workers together are at most the largest limit since they were granted. A place that is
    taken from a worker is granted to another one only when the first reports that it follows its smaller share and has
    no more than that in flight, or when it has been silent for 5 s.

    Args:
        limit: the most sequences in flight of all workers; an `Adaptive` follows what they report.
        workers: how many there will be. Each has at least one place.

    Raises:
        InputError: the limit is smaller than the number of workers.
    """

    def __init__(self, limit: int | Adaptive, workers: int) -> None:
        self._workers = workers
        self._climb = HillClimb(limit) if isinstance(limit, Adaptive) else None
        self._fixed = workers if isinstance(limit, Adaptive) else check_at_least(limit, 1, "limit")
        self._held: dict[str, _Held] = {}
        most = limit.maximum if isinstance(limit, Adaptive) else limit
        if most < workers:
            raise InputError("limit", f"must be at least the number of workers, {workers}; got {most}")

    @property
    def limit(self) -> int:
        """The present limit, which is never below the number of workers."""
        return self._fixed if self._climb is None else max(self._climb.limit, self._workers)

    @property
    def places(self) -> dict[str, int]:
        """How many sequences each worker may have in flight."""
        return {worker: held.places for worker, held in self._held.items()}

    def report(self, worker: str, report: Report, now: float) -> int:
        """Take the report of a worker, and return its new share; 0 while no place is free for a new worker."""
        for name in [name for name, held in self._held.items() if now - held.heard_at > SILENT_SECONDS]:
            del self._held[name]
        held = self._held.get(worker) or _Held(report.share, report.share, 1, 0, 0, now)
        if report.share == held.share:  # a report that was on its way when the share changed says nothing of it
            held.places = max(held.share, min(report.in_flight, held.places))
        held.in_flight, held.waiting, held.heard_at = report.in_flight, report.waiting, now
        held.demand = max(1, report.in_flight + report.waiting)
        self._held[worker] = held
        self._learn(report, now)
        self._grant(held)
        return held.share

    def _grant(self, held: _Held) -> None:
        """Move the share of a worker towards its part of the limit."""
        unseen = max(0, self._workers - len(self._held))
        demand = sum(each.demand for each in self._held.values())
        spare = self.limit - unseen - len(self._held)  # each has one place in any case
        part = 1 + max(0, spare) * held.demand // demand
        others = sum(each.places for each in self._held.values() if each is not held)
        free = self.limit - unseen - others
        target = max(min(part, free), min(held.places, 1))
        held.share = max(0, target)
        held.places = max(held.places, held.share)

    def _learn(self, report: Report, now: float) -> None:
        if self._climb is None:
            return
        in_flight = sum(each.in_flight for each in self._held.values())
        waiting = sum(each.waiting for each in self._held.values())
        self._climb.occupied(now, in_flight, waiting)
        for _ in range(report.rejections):
            self._climb.rejected()
        for count, tokens, seconds in report.finished:
            # What it cost, as the clock of one process would have it: seconds divided by what was in flight meanwhile.
            self._climb.finished(count, tokens, self._climb.clock - seconds / max(1, in_flight))
