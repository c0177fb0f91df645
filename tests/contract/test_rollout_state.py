"""Saving and continuing a stream, also after its process was killed; evaluating beside training."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from loops_async import (
    AdamParams,
    ClosedError,
    Episode,
    Limiter,
    RolloutContext,
    RolloutError,
    RolloutState,
    ServiceClient,
    TrainingClient,
)
from loops_local import LocalService, serve_in_thread
from loops_local.engine.base import SampleJob
from tests.support.colours import Colour
from tests.support.engines import Engines, WatchedEngine
from tests.support.rollouts import (
    PAIRS,
    SAMPLED,
    assert_logprobs_are_those_of_the_versions,
    loop,
    one_turn,
    tasks_of,
    train_on,
)
from tests.support.warnings import WARNINGS
from tests.support.work import eventually


async def test_a_restored_stream_trains_what_was_not_trained(
    service: ServiceClient, trainer: TrainingClient, engine: WatchedEngine, tmp_path: Path
) -> None:
    file = tmp_path / "rollouts.json"

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        if task >= 2:
            await asyncio.Event().wait()  # still under way when the state is saved
        return await one_turn(ctx, task)

    assert RolloutState.read(file) is None
    async with trainer.rollouts(rollout, range(8), max_staleness=2, **PAIRS) as stream:
        batch = await anext(stream)
        await train_on(trainer, stream, batch)
        await eventually(lambda: len(stream.running()) == 6)
        state = await stream.save("one")
        state.write(file)
        assert msgspec.structs.replace(state, path=None, run_id=None) == stream.state()
    assert stream.state() == msgspec.structs.replace(state, path=None, run_id=None), "what is left does not count"

    restored = RolloutState.read(file)
    assert restored == state
    assert tasks_of([batch]) == [0, 1]
    assert [state.version, state.next_index, state.pending] == [1, 8, [2, 3, 4, 5, 6, 7]]
    assert state.path is not None

    resumed = await service.create_training_client_from_state_with_optimizer(state.path)
    engine.hold_samples()
    async with resumed.rollouts(one_turn, range(10), max_staleness=2, state=restored, **PAIRS) as stream:
        await eventually(lambda: stream.gate.capacity == 0)
        assert [stream.version, stream.gate.accepted, stream.gate.running] == [1, 2, 6]
        engine.release_samples()
        batches = await loop(resumed, stream)
        assert stream.policy_version == 5
    assert sorted(tasks_of(batches)) == list(range(2, 10))
    assert [batch.step for batch in batches] == [1, 2, 3, 4]


async def test_a_step_that_was_handed_out_in_part_is_pending(trainer: TrainingClient) -> None:
    options = {"group_size": 2, "groups_per_step": 4, "minibatches": 2, "max_staleness": 0}
    async with trainer.rollouts(one_turn, range(9), **options) as stream:
        part = await anext(stream)
        assert not part.is_last_of_step
        assert stream.state() == RolloutState(version=0, next_index=4, pending=[0, 1, 2, 3])
        await anext(stream)
        assert stream.state() == RolloutState(version=1, next_index=4, pending=[])


SCRIPT = """
import asyncio, sys
import loops_async as loops

async def rollout(ctx, task):
    episode = loops.Episode.start([task + 1, 20, 30])
    await ctx.sample(episode, loops.SamplingParams(max_tokens=2))
    episode.reward = 0.5 if task % 5 == 4 else float(ctx.member)
    return episode

async def main(url, key, base, folder):
    file = f"{folder}/state.json"
    state = loops.RolloutState.read(file)
    async with loops.ServiceClient(base_url=url, api_key=key, on_exit="leave") as service:
        if state is None:
            trainer = await service.create_lora_training_client(base, rank=8)
        else:
            trainer = await service.create_training_client_from_state_with_optimizer(state.path)
        options = dict(group_size=2, groups_per_step=2, max_staleness=2, state=state)
        async with trainer.rollouts(rollout, range(30), **options) as stream:
            async for batch in stream:
                await (await trainer.step(batch.data, "ppo", loops.AdamParams()))
                await stream.publish()
                print(batch.step, *(group.index for group in batch.groups), file=log)
                (await stream.save(f"step-{batch.step}")).write(file)
        print("end", await trainer.policy_version(), stream.gate.dropped, file=log)

with open(f"{sys.argv[4]}/log", "a", buffering=1) as log:
    asyncio.run(main(*sys.argv[1:]))
