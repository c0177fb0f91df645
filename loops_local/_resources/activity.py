"""What the service did in the last minutes: samples, their latency, the work under way, the memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from .metrics import percentiles, resident_bytes

__all__ = ["SLICE_SECONDS", "Activity", "Latency", "Slice"]

SLICE_SECONDS: Final = 5.0
MOST_SLICES: Final = 120
"""Ten minutes."""
MOST_SAMPLES: Final = 4096
"""The newest samples, of which latencies are known."""


class Latency(Struct, frozen=True):
    """Percentiles in seconds, None without a sample."""

    p50: float | None = None
    p95: float | None = None


class Slice(Struct, frozen=True, kw_only=True):
    """Five seconds: the calls of `sample` that ended, and what was there at the end."""

    time: float
    samples_per_second: float
    p50: float | None
    p95: float | None
    under_way: int
    waiting: int
    memory: int | None


class Activity:
    """Counts the calls of `sample`, and keeps the slices of the last ten minutes.

    A call costs two readings of the clock and one append. What it adds is bounded by `MOST_SAMPLES` and `MOST_SLICES`.
    """

    def __init__(self) -> None:
        self.slices: deque[Slice] = deque(maxlen=MOST_SLICES)
        self.samples = 0
        self.samples_under_way = 0
        self._newest: deque[tuple[float, float]] = deque(maxlen=MOST_SAMPLES)
        self._last = (time.monotonic(), 0)
        """When the last slice ended, and the samples up to then."""

    @contextmanager
    def sample(self) -> Generator[None]:
        """Count a call of `sample`: as under way inside the block, and as a sample if it succeeds."""
        started = time.monotonic()
        self.samples_under_way += 1
        try:
            yield
            ended = time.monotonic()
            self.samples += 1
            self._newest.append((ended, ended - started))
        finally:
            self.samples_under_way -= 1

    def measure(self, under_way: int, waiting: int) -> None:
        """End a slice; `under_way` and `waiting` count samples and operations."""
        now = time.monotonic()
        before, samples = self._last
        latency = self.latency(now - before)
        self.slices.append(
            Slice(
                time=time.time(),
                samples_per_second=(self.samples - samples) / max(now - before, 1e-3),
                p50=latency.p50,
                p95=latency.p95,
                under_way=under_way,
                waiting=waiting,
                memory=resident_bytes(),
            )
        )
        self._last = now, self.samples

    def samples_per_second(self, seconds: float) -> float:
        """Return the mean rate of about the last seconds, by the slices that ended in them."""
        since = time.time() - seconds
        rates = [each.samples_per_second for each in self.slices if each.time > since]
        return sum(rates) / len(rates) if rates else 0.0

    def latency(self, seconds: float) -> Latency:
        """Return the latency of the samples that ended in the last seconds; at most of the newest `MOST_SAMPLES`."""
        since = time.monotonic() - seconds
        newest = [took for ended, took in self._newest if ended >= since]
        return Latency(*percentiles(newest, 0.5, 0.95)) if newest else Latency()
