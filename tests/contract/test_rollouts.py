"""The loop: rollouts beside training, within the bound of their age."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loops_async import (
    AdamParams,
    BadRequestError,
    ClosedError,
    Episode,
    FailurePolicy,
    InputError,
    Limiter,
    PermissionDeniedError,
    ProcessExecutor,
    RemoteOpError,
    RolloutContext,
    RolloutError,
    SamplingParams,
    ServiceClient,
    TrainingClient,
    group_advantages,
)
from loops_async.protocol import AFFINITY
from loops_local import LocalService
from loops_local.engine.base import SampleJob
from loops_local.engine.echo import MAX_SEQ_LEN, logprob
from tests.support.colours import Async, Colour
from tests.support.engines import WatchedEngine
from tests.support.graders import double, hang, is_alive
from tests.support.rollouts import (
    PAIRS,
    SAMPLED,
    assert_logprobs_are_those_of_the_versions,
    check_whole_rollouts_elsewhere,
    loop,
    one_turn,
    tasks_of,
    threads_of_rollouts,
    train_on,
)
from tests.support.work import REFUSED, eventually, example


async def test_every_task_is_trained_once(trainer: TrainingClient) -> None:
    async with trainer.rollouts(one_turn, range(20), max_staleness=2, **PAIRS) as stream:
        batches = await loop(trainer, stream)
        assert [stream.version, stream.policy_version, await trainer.policy_version()] == [10, 10, 10]
        assert stream.running() == []
    assert sorted(tasks_of(batches)) == list(range(20))
    assert [batch.step for batch in batches] == list(range(10))
    assert all(batch.is_last_of_step for batch in batches)
    for batch in batches:
        assert all(0 <= batch.step - group.version <= 2 for group in batch.groups)
        assert batch.metrics["staleness/max"] == max(batch.step - group.version for group in batch.groups)


async def test_without_staleness_every_token_is_of_the_trainer_s_version(trainer: TrainingClient) -> None:
    async with trainer.rollouts(one_turn, range(8), max_staleness=0, **PAIRS) as stream:
        async for batch in stream:
            version = await trainer.policy_version()
            versions = {v for episode in batch.episodes for v in episode.versions if v >= 0}
            assert versions == {version} == {batch.step}
            assert batch.metrics["staleness/token_max"] == 0
            await train_on(trainer, stream, batch)


async def test_what_is_in_flight_gets_the_newest_weights_at_its_next_request(trainer: TrainingClient) -> None:
    published = asyncio.Event()

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([task + 1, 20])
        await ctx.sample(episode, SAMPLED)
        if task == 0:
            await published.wait()
        await ctx.sample(episode.observe([50, 60]), SAMPLED)
        episode.reward = float(ctx.member)
        return episode

    async with trainer.rollouts(rollout, range(3), group_size=2, groups_per_step=1, max_staleness=1) as stream:
        first = await anext(stream)
        assert tasks_of([first]) == [1]
        await train_on(trainer, stream, first)
        published.set()
        second = await anext(stream)
        assert tasks_of([second]) == [0]
        for episode in second.episodes:
            assert episode.versions == [-1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1, 1]
            assert episode.turns == 2
            assert_logprobs_are_those_of_the_versions(episode)
        assert second.metrics["staleness/token_mean"] == 0.5
        assert second.metrics["staleness/max"] == 1


async def test_a_long_answer_may_be_sampled_in_slices(trainer: TrainingClient, jobs: list[SampleJob]) -> None:
    stop_at = SamplingParams(max_tokens=9, stop=[7])
    answers = []

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([5, 6, 8] if task == 0 else [5, 6, 7])
        answers.append(await ctx.sample(episode, stop_at, slice_tokens=4))
        assert episode.turns == 1
        assert episode.tokens[3:] == answers[-1].tokens
        assert answers[-1].logprobs == episode.logprobs[3:]
        with pytest.raises(InputError, match="slice_tokens"):
            await ctx.sample(episode, SamplingParams(stop="x"), slice_tokens=4)
        episode.reward = float(ctx.member)
        return episode

    async with trainer.rollouts(rollout, range(2), limit=1, **PAIRS) as stream:
        (batch,) = await loop(trainer, stream)
    for episode in batch.episodes:
        assert_logprobs_are_those_of_the_versions(episode)
    asked = [job.params.max_tokens for job in jobs if job.prompt.to_ints()[:3] == [5, 6, 8]]
    assert sorted(asked) == [1, 1, 4, 4, 4, 4]
    assert {answer.stop_reason for answer in answers if 7 in answer.tokens} == {"stop"}
    assert [episode.is_truncated for episode in batch.episodes] == [True, True, False, False]


async def test_an_episode_never_outgrows_its_limit(trainer: TrainingClient, jobs: list[SampleJob]) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([1, 2, 3])
        lengths = [len((await ctx.sample(episode, SamplingParams(max_tokens=4, stop=[99]))).tokens) for _ in range(3)]
        assert lengths == [4, 3, 0]
        assert episode.is_truncated
        assert episode.turns == 3
        episode.reward = float(ctx.member)
        return episode

    async with trainer.rollouts(rollout, [0, 0], max_episode_tokens=10, mask_truncated=True, **PAIRS) as stream:
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stream.gate.dropped == 2, "every episode is truncated, and so masked"
    assert len(jobs) == 8


async def test_what_was_observed_beyond_the_limit_is_not_trained(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([1, 2, 3])
        answer = await ctx.sample(episode, SAMPLED)
        episode.observe([9] * MAX_SEQ_LEN)
        assert (await ctx.sample(episode, SAMPLED)).tokens == []
        assert episode.tokens == [1, 2, 3, *answer.tokens, *[9] * MAX_SEQ_LEN]
        episode.reward = float(ctx.member)
        return episode

    async with trainer.rollouts(rollout, range(2), max_episode_tokens=10, **PAIRS) as stream:
        (batch,) = await loop(trainer, stream)
    for episode, datum in zip(batch.episodes, batch.data, strict=True):
        assert episode.tokens[7:] == [9, 9, 9]
        assert episode.is_truncated
        assert [len(episode.logprobs), len(episode.mask), len(episode.versions)] == [10, 10, 10]
        assert datum.model_input.to_ints() == episode.tokens[:-1]


async def test_without_a_limit_an_answer_may_be_as_long_as_the_model_permits(
    trainer: TrainingClient, jobs: list[SampleJob]
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([1, 2, 3])
        await ctx.sample(episode, SamplingParams(stop=[2]))
        episode.reward = float(ctx.member)
        return episode

    async with trainer.rollouts(rollout, range(2), **PAIRS) as stream:
        await loop(trainer, stream)
    assert {job.params.max_tokens for job in jobs} == {MAX_SEQ_LEN - 3}


async def test_the_length_is_at_most_that_of_the_run(
    service: ServiceClient, engine: WatchedEngine, jobs: list[SampleJob]
) -> None:
    trainer = await service.create_lora_training_client(engine.name, rank=8, max_seq_len=12)
    async with trainer.rollouts(one_turn, range(2), **PAIRS) as stream:
        (batch,) = await loop(trainer, stream)
        assert {len(episode.tokens) for episode in batch.episodes} == {7}
        assert {job.params.max_tokens for job in jobs} == {4}
    with pytest.raises(InputError, match="max_episode_tokens: must be at most 12"):
        async with trainer.rollouts(one_turn, range(2), max_episode_tokens=13, **PAIRS):
            pass


async def test_an_answer_never_follows_other_tokens_than_it_was_sampled_for(
    local: LocalService, engine: WatchedEngine
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([1, 2, 3])
        answers = [asyncio.ensure_future(ctx.sample(episode, SAMPLED)) for _ in range(2)]
        await asyncio.wait(answers)
        (refused,) = [answer.exception() for answer in answers if answer.exception()]
        assert isinstance(refused, InputError)
        assert refused.path == "episode"
        episode.reward = float(ctx.member)
        return episode

    async with Async().connected(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = await service.create_lora_training_client(engine.name, rank=8)
        async with trainer.rollouts(rollout, range(2), **PAIRS) as stream:
            (batch,) = await loop(trainer, stream)
    assert {episode.sampled_tokens for episode in batch.episodes} == {4}
    assert {episode.turns for episode in batch.episodes} == {1}


async def test_examples_are_those_of_an_independent_computation(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([task + 1, 20, 30])
        for _ in range(3):
            await ctx.sample(episode, SAMPLED)
            episode.observe([40, 41])
        episode.reward = [0.1, 0.7, 0.4][ctx.member]
        return episode

    options = {"group_size": 3, "groups_per_step": 2, "max_staleness": 0}
    async with trainer.rollouts(rollout, range(4), advantages="leave_one_out", **options) as stream:
        async for batch in stream:
            outputs = (await (await trainer.forward(batch.data, "ppo"))).loss_fn_outputs
            each = zip(batch.data, batch.episodes, outputs, strict=True)
            for number, (datum, episode, output) in enumerate(each):
                reward = [0.1, 0.7, 0.4][number % 3]
                advantage = reward - (1.2 - reward) / 2
                tokens, sampled = episode.tokens, [False] * 3 + ([True] * 4 + [False] * 2) * 3
                scores = [logprob(a, b, batch.step) for a, b in pairwise(tokens)]
                assert datum.model_input.to_ints() == tokens[:-1]
                assert datum.loss_fn_inputs.keys() == {"target_tokens", "logprobs", "advantages"}
                assert datum.loss_fn_inputs["target_tokens"].data == tokens[1:]
                assert datum.loss_fn_inputs["advantages"].data == pytest.approx(
                    [advantage * is_sampled for is_sampled in sampled[1:]]
                )
                assert datum.loss_fn_inputs["logprobs"].data == pytest.approx(
                    [score * is_sampled for score, is_sampled in zip(scores, sampled[1:], strict=True)], abs=1e-6
                )
                assert output["logprobs"].data == pytest.approx(scores, abs=2e-3)
            await train_on(trainer, stream, batch)


async def test_members_share_their_replica_and_have_seeds_of_their_own(
    trainer: TrainingClient, local: LocalService, jobs: list[SampleJob]
) -> None:
    requests = local.faults.watch("POST */sample", times=100)

    async def seeds(**options: Any) -> set[tuple[int, int | None]]:
        """Return the first token of each prompt, which tells the task, with the seed of the request."""
        jobs.clear()
        requests.clear()
        async with trainer.rollouts(one_turn, range(3), group_size=4, groups_per_step=3, **options) as stream:
            await loop(trainer, stream)
        assert len({request.headers[AFFINITY] for request in requests}) == 3
        return {(job.prompt.to_ints()[0], job.params.seed) for job in jobs}

    assert await seeds() == {(1, None), (2, None), (3, None)}
    seeded = await seeds(seed=5)
    assert await seeds(seed=5) == seeded
    assert len({seed for _, seed in seeded}) == 12
    assert not seeded & await seeds(seed=6)


async def test_one_request_may_sample_a_whole_group(trainer: TrainingClient, jobs: list[SampleJob]) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> list[Episode | None]:
        episodes: list[Episode | None] = list(await ctx.sample_group([task + 1, 20, 30], SAMPLED))
        for rank, episode in enumerate(episodes):
            assert episode is not None
            episode.reward = float(rank)
        return [None, *episodes[1:]]

    tolerant = FailurePolicy(min_group_size=3)
    async with trainer.rollouts(
        rollout, range(4), group_size=4, groups_per_step=2, unit="group", on_failure=tolerant
    ) as stream:
        batches = await loop(trainer, stream)
    assert [job.num_samples for job in jobs] == [4] * 4
    assert [group.rewards for batch in batches for group in batch.groups] == [[1.0, 2.0, 3.0]] * 4
    assert batches[0].groups[0].advantages == [-1.0, 0.0, 1.0]


async def test_advantages_may_be_a_function(trainer: TrainingClient) -> None:
    def doubled(rewards: list[float]) -> list[float]:
        return [2 * each for each in group_advantages(rewards)]

    async with trainer.rollouts(one_turn, range(2), advantages=doubled, **PAIRS) as stream:
        (batch,) = await loop(trainer, stream)
    assert [group.advantages for group in batch.groups] == [[-1.0, 1.0]] * 2


@pytest.mark.parametrize("kind", [np.float32, np.array, np.bool_, bool], ids=["float32", "array", "np.bool", "bool"])
async def test_rewards_are_floats_whatever_they_were(trainer: TrainingClient, kind: Any) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = await one_turn(ctx, task)
        episode.reward = kind(ctx.member)
        return episode

    async with trainer.rollouts(rollout, range(2), **PAIRS) as stream:
        (batch,) = await loop(trainer, stream)
    assert batch.groups[0].rewards == [0.0, 1.0]
    assert {type(each) for each in batch.groups[0].rewards} == {float}
    assert type(batch.metrics["reward/mean"]) is type(batch.metrics["reward/trained_mean"]) is float


# --- batches ---------------------------------------------------------------------------------------------------------


async def test_a_step_may_come_in_parts(trainer: TrainingClient, engine: WatchedEngine) -> None:
    options = {"group_size": 2, "groups_per_step": 4, "minibatches": 2, "max_staleness": 0}
    parts = []
    async with trainer.rollouts(one_turn, range(11), **options) as stream:
        async for batch in stream:
            parts.append((batch.step, len(batch.groups), batch.is_last_of_step))
            await trainer.forward_backward(batch.data, "ppo")
            if batch.is_last_of_step:
                await trainer.optim_step(AdamParams())
                await stream.publish()
        assert stream.state().pending == []
    assert parts == [(0, 2, False), (0, 2, True), (1, 2, False), (1, 2, True), (2, 2, False), (2, 1, True)]
    assert [kind for kind, _ in engine.done].count("optim_step") == 3


async def test_no_part_is_handed_out_of_a_step_that_is_left_out(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode | None:
        return None if task == 7 else await one_turn(ctx, task)  # so that the second step lacks a group

    options = {"group_size": 2, "groups_per_step": 4, "minibatches": 2, "max_staleness": 0, "drop_last": True}
    parts = []
    async with trainer.rollouts(rollout, range(8), **options) as stream:
        async for batch in stream:
            parts.append((tasks_of([batch]), batch.is_last_of_step))
            if batch.is_last_of_step:
                await stream.publish()
        assert stream.state().pending == [4, 5, 6]
    assert [(len(tasks), is_last) for tasks, is_last in parts] == [(2, False), (2, True)]
    assert sorted(index for tasks, _ in parts for index in tasks) == [0, 1, 2, 3]


async def test_the_last_step_may_be_short_or_left_out(trainer: TrainingClient) -> None:
    async def lengths(count: int, **options: Any) -> list[int]:
        async with trainer.rollouts(one_turn, numbers(count), group_size=2, groups_per_step=3, **options) as stream:
            batches = await loop(trainer, stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        return [len(batch.groups) for batch in batches]

    async def numbers(count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    assert await lengths(0) == []
    assert await lengths(7) == [3, 3, 1]
    assert await lengths(7, drop_last=True) == [3, 3]


async def test_nothing_to_learn_is_not_trained(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode | None:
        episode = await one_turn(ctx, task)
        if task % 3 == 0:
            episode.reward = 0.7  # of all members, so there is nothing to learn
        return None if task % 3 == 1 else episode

    async with trainer.rollouts(rollout, range(12), max_staleness=0, **PAIRS) as stream:
        batches = await loop(trainer, stream)
        assert [stream.gate.dropped, stream.gate.accepted, stream.gate.failed] == [8, 4, 0]
    assert sorted(tasks_of(batches)) == [2, 5, 8, 11]
    seen = sum(batch.metrics["reward/mean"] for batch in batches)
    assert seen > sum(batch.metrics["reward/trained_mean"] for batch in batches) == 1.0
    # Two groups are admitted at a time, so the batch comes after the group that is dropped.
    async with trainer.rollouts(rollout, range(3), max_staleness=0, keep_constant_groups=True, **PAIRS) as stream:
        (batch,) = await loop(trainer, stream)
    assert tasks_of([batch]) == [0, 2]
    assert batch.metrics["groups/constant_share"] == pytest.approx(1 / 3)


async def test_a_report_tells_of_the_batch_and_of_its_training(trainer: TrainingClient, local: LocalService) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = await one_turn(ctx, task)
        episode.metrics["member"] = ctx.member
        return episode

    local.faults.answer("POST */sample", 429, {"error": "later"}, times=2)
    async with trainer.rollouts(rollout, range(2), limit=Limiter(3), **PAIRS) as stream:
        batch = await anext(stream)
        result = await (await trainer.step(batch.data, "ppo", AdamParams(learning_rate=0.5)))
        report = batch.report(result)
    assert result.loss == result.forward_backward.loss == report["train/loss"]
    assert result.metrics["learning_rate"] == report["train/learning_rate"] == 0.5
    assert report["drift/kl_sample_train_k3"] == pytest.approx(0.0, abs=1e-9)
    assert report["drift/n_action_tokens"] == 16
    names = """
        step version reward/mean reward/trained_mean groups/submitted groups/accepted groups/dropped groups/failed
        groups/running groups/constant_share episodes/retries staleness/mean staleness/max staleness/token_mean
        staleness/token_max episode/tokens_mean episode/tokens_max episode/turns_mean episode/truncated_share
        time/step time/trainer_wait idle/trainer idle/sampler sampler/limit sampler/in_flight sampler/rejections
        loop/lag_max
    """
    assert batch.metrics.keys() == {*names.split(), "episode/member"}
    assert report["episode/member"] == 0.5
    assert report["sampler/rejections"] == 2
    assert batch.metrics.items() <= report.items()
    assert report["sampler/limit"] == 3
    assert report["episode/tokens_mean"] == report["episode/tokens_max"] == 4


# --- a step of training ----------------------------------------------------------------------------------------------


async def test_a_step_is_one_turn(trainer: TrainingClient, engine: WatchedEngine) -> None:
    step, forward = await asyncio.gather(
        trainer.step([example(1)], "cross_entropy", AdamParams(learning_rate=0.5)), trainer.forward([example(2)])
    )
    result = await step
    await forward
    step_done, forward_done = [("forward_backward", 1), ("optim_step", 0.5)], [("forward", 2)]
    # In the blocking form, two threads make the calls.
    assert engine.done in (step_done + forward_done, forward_done + step_done)
    assert result.optim.metrics is not None
    assert result.metrics == result.forward_backward.metrics | result.optim.metrics


async def test_without_the_pass_there_is_no_step(
    trainer: TrainingClient, engine: WatchedEngine, local: LocalService
) -> None:
    invalid: list[tuple[Any, Any]] = [([7], AdamParams()), ([example()], {"learning_rate": 0.5})]
    for data, params in invalid:
        with pytest.raises(InputError):
            await trainer.step(data, "cross_entropy", params)
    local.faults.answer(f"POST */{trainer.run_id}/forward_backward", 400, {"error": "no pass"})
    with pytest.raises(BadRequestError, match="no pass"):
        await trainer.step([example()], "cross_entropy", AdamParams())
    local.faults.answer(f"POST */{trainer.run_id}/optim_step", 400, {"error": "no step"})
    with pytest.raises(BadRequestError, match="no step") as caught:
        await trainer.step([example()], "cross_entropy", AdamParams())
    assert "only optim_step has to be repeated" in caught.value.__notes__[0]
    await (await trainer.optim_step(AdamParams(learning_rate=0.5)))
    assert engine.done == [("forward_backward", 1), ("optim_step", 0.5)]


async def test_a_pass_that_fails_later_is_the_error_of_the_step(trainer: TrainingClient) -> None:
    step = await trainer.step([REFUSED], "cross_entropy", AdamParams())
    for _ in range(2):
        with pytest.raises(RemoteOpError):
            await step
    assert await trainer.policy_version() == 1


# --- publishing ------------------------------------------------------------------------------------------------------


async def test_a_loop_that_never_publishes_is_told_so(trainer: TrainingClient) -> None:
    async with trainer.rollouts(one_turn, range(100), max_staleness=1, **PAIRS) as stream:
        handed_out = [await anext(stream), await anext(stream)]
        assert len(tasks_of(handed_out)) == 4
        with pytest.raises(RolloutError, match="publish"):
            await anext(stream)
        await stream.publish()
        assert (await anext(stream)).step == 2


async def test_publishing_need_not_be_waited_for(trainer: TrainingClient, engine: WatchedEngine) -> None:
    async with trainer.rollouts(one_turn, range(100), max_staleness=0, **PAIRS) as stream:
        batch = await anext(stream)
        engine.training.clear()
        step = await trainer.step(batch.data, "ppo", AdamParams())
        await stream.publish(wait=False)
        assert stream.version == 0
        engine.training.set()
        following = await anext(stream)
        assert following.metrics["version"] == stream.version == stream.policy_version == 1
        await step


async def test_a_publication_whose_caller_is_cancelled_takes_effect(
    trainer: TrainingClient, engine: WatchedEngine, local: LocalService
) -> None:
    async with trainer.rollouts(one_turn, range(100), max_staleness=0, **PAIRS) as stream:
        batch = await anext(stream)
        engine.training.clear()
        step = await trainer.step(batch.data, "ppo", AdamParams())
        saves = local.faults.watch(f"POST */{trainer.run_id}/save_weights_for_sampler")
        publishing = asyncio.ensure_future(stream.publish())
        await eventually(lambda: saves)
        publishing.cancel()
        await asyncio.wait([publishing])
        assert publishing.cancelled()
        engine.training.set()
        await step
        assert (await anext(stream)).step == stream.version == 1


async def test_a_failed_publication_is_raised_once(
    trainer: TrainingClient, local: LocalService, engine: WatchedEngine
) -> None:
    async with trainer.rollouts(one_turn, range(100), max_staleness=0, **PAIRS) as stream:
        await train_on(trainer, stream, await anext(stream))
        batch = await anext(stream)
        await trainer.step(batch.data, "ppo", AdamParams())
        local.faults.answer("GET */sync/trainers_policy_version", 403, {"error": "hands off"})
        await stream.publish(wait=False)
        with pytest.raises(PermissionDeniedError, match="hands off"):
            await anext(stream)
        await stream.publish()
        assert (await anext(stream)).step == 2


# --- leaving ---------------------------------------------------------------------------------------------------------


class LeaveError(Exception):
    """How one test leaves a stream."""


@pytest.mark.parametrize("way", ["break", "error", "cancel"])
async def test_nothing_outlives_the_stream(way: str, trainer: TrainingClient, engine: WatchedEngine) -> None:
    limiter = Limiter(3)
    threads = threads_of_rollouts()
    released = threading.Event()

    def grade() -> None:
        released.wait(20.0)

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        if task == 1:
            await ctx.run(grade)
        return await one_turn(ctx, task)

    async def consume() -> None:
        async with trainer.rollouts(rollout, range(10), limit=limiter, **PAIRS) as stream:
            await eventually(lambda: engine.waiting_samples == 3 and limiter.waiting > 0)
            if way == "error":
                released.set()
                raise LeaveError
            if way == "cancel":
                await anext(stream)
            released.set()

    before = asyncio.all_tasks()
    engine.hold_samples()
    consumer = asyncio.ensure_future(consume())
    if way == "cancel":
        await eventually(lambda: engine.waiting_samples == 3 and limiter.waiting > 0)
        consumer.cancel()
        released.set()
    (outcome,) = await asyncio.gather(consumer, return_exceptions=True)
    assert isinstance(outcome, {"break": type(None), "error": LeaveError, "cancel": asyncio.CancelledError}[way])
    assert asyncio.all_tasks() == before
    assert [limiter.in_flight, limiter.waiting] == [0, 0]
    assert threads_of_rollouts() == threads
    await eventually(lambda: engine.waiting_samples == 0)


async def test_leaving_ends_a_grader_that_hangs(trainer: TrainingClient, tmp_path: Path) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = await one_turn(ctx, task)
        assert await ctx.run(double, 2) == 4
        await ctx.run(hang, file)
        return episode

    file = tmp_path / "pid"
    async with ProcessExecutor(1) as executor:
        async with trainer.rollouts(rollout, [1], group_size=1, groups_per_step=1, executor=executor):
            await eventually(lambda: file.exists() and file.read_text())
        await eventually(lambda: not is_alive(int(file.read_text())))


async def test_whole_rollouts_run_in_processes(
    trainer: TrainingClient, local: LocalService, colour: Colour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", local.api_key)
    monkeypatch.setattr(FailurePolicy, "pause_before", lambda *_: 0.01)
    executor = colour.module.ProcessExecutor(1)
    async with colour.adopt(executor):
        await check_whole_rollouts_elsewhere(trainer, executor, tmp_path)


async def test_a_stream_belongs_to_its_block(trainer: TrainingClient) -> None:
    stream = trainer.rollouts(one_turn, range(4), **PAIRS)
    for use in (stream.publish(), stream.save("x"), stream.evaluate(one_turn, [1]), anext(stream)):
        with pytest.raises(ClosedError, match="not open"):
            await use
    async with stream:
        assert stream.sampler is not None
    with pytest.raises(ClosedError, match="not open"):
        await anext(stream)
    with pytest.raises(ClosedError, match="only once"):
        async with stream:
            pass


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_size", 0),
        ("groups_per_step", 0),
        ("max_staleness", -1),
        ("run_ahead", 2),
        ("minibatches", 3),
        ("unit", "turn"),
        ("advantages", "best"),
        ("episode_timeout", 0),
        ("max_episode_tokens", 1),
        ("seed", -1),
        ("name", "a/b"),
        ("limit", 0),
        ("executor", object()),
        ("on_failure", FailurePolicy(min_group_size=3)),
        ("state", {}),
        ("rollout", 3),
        ("tasks", 3),
    ],
)
def test_bad_options_are_refused_at_once(trainer: TrainingClient, field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{field}"):
        trainer.rollouts(**{"rollout": one_turn, "tasks": range(4), **PAIRS, field: value})
