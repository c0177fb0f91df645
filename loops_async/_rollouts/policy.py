"""What a stream of rollouts needs of a trainer: to publish, to freeze and to save its weights."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..sampling import SamplingClient

__all__ = ["Policy", "Trainer"]

S = TypeVar("S")
"""A sampling client of either form."""


@dataclass(frozen=True, slots=True)
class Policy(Generic[S]):
    """Weights that can be sampled: what a whole rollout in a worker gets with each call.

    `version` is the service's number of them, the optimizer steps that led there. A stream calls only `sample` of
    `sampler`, which answers with these weights or newer ones; one that is bound to a checkpoint, with exactly these.
    Pickled it has a few hundred bytes, and no API key.
    """

    sampler: S
    version: int


class Trainer(Protocol):
    """One run's trainer.

    The operations are those of the last three coroutines: each takes its turn before it first suspends, and returns
    when the trainer has accepted it. What it returns waits for the result; to cancel this has no effect on the
    operation.
    """

    @property
    def run_id(self) -> str:
        """The id of the run that is trained."""
        ...

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to those of the next step."""
        ...

    async def max_seq_len(self) -> int | None:
        """Return the longest training example in tokens; None if that is not known."""
        ...

    async def publish(self, name: str) -> Awaitable[Policy[SamplingClient]]:
        """Save the weights under `name` for the paired sampler; the result comes when that serves them."""
        ...

    async def freeze(self, name: str) -> Awaitable[Policy[SamplingClient]]:
        """Save the weights under `name` without publishing them; the result samples exactly these."""
        ...

    async def save_state(self, name: str) -> Awaitable[str]:
        """Save weights, optimizer and step under `name`; the result is the checkpoint's path."""
        ...
