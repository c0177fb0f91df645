"""A simulated service for rollouts: a sampler with slots, and a trainer, which take time and compute nothing.

Durations are seconds of the event loop's clock, so that `virtual_time` can skip them.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from loops_async import SamplingClient
from loops_async._rollouts.policy import Policy
from loops_async.types import SampledSequence, SampleResponse, SamplingParams

SIGMA: Final = 1.0
LONGEST: Final = 10.0
MEDIAN: Final = 0.6131
"""The duration of a generation is lognormal and cut off, as answers are at `max_tokens`, here at ten times the mean.

`SIGMA` is the standard deviation of its logarithm, and `MEDIAN` is what makes the mean 1 with that cut.
"""


@dataclass(frozen=True)
class Service:
    """How long everything takes, in seconds."""

    slots: int = 64
    generation: float = 33.0
    """The mean."""
    training: float = 60.0
    publishing: float = 5.0

    def generation_seconds(self, seed: int | None) -> float:
        """Return how long a generation takes, which depends on the seed alone."""
        drawn = random.Random(seed).lognormvariate(math.log(MEDIAN), SIGMA)
        return self.generation * min(drawn, LONGEST)

    def bound(self, samples_per_step: int) -> float:
        """Return the samples per second that no order of the work can exceed."""
        return min(self.slots / self.generation, samples_per_step / self.training)


class SimulatedSampler:
    """Generates in a fixed number of slots, first come, first served."""

    checkpoint_path = None

    def __init__(self, service: Service) -> None:
        self._service = service
        self._slots = asyncio.Semaphore(service.slots)
        self.version = 0

    async def sample(
        self, prompt: Any, num_samples: int = 1, sampling_params: SamplingParams | None = None, **_: object
    ) -> SampleResponse:
        """Return answers of one token."""
        params = sampling_params or SamplingParams()
        async with self._slots:
            version = self.version
            await asyncio.sleep(self._service.generation_seconds(params.seed))
        answer = SampledSequence(tokens=[1], logprobs=[-1.0], stop_reason="stop")
        return SampleResponse(sequences=[answer] * num_samples, policy_version=version)


class SimulatedTrainer:
    """Trains one batch after the other. A publication takes its turn among them, and its time beside them."""

    run_id = "simulated"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._turn = asyncio.Lock()
        self.sampler = SimulatedSampler(service)
        self.steps = 0
        self.busy_seconds = 0.0

    async def max_seq_len(self) -> int | None:
        """Return that there is no limit."""
        return None

    async def train(self, share: float = 1.0, *, is_step: bool = True) -> None:
        """Train on this share of a step's samples."""
        async with self._turn:
            await asyncio.sleep(self._service.training * share)
            self.busy_seconds += self._service.training * share
            self.steps += is_step

    def log(self, metrics: Mapping[str, float]) -> None: ...

    async def publish(self, name: str) -> Awaitable[Policy[SamplingClient]]:
        """Take the turn; what is returned waits until the sampler serves the weights."""
        async with self._turn:
            version = self.steps

        async def served() -> Policy[SamplingClient]:
            await asyncio.sleep(self._service.publishing)
            self.sampler.version = max(self.sampler.version, version)
            return Policy(cast("Any", self.sampler), version)

        return asyncio.ensure_future(served())

    async def freeze(self, name: str) -> Awaitable[Policy[SamplingClient]]:
        """Evaluation is not simulated."""
        raise NotImplementedError

    async def save_state(self, name: str) -> Awaitable[str]:
        """Nothing is saved."""
        raise NotImplementedError
