"""The loop with real gradients and real samples, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import pytest

from loops_async import AdamParams, Episode, RolloutContext, SamplingParams, ServiceClient, TrainingClient
from loops_local import LocalService
from tests.support.colours import Async, Colour

pytestmark = pytest.mark.torch

MOST_STEPS = 100
"""Three times as many as the loop takes to learn."""


@pytest.fixture
def colour() -> Colour:
    return Async()


@pytest.fixture(scope="module")
def local(tiny: LocalService) -> LocalService:
    return tiny


@pytest.fixture
async def trainer(service: ServiceClient) -> TrainingClient:
    return await service.create_lora_training_client("tiny", rank=8, seed=0)


async def letters(ctx: RolloutContext, task: str) -> Episode:
    """The reward is the part of the sampled bytes that are lower-case letters."""
    episode = Episode.start(list(task.encode()))
    answer = await ctx.sample(episode, SamplingParams(max_tokens=8))
    episode.reward = sum(97 <= token <= 122 for token in answer.tokens) / len(answer.tokens)
    return episode


async def test_the_loop_learns(trainer: TrainingClient) -> None:
    tasks: Iterator[str] = cycle(["say:", "tell:"])
    rewards: list[float] = []
    async with trainer.rollouts(letters, tasks, group_size=16, groups_per_step=1, seed=1) as stream:
        async for batch in stream:
            step = await trainer.step(batch.data, "ppo", AdamParams(learning_rate=2e-2))
            await stream.publish()
            report = batch.report(await step)
            rewards.append(report["reward/mean"])
            assert report["drift/is_ratio_mean"] == pytest.approx(1.0, abs=0.5)
            if sum(rewards[-4:]) / 4 > 0.5 or len(rewards) == MOST_STEPS:
                break
    assert sum(rewards[:4]) / 4 < 0.25
    assert len(rewards) < MOST_STEPS


async def test_trainer_and_sampler_agree_where_sampled(trainer: TrainingClient) -> None:
    async def two_turns(ctx: RolloutContext, task: str) -> Episode:
        episode = Episode.start(list(task.encode()))
        await ctx.sample(episode, SamplingParams(max_tokens=6))
        await ctx.sample(episode.observe(list(b"and? ")), SamplingParams(max_tokens=6), slice_tokens=4)
        episode.reward = float(ctx.member)
        return episode

    options = {"group_size": 4, "groups_per_step": 2, "max_staleness": 0, "seed": 2}
    async with trainer.rollouts(two_turns, ["one: ", "two: ", "three: ", "four: "], **options) as stream:
        async for batch in stream:
            outputs = (await (await trainer.forward(batch.data, "importance_sampling"))).loss_fn_outputs
            for datum, output in zip(batch.data, outputs, strict=True):
                inputs = datum.loss_fn_inputs
                sampled = [float(score) for score in inputs["logprobs"].data if score]
                trained = zip(output["logprobs"].data, inputs["logprobs"].data, strict=True)
                assert sampled == pytest.approx([score for score, was_sampled in trained if was_sampled], abs=2e-3)
            await (await trainer.step(batch.data, "importance_sampling", AdamParams(learning_rate=1e-2)))
            await stream.publish()