"""


async def test_each_task_is_trained_once_over_a_killed_process(local: LocalService, tmp_path: Path) -> None:
    command = [sys.executable, *WARNINGS, "-c", SCRIPT, local.base_url, local.api_key, "killed", str(tmp_path)]
    log = tmp_path / "log"
    log.touch()
    process = await asyncio.create_subprocess_exec(*command)
    try:
        await eventually(lambda: len(log.read_text().splitlines()) >= 3)
    finally:
        process.kill()
        assert await process.wait() == -signal.SIGKILL
    ended = await asyncio.to_thread(subprocess.run, command, timeout=30, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")

    *lines, end = log.read_text().splitlines()
    # A step that was not saved is done again: its last line counts.
    steps = {int(step): tasks for step, *tasks in map(str.split, lines)}
    assert end.split() == ["end", "12", "6"]
    assert sorted(steps) == list(range(12))
    assert sorted(int(task) for tasks in steps.values() for task in tasks) == [n for n in range(30) if n % 5 != 4]


# --- evaluation ------------------------------------------------------------------------------------------------------


async def test_an_evaluation_samples_the_weights_of_its_call(trainer: TrainingClient, engine: WatchedEngine) -> None:
    evaluated = asyncio.Event()

    async def grade(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([task + 1, 40])
        await ctx.sample(episode, SAMPLED)
        if ctx.member == 0:
            await evaluated.wait()  # meanwhile, training goes on
        await ctx.sample(episode.observe([3]), SAMPLED)
        episode.reward = float(task)
        return episode

    async with trainer.rollouts(one_turn, range(12), max_staleness=1, **PAIRS) as stream:
        await train_on(trainer, stream, await anext(stream))
        batch = await anext(stream)
        await (await trainer.step(batch.data, "ppo", AdamParams()))
        future = await stream.evaluate(grade, [5, 6, 7], group_size=2)
        assert stream.policy_version == 1
        await stream.publish()
        await loop(trainer, stream, 2)
        assert not future.done()
        evaluated.set()
        result = await future
        again = await stream.evaluate(grade, [5])
        assert (await again).version == stream.policy_version == 4
    assert result.version == 2, "its weights are not those that were published then"
    assert [group.index for group in result.groups] == [0, 1, 2]
    assert [group.rewards for group in result.groups] == [[5.0, 5.0], [6.0, 6.0], [7.0, 7.0]]
    assert result.metrics == {"evaluation/reward_mean": 6.0, "evaluation/version": 2, "evaluation/failed": 0}
    for group in result.groups:
        for episode in group.episodes:
            assert {version for version in episode.versions if version >= 0} == {2}
            assert_logprobs_are_those_of_the_versions(episode)


async def test_an_evaluation_goes_first_and_past_the_gate(
    trainer: TrainingClient, engine: WatchedEngine, jobs: list[SampleJob]
) -> None:
    async def grade(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([99])
        await ctx.sample(episode, SAMPLED)
        episode.reward = 1.0
        return episode

    limiter = Limiter(1)
    engine.hold_samples()
    async with trainer.rollouts(one_turn, range(4), limit=limiter, **PAIRS) as stream:
        await eventually(lambda: limiter.waiting == 7)
        assert stream.gate.capacity == 0
        evaluation = await stream.evaluate(grade, [1], group_size=3)
        await eventually(lambda: limiter.waiting == 10)
        engine.release_samples()
        await evaluation
        await loop(trainer, stream)
    assert [job.prompt.to_ints() == [99] for job in jobs] == [False] + 3 * [True] + 7 * [False]


async def test_an_evaluation_that_fails_stops_no_training(trainer: TrainingClient) -> None:
    async def sometimes(ctx: RolloutContext, task: int) -> Episode:
        if task < 5:
            raise ValueError(f"task {task}")
        return await one_turn(ctx, task)

    async with trainer.rollouts(one_turn, range(4), **PAIRS) as stream:
        partly = await stream.evaluate(sometimes, range(10), name="partly")
        wholly = await stream.evaluate(sometimes, range(5), name="wholly")
        assert len(await loop(trainer, stream)) == 2
        result = await partly
        assert [group.task for group in result.groups] == [5, 6, 7, 8, 9]
        assert result.failed == result.metrics["evaluation/failed"] == 5
        with pytest.raises(RolloutError, match="every group") as caught:
            await wholly
    assert caught.value.failures == {"ValueError": 5}
    assert isinstance(caught.value.__cause__, ValueError)


async def test_an_evaluation_ends_with_its_stream(trainer: TrainingClient, engine: WatchedEngine) -> None:
    async with trainer.rollouts(one_turn, range(4), **PAIRS) as stream:
        await loop(trainer, stream)
        engine.hold_samples()
        future = await stream.evaluate(one_turn, [1])
        await eventually(lambda: engine.waiting_samples == 1)
    await eventually(lambda: engine.waiting_samples == 0)
    with pytest.raises(ClosedError):
        await future


# --- other deployments -----------------------------------------------------------------------------------------------


async def check_a_run(service: ServiceClient, engine: WatchedEngine) -> None:
    trainer = await service.create_lora_training_client(engine.name, rank=8)
    async with trainer.rollouts(one_turn, range(6), max_staleness=1, **PAIRS) as stream:
        batches = await loop(trainer, stream)
        result = await (await stream.evaluate(one_turn, [1, 2]))
        assert [stream.version, stream.policy_version, result.version] == [3, 3, 3]
    assert sorted(tasks_of(batches)) == list(range(6))
    episodes = [episode for batch in batches for episode in batch.episodes]
    episodes += [episode for group in result.groups for episode in group.episodes]
    for episode in episodes:
        assert_logprobs_are_those_of_the_versions(episode)


async def test_in_local_mode(colour: Colour, local: LocalService, engine: WatchedEngine) -> None:
    urls = {"trainer_url": local.trainer_url, "sampler_url": local.sampler_url}
    async with colour.connected_locally(**urls) as service:
        await check_a_run(service, engine)


async def test_with_a_serverless_sampler(colour: Colour, engines: Engines, engine: WatchedEngine) -> None:
    with serve_in_thread(engine=engines, serverless=True, provisioning_seconds=0.0, poll_hold_seconds=0.05) as local:
        async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
            await check_a_run(service, engine)
