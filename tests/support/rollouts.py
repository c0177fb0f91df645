"""Rollouts on the echo engine, and what tests read of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from inspect import iscoroutinefunction
from itertools import pairwise
from pathlib import Path
from typing import Any

import loops_sync
from loops_async import (
    AdamParams,
    Episode,
    Policy,
    RolloutBatch,
    RolloutContext,
    RolloutStream,
    SampleResponse,
    SamplingClient,
    SamplingParams,
    TrainingClient,
)
from loops_local.engine.echo import logprob

SAMPLED = SamplingParams(max_tokens=4)
PAIRS = {"group_size": 2, "groups_per_step": 2}
"""Groups of two episodes, and steps of two groups."""


async def one_turn(ctx: RolloutContext, task: int) -> Episode:
    """Sample one answer; the members of a group have different rewards."""
    episode = Episode.start([task % 97 + 1, 20, 30])
    await ctx.sample(episode, SAMPLED)
    episode.reward = float(ctx.member % 2)
    return episode


async def whole_episode(policy: Policy[SamplingClient], given: tuple[int, int, Path]) -> Episode:
    """Do what `one_turn` does, in another process, which is killed the first time."""
    task, member, folder = given
    episode = Episode.start([task % 97 + 1, 20, 30])
    answer = await policy.sampler.sample(episode.tokens, 1, SAMPLED)
    return _ended(episode, answer, member, folder)


def whole_episode_plainly(policy: Policy[loops_sync.SamplingClient], given: tuple[int, int, Path]) -> Episode:
    """Do the same with the blocking form."""
    task, member, folder = given
    episode = Episode.start([task % 97 + 1, 20, 30])
    answer = policy.sampler.sample(episode.tokens, 1, SAMPLED)
    return _ended(episode, answer, member, folder)


def _ended(episode: Episode, answer: SampleResponse, member: int, folder: Path) -> Episode:
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        episode.act(answer.sequences[0], policy_version=answer.policy_version)
        episode.reward = float(member % 2)
        episode.metrics["process"] = os.getpid()
        return episode
    os._exit(1)


async def check_whole_rollouts_elsewhere(trainer: TrainingClient, executor: Any, folder: Path) -> None:
    """The stream admits, repeats and ages rollouts that run in an executor, of the colour of the trainer."""

    async def awaiting(ctx: RolloutContext, task: int) -> Episode:
        episode: Episode = await executor.run(whole_episode, ctx.policy, (task, ctx.member, folder))
        return episode

    def blocking(ctx: Any, task: int) -> Episode:
        episode: Episode = executor.run(whole_episode_plainly, ctx.policy, (task, ctx.member, folder))
        return episode

    rollout: Any = awaiting if iscoroutinefunction(executor.run) else blocking
    async with trainer.rollouts(rollout, range(4), max_staleness=0, **PAIRS) as stream:
        batches = await loop(trainer, stream)
    assert sorted(tasks_of(batches)) == list(range(4))
    assert (folder / "died").exists()
    for version, batch in enumerate(batches):
        for episode in batch.episodes:
            assert_logprobs_are_those_of_the_versions(episode)
            assert set(episode.versions) == {-1, version}
            assert episode.metrics["process"] != os.getpid()


async def train_on(trainer: TrainingClient, stream: RolloutStream, batch: RolloutBatch) -> None:
    """Train on a batch that is a whole step, and publish."""
    await (await trainer.step(batch.data, "ppo", AdamParams()))
    await stream.publish()


async def loop(trainer: TrainingClient, stream: RolloutStream, most: int | None = None) -> list[RolloutBatch]:
    """Train to the end of the data, or for `most` steps; return the batches."""
    batches: list[RolloutBatch] = []
    async for batch in stream:
        await train_on(trainer, stream, batch)
        batches.append(batch)
        if len(batches) == most:
            break
    return batches


def threads_of_rollouts() -> list[str]:
    """Return the names of the threads that run rollouts, and what they pass to `RolloutContext.run`."""
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith(("loops-rollouts", "loops_sync:"))]


def tasks_of(batches: Sequence[RolloutBatch]) -> list[int]:
    """Return the numbers of the tasks that were handed out, in their order."""
    return [group.index for batch in batches for group in batch.groups]


def assert_logprobs_are_those_of_the_versions(episode: Episode) -> None:
    """Each sampled token has the logprob that the echo engine gives it at the version that it names."""
    assert any(episode.mask)
    for position, (previous, token) in enumerate(pairwise(episode.tokens), start=1):
        if episode.mask[position]:
            wanted = logprob(previous, token, episode.versions[position])
            assert abs(episode.logprobs[position] - wanted) < 1e-6
        else:
            assert episode.versions[position] == -1
