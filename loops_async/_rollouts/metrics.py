"""The metrics of a stream: what happened between one batch and the next."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Final

from .._sampling.limiter import Limiter
from ..types.tensors import plain_number
from .episode import UNKNOWN_VERSION, Episode
from .gate import StalenessGate

__all__ = ["Meter", "mean", "means_of_own_metrics"]

COUNTERS: Final = ("submitted", "accepted", "dropped", "failed", "running")


class Stopwatch:
    """Adds up the time during which something is so."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._total = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = self._clock()

    def stop(self) -> None:
        if self._since is not None:
            self._total += self._clock() - self._since
            self._since = None

    def take(self) -> float:
        """Return the seconds since the last call, and begin again."""
        is_running = self._since is not None
        self.stop()
        total, self._total = self._total, 0.0
        if is_running:
            self.start()
        return total


class Meter:
    """Measures a stream from its start on."""

    def __init__(self, gate: StalenessGate, limiter: Limiter) -> None:
        self._gate = gate
        self._limiter = limiter
        self.retries = 0
        self.lag_max: float = 0.0
        self._step = Stopwatch()
        self._step.start()
        self._trainer_wait = Stopwatch()
        self._sampler_idle = Stopwatch()
        self._sampler_idle.start()
        self._in_flight = 0
        self._dropped_rewards: list[float] = []
        self._ended_groups = 0
        self._constant_groups = 0

    @contextmanager
    def in_flight(self) -> Generator[None]:
        """Count the block as a request to the sampler."""
        self._in_flight += 1
        self._sampler_idle.stop()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._sampler_idle.start()

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Count the block as time in which the trainer waits for a batch."""
        self._trainer_wait.start()
        try:
            yield
        finally:
            self._trainer_wait.stop()

    def ended(self, episodes: Sequence[Episode], *, is_constant: bool, is_dropped: bool) -> None:
        """Count a group that has not failed."""
        self._ended_groups += 1
        self._constant_groups += is_constant
        if is_dropped:
            self._dropped_rewards += _rewards(episodes)

    def read(self, episodes: Sequence[Episode], versions: Sequence[int], *, step: int, policy: int) -> dict[str, float]:
        """Return the metrics of a batch, and begin to measure for the next.

        Args:
            episodes: those of the batch.
            versions: those of its groups.
            step: the number of its step.
            policy: the service's version of the published weights.
        """
        rewards = _rewards(episodes)
        return {
            **means_of_own_metrics(episodes, "episode/"),
            "step": step,
            "version": self._gate.version,
            "reward/mean": mean(rewards + self._dropped_rewards),
            "reward/trained_mean": mean(rewards),
            **self._group_metrics(),
            **_summary("staleness/", [step - version for version in versions]),
            **_token_staleness(episodes, policy),
            **_episode_metrics(episodes),
            **self._time_metrics(),
            "sampler/limit": self._limiter.limit,
            "sampler/in_flight": self._limiter.in_flight,
            "sampler/rejections": self._limiter.rejections,
        }

    def _group_metrics(self) -> dict[str, float]:
        counters: dict[str, float] = {f"groups/{name}": getattr(self._gate, name) for name in COUNTERS}
        counters["groups/constant_share"] = self._constant_groups / max(1, self._ended_groups)
        counters["episodes/retries"] = self.retries
        self._dropped_rewards, self._ended_groups, self._constant_groups = [], 0, 0
        return counters

    def _time_metrics(self) -> dict[str, float]:
        step, wait, idle = self._step.take(), self._trainer_wait.take(), self._sampler_idle.take()
        lag, self.lag_max = self.lag_max, 0.0
        return {
            "time/step": step,
            "time/trainer_wait": wait,
            "idle/trainer": wait / step if step else 0.0,
            "idle/sampler": idle / step if step else 0.0,
            "loop/lag_max": lag,
        }


def mean(values: Sequence[float]) -> float:
    """Return the mean; that of nothing is 0."""
    return sum(values) / len(values) if values else 0.0


def means_of_own_metrics(episodes: Sequence[Episode], prefix: str) -> dict[str, float]:
    """Return the mean of each of the user's `Episode.metrics`, over the episodes that have it as a number."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for name, value in episode.metrics.items():
            if isinstance(number := plain_number(value), int | float):
                values[prefix + name].append(number)
    return {name: mean(each) for name, each in values.items()}


def _rewards(episodes: Sequence[Episode]) -> list[float]:
    return [episode.reward for episode in episodes if episode.reward is not None]


def _summary(prefix: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{prefix}mean": mean(values), f"{prefix}max": max(values, default=0)}


def _token_staleness(episodes: Sequence[Episode], policy: int) -> dict[str, float]:
    counts: Counter[int] = Counter()
    for episode in (each for whole in episodes for each in (whole, *whole.branches)):
        # A batch has millions of tokens, but few versions: `Counter.update` would cost four times as much.
        counts.update({version: episode.versions.count(version) for version in set(episode.versions)})
    del counts[UNKNOWN_VERSION]
    total = sum((policy - version) * count for version, count in counts.items())
    return {
        "staleness/token_mean": total / counts.total() if counts else 0.0,
        "staleness/token_max": policy - min(counts, default=policy),
    }


def _episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    return {
        **_summary("episode/tokens_", [each.sampled_tokens for each in episodes]),
        "episode/turns_mean": mean([each.turns for each in episodes]),
        "episode/truncated_share": mean([each.is_truncated for each in episodes]),
    }
