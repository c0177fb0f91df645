"""Rollouts that fail: what is repeated, what a group can spare, and when there are too many."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from loops_async import (
    Episode,
    FailurePolicy,
    InputError,
    RolloutContext,
    RolloutError,
    RolloutState,
    SamplingParams,
    TrainingClient,
)
from loops_async._rollouts import watch
from loops_async._waiting import HoldWarning
from loops_local import LocalService
from tests.support.colours import Async
from tests.support.engines import WatchedEngine
from tests.support.rollouts import PAIRS, loop, one_turn, tasks_of
from tests.support.work import eventually


class OddError(Exception):
    """An error that would come again."""


class PassingError(Exception):
    """An error that `retry_on` names."""


def rewarded(episode: Episode, reward: float = 1.0) -> Episode:
    episode.reward = reward
    return episode


@pytest.mark.parametrize(
    "error", [ConnectionError("cut"), TimeoutError("slow"), asyncio.CancelledError(), PassingError("once")], ids=repr
)
async def test_what_may_pass_is_repeated(error: BaseException, trainer: TrainingClient) -> None:
    attempts: Counter[tuple[int, int]] = Counter()

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        attempts[task, ctx.member] += 1
        assert ctx.attempt == attempts[task, ctx.member] - 1
        if task == 1 and ctx.attempt < 2:
            raise error
        return await one_turn(ctx, task)

    policy = FailurePolicy(retry_on=(PassingError,))
    async with trainer.rollouts(rollout, range(4), on_failure=policy, **PAIRS) as stream:
        batches = await loop(trainer, stream)
    assert sorted(tasks_of(batches)) == [0, 1, 2, 3]
    assert attempts == {(task, member): 3 if task == 1 else 1 for task in range(4) for member in range(2)}
    assert batches[-1].metrics["episodes/retries"] == 4


async def test_a_sampler_that_fails_for_a_moment_costs_no_group(trainer: TrainingClient, local: LocalService) -> None:
    local.faults.answer("POST */sample", 502, "<html>bad gateway</html>", times=3)

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        return await one_turn(ctx, task)

    policy = FailurePolicy(retries=3, retry_on=(Exception,))
    async with trainer.rollouts(rollout, range(4), on_failure=policy, **PAIRS) as stream:
        batches = await loop(trainer, stream)
        assert stream.gate.failed == 0
    assert sorted(tasks_of(batches)) == [0, 1, 2, 3]


async def test_an_episode_that_takes_too_long_is_begun_again(trainer: TrainingClient, engine: WatchedEngine) -> None:
    engine.hold_samples()

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        if ctx.attempt:
            engine.release_samples()
        return await one_turn(ctx, task)

    patient = FailurePolicy(retries=1000)  # on a slow machine the second attempt may take too long, too
    async with trainer.rollouts(rollout, range(2), episode_timeout=0.2, on_failure=patient, **PAIRS) as stream:
        batches = await loop(trainer, stream)
    assert sorted(tasks_of(batches)) == [0, 1]


async def test_a_failure_cancels_the_other_members_at_the_service(
    trainer: TrainingClient, engine: WatchedEngine
) -> None:
    engine.hold_samples()

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        if task == 0 and ctx.member == 3:
            await eventually(lambda: engine.waiting_samples == 7)
            raise OddError
        return await one_turn(ctx, task)

    async with trainer.rollouts(rollout, range(2), group_size=4, groups_per_step=1) as stream:
        await eventually(lambda: stream.gate.failed == 1)
        await eventually(lambda: engine.waiting_samples == 4)
        await eventually(lambda: [group.index for group in stream.running()] == [1])
        engine.release_samples()
        assert tasks_of(await loop(trainer, stream)) == [1]


async def test_a_group_may_spare_some_members(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode | None:
        if ctx.member == 0:
            raise OddError
        if ctx.member == 1 and task == 1:
            raise OddError
        if ctx.member == 1 and task == 2:
            return None
        return await one_turn(ctx, task)

    policy = FailurePolicy(min_group_size=3)
    async with trainer.rollouts(rollout, range(3), group_size=4, groups_per_step=1, on_failure=policy) as stream:
        (batch,) = await loop(trainer, stream)
        assert [stream.gate.failed, stream.gate.dropped] == [2, 0]
    assert tasks_of([batch]) == [0]
    assert len(batch.episodes) == 3


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (Episode.start([1, 2]), "has no reward"),
        (rewarded(Episode.start([1, 2])), "nothing that was sampled"),
        (7, "must be an Episode"),
        ([], "must be an Episode"),
    ],
)
async def test_what_is_no_episode_ends_the_stream(returned: Any, problem: str, trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Any:
        return returned

    async with trainer.rollouts(rollout, range(100), **PAIRS) as stream:
        with pytest.raises(RolloutError, match=problem) as caught:
            await anext(stream)
        assert caught.value.failures == {"InputError": 8}
        with pytest.raises(RolloutError):
            await anext(stream)


@pytest.mark.parametrize("colour", [Async()], ids=["async"])  # loops_sync refuses the reverse, see tests/facade
async def test_a_rollout_that_is_not_async_def_is_refused(trainer: TrainingClient) -> None:
    def rollout(ctx: RolloutContext, task: int) -> Any:
        return Episode.start([1, 2])

    for plain in (rollout, partial(rollout)):
        with pytest.raises(InputError, match=r"^rollout.*must be `async def`; plain functions are for loops_sync"):
            trainer.rollouts(plain, range(2), **PAIRS)
    async with trainer.rollouts(lambda ctx, task: rollout(ctx, task), range(2), **PAIRS) as stream:
        with pytest.raises(RolloutError, match="must be `async def`; it returned Episode"):
            await anext(stream)
    async with trainer.rollouts(lambda ctx, task: one_turn(ctx, task), range(2), **PAIRS) as stream:
        assert sorted(tasks_of(await loop(trainer, stream))) == [0, 1]


async def test_too_many_failures_end_the_stream(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        if task >= 4:
            raise OddError(f"task {task}")
        return await one_turn(ctx, task)

    policy = FailurePolicy(max_failures_in_a_row=3)
    async with trainer.rollouts(rollout, range(100), max_staleness=0, on_failure=policy, **PAIRS) as stream:
        with pytest.raises(RolloutError, match="3 groups failed in a row") as caught:
            await loop(trainer, stream)
    assert caught.value.failures == {"OddError": 3}
    assert isinstance(caught.value.__cause__, OddError)


async def test_endless_tasks_without_something_to_learn_end_the_stream(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = await one_turn(ctx, task)
        episode.reward = 1.0
        return episode

    policy = FailurePolicy(max_drops_in_a_row=5)
    async with trainer.rollouts(rollout, range(1000), on_failure=policy, **PAIRS) as stream:
        with pytest.raises(RolloutError, match="dropped in a row"):
            await anext(stream)


async def test_an_error_of_the_tasks_is_raised_as_it_is(trainer: TrainingClient) -> None:
    def tasks() -> Iterator[int]:
        yield from range(4)
        raise OddError("no more files")

    async with trainer.rollouts(one_turn, tasks(), **PAIRS) as stream:
        with pytest.raises(OddError, match="no more files"):
            await loop(trainer, stream)


async def test_a_cancellation_nobody_asked_for_is_not_the_end_of_the_data(trainer: TrainingClient) -> None:
    def tasks() -> Iterator[int]:
        yield from range(4)
        raise asyncio.CancelledError

    async with trainer.rollouts(one_turn, tasks(), **PAIRS) as stream:
        with pytest.raises(RolloutError, match="CancelledError"):
            await loop(trainer, stream)


async def test_an_error_of_a_function_of_advantages_fails_the_group(trainer: TrainingClient) -> None:
    policy = FailurePolicy(max_failures_in_a_row=1)
    options: dict[str, Any] = {"advantages": lambda rewards: rewards[:1], "on_failure": policy, **PAIRS}
    async with trainer.rollouts(one_turn, range(4), **options) as stream:
        with pytest.raises(RolloutError, match="one number for each of 2"):
            await anext(stream)


@pytest.mark.parametrize("returned", [1.0, None])
async def test_a_function_of_advantages_that_returns_no_list_is_told_so(trainer: TrainingClient, returned: Any) -> None:
    policy = FailurePolicy(max_failures_in_a_row=1)
    options: dict[str, Any] = {"advantages": lambda _: returned, "on_failure": policy, **PAIRS}
    async with trainer.rollouts(one_turn, range(4), **options) as stream:
        with pytest.raises(RolloutError, match="InputError: advantages: must return one number for each reward"):
            await anext(stream)


async def test_what_was_sampled_beyond_the_limit_fails_the_group(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([1, 2, 3])
        answer = await ctx.sampler.sample(episode.tokens, 1, SamplingParams(max_tokens=8))
        return rewarded(episode.act(answer.sequences[0]), float(ctx.member))

    policy = FailurePolicy(max_failures_in_a_row=1)
    async with trainer.rollouts(rollout, range(2), max_episode_tokens=10, on_failure=policy, **PAIRS) as stream:
        with pytest.raises(RolloutError, match="tokens: has 11, with sampled ones beyond max_episode_tokens=10"):
            await anext(stream)


async def test_a_cancelled_rollout_is_not_begun_again_whatever_it_raises(
    trainer: TrainingClient, engine: WatchedEngine
) -> None:
    engine.hold_samples()
    attempts: list[int] = []

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        attempts.append(ctx.attempt)
        if task == ctx.member == 0:
            await eventually(lambda: engine.waiting_samples == 3)
            raise OddError
        try:
            return await one_turn(ctx, task)
        except asyncio.CancelledError:
            raise TimeoutError from None  # as some libraries do

    async with trainer.rollouts(rollout, range(2), **PAIRS) as stream:
        await eventually(lambda: stream.gate.failed == 1)
    assert attempts == [0, 0, 0, 0]


@pytest.mark.parametrize("unit", ["episode", "group"])
async def test_a_rollout_that_is_cancelled_by_others_is_not_lost_in_silence(local: LocalService, unit: Any) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Any:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await asyncio.sleep(0)

    async with Async().connected(base_url=local.base_url, api_key=local.api_key) as service:
        trainer = await service.create_lora_training_client("cancelled", rank=8)
        async with trainer.rollouts(rollout, range(2), unit=unit, **PAIRS) as stream:
            with pytest.raises(RolloutError, match="2 CancelledError"):
                await anext(stream)
            assert stream.gate.failed == 2


# --- the end of the tasks ---------------------------------------------------------------------------------------------


async def test_tasks_that_end_without_a_batch_raise_the_first_failure(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        if task < 2:
            raise OddError(f"task {task}")
        return rewarded(Episode.start([1, 2]))  # as if `await` before `ctx.sample` was forgotten

    async with trainer.rollouts(rollout, range(4), group_size=2, groups_per_step=1, max_staleness=0) as stream:
        for _ in range(2):
            with pytest.raises(
                RolloutError, match=r"without a batch.*: 4 failed \(2 OddError, 2 InputError\)"
            ) as caught:
                await anext(stream)
    assert caught.value.failures == {"OddError": 2, "InputError": 2}
    assert isinstance(caught.value.__cause__, OddError)
    assert str(caught.value.__cause__) == "task 0"


async def test_failures_and_drops_are_both_named(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode | None:
        if task == 0:
            raise OddError
        episode = await one_turn(ctx, task)
        if task == 1:
            episode.reward = 0.5  # of both members
        return None if task == 2 else episode

    options: dict[str, Any] = {"group_size": 2, "groups_per_step": 4, "drop_last": True}
    async with trainer.rollouts(rollout, range(4), **options) as stream:
        with pytest.raises(RolloutError, match=r"1 failed.*1 were dropped with.*1 were dropped because.*1 finished"):
            await loop(trainer, stream)


async def test_the_end_after_a_batch_raises_no_failure(
    trainer: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        if task:
            raise OddError(f"task {task}")
        return await one_turn(ctx, task)

    async with trainer.rollouts(rollout, range(4), group_size=2, groups_per_step=1, max_staleness=0) as stream:
        assert tasks_of(await loop(trainer, stream)) == [0]
        assert stream.gate.failed == 3
        state = await stream.save("end")
    (warning,) = [each for each in caplog.records if "further failures are only counted" in each.getMessage()]
    assert warning.getMessage().startswith("the rollout of task 1, member ")
    assert warning.exc_info is not None
    assert repr(warning.exc_info[1]) == "OddError('task 1')"

    # A restored stream has had its batches before.
    async with trainer.rollouts(rollout, range(5), group_size=2, groups_per_step=1, state=state) as stream:
        assert await loop(trainer, stream) == []
        assert stream.gate.failed == 4
    assert any("without a batch" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (0.5, "3 were dropped with nothing to learn, e.g. because the rewards are equal (keep_constant_groups=True"),
        (None, "3 were dropped because too many members are None (see FailurePolicy.min_group_size)"),
    ],
)
async def test_the_end_without_a_batch_is_warned_of_once(
    reward: float | None, said: str, trainer: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode | None:
        episode = await one_turn(ctx, task)
        return None if reward is None else rewarded(episode, reward)

    async with trainer.rollouts(rollout, range(3), **PAIRS) as stream:
        for _ in range(2):
            assert await loop(trainer, stream) == []
    (warning,) = [message for message in caplog.messages if "without a batch" in message]
    assert said in warning


async def test_tasks_that_are_used_up_are_warned_of(trainer: TrainingClient, caplog: pytest.LogCaptureFixture) -> None:
    used_up = iter(range(0))
    async with trainer.rollouts(one_turn, used_up, **PAIRS) as stream:
        assert await loop(trainer, stream) == []
    assert any("`tasks` is empty" in message for message in caplog.messages)


async def test_fewer_tasks_than_the_state_has_are_warned_of(
    trainer: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    state = RolloutState(version=1, next_index=4, pending=[1, 3])
    async with trainer.rollouts(one_turn, range(2), state=state, **PAIRS) as stream:
        assert tasks_of(await loop(trainer, stream)) == [1]
    (warning,) = [message for message in caplog.messages if message.startswith("`tasks` ended after 2")]
    assert "4 had been begun" in warning


# --- warnings --------------------------------------------------------------------------------------------------------


async def test_waiting_for_a_batch_speaks(
    trainer: TrainingClient,
    engine: WatchedEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 0.01)
    engine.hold_samples()
    async with trainer.rollouts(one_turn, range(2), **PAIRS) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        said = "2 groups are under way, with 4 sequences in flight; the oldest: task 0 ("
        await eventually(lambda: any(said in message for message in caplog.messages))
        await eventually(lambda: len(caplog.messages) >= 2)
        engine.release_samples()
        await waiting


async def test_a_reshaped_distribution_is_warned_of_once(
    trainer: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([task + 1, 2])
        await ctx.sample(episode, SamplingParams(max_tokens=2, temperature=0.7, top_k=5))
        episode.reward = float(ctx.member)
        return episode

    async with trainer.rollouts(rollout, range(4), **PAIRS) as stream:
        await (await stream.evaluate(rollout, [1]))
        await loop(trainer, stream)
    (warning,) = caplog.messages
    assert "temperature=0.7, top_k=5" in warning


@pytest.mark.parametrize("colour", [Async()], ids=["async"])  # a blocking rollout holds up its own thread only
async def test_a_held_event_loop_is_warned_of(
    trainer: TrainingClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watch, "HELD_SECONDS", 0.05)
    monkeypatch.setattr(watch, "hold_warning", HoldWarning())

    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = await one_turn(ctx, task)
        if task == ctx.member == 0:
            time.sleep(0.2)  # noqa: ASYNC251 - the mistake that is warned of
        return episode

    async with trainer.rollouts(rollout, range(2), **PAIRS) as stream:
        batch = await anext(stream)
    assert batch.metrics["loop/lag_max"] > 0.05
    assert any("held the event loop" in message for message in caplog.messages)
