"""Agents in a stream of rollouts: they return a reward, and what they sampled is trained."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

import loops_sync
from loops_async import (
    AgentRollout,
    Budget,
    BudgetExceededError,
    ConfigError,
    Episode,
    FailurePolicy,
    InputError,
    RolloutContext,
    RolloutError,
    ServiceClient,
    TrainingClient,
)
from loops_local import LocalService
from tests.support import openai_stub
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.rollouts import PAIRS, loop, tasks_of
from tests.support.templates import SMOLLM2
from tests.support.work import eventually

AGENTS: dict[str, Any] = {"tokenizer": ByteTokenizer(SMOLLM2), "defaults": {"max_tokens": 4}, "grace": 0.0}


async def ask(ctx: RolloutContext, *messages: dict[str, Any]) -> Any:
    """Send a chat request as any client would."""
    headers = {"authorization": f"Bearer {ctx.openai.api_key}"}
    url = f"{ctx.openai.base_url}/chat/completions"
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(url, json={"messages": messages}) as answer,
    ):
        assert answer.status == 200, await answer.text()
        return (await answer.json())["choices"][0]["message"]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": str(text)}


async def two_turns(ctx: RolloutContext, task: int) -> float:
    reply = await ask(ctx, user(task))
    await ask(ctx, user(task), reply, user("more"))
    return float(ctx.member % 2)


async def test_what_an_agent_sampled_is_trained_with_its_reward(trainer: TrainingClient) -> None:
    async with trainer.rollouts(two_turns, range(4), agents=AGENTS, **PAIRS) as stream:
        batches = await loop(trainer, stream)
    assert len(batches) == 2
    for batch in batches:
        assert [group.rewards for group in batch.groups] == [[0.0, 1.0], [0.0, 1.0]]
        assert len(batch.data) == len(batch.episodes) == 4
        for episode, datum in zip(batch.episodes, batch.data, strict=True):
            assert (episode.turns, episode.sampled_tokens, episode.is_truncated) == (2, 8, True)
            assert datum.model_input.to_ints() == episode.tokens[:-1]
            assert sum(advantage != 0 for advantage in datum.loss_fn_inputs["advantages"].data) == 8
    assert batches[1].metrics["staleness/token_max"] <= 1


async def test_the_branches_of_a_conversation_are_further_examples(trainer: TrainingClient) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> float:
        for text in ("one", "other"):
            await ask(ctx, user(task), user(text))
        return float(ctx.member % 2)

    async with trainer.rollouts(rollout, range(2), agents=AGENTS, **PAIRS) as stream:
        [batch] = await loop(trainer, stream)
    assert [len(episode.branches) for episode in batch.episodes] == [1] * 4
    assert [episode.sampled_tokens for episode in batch.episodes] == [8] * 4
    sequences = [each for episode in batch.episodes for each in (episode, *episode.branches)]
    assert [datum.model_input.to_ints() for datum in batch.data] == [each.tokens[:-1] for each in sequences]
    assert batch.metrics["episode/tokens_mean"] == 8


async def test_a_rollout_that_has_ended_is_closed_however_it_ended(trainer: TrainingClient) -> None:
    seen: list[Any] = []

    async def rollout(ctx: RolloutContext, task: int) -> float:
        await ask(ctx, user(task))
        seen.append(ctx.openai)
        if ctx.attempt == 0:
            raise OSError("the environment broke")
        return float(ctx.member % 2)

    policy = FailurePolicy(retries=1, retry_on=(OSError,))
    async with trainer.rollouts(rollout, range(2), agents=AGENTS, on_failure=policy, **PAIRS) as stream:
        async for _ in stream:
            assert len(seen) == 8
            assert len({each.id for each in seen}) == 8  # each attempt has a record of its own
            assert all(each.closed for each in seen)
            break


@pytest.mark.parametrize("end", ["returns", "fails", "is cancelled"])
async def test_however_a_rollout_ends_its_samples_are_cancelled(
    trainer: TrainingClient, engine: WatchedEngine, end: str
) -> None:
    """Also those of calls that the agent has begun and does not wait for."""
    engine.hold_samples()
    agents: list[AgentRollout] = []
    calls: list[asyncio.Task[Any]] = []

    async def rollout(ctx: RolloutContext, task: int) -> float:
        agents.append(ctx.openai)
        calls.append(asyncio.create_task(ask(ctx, user(task))))
        await eventually(lambda: engine.waiting_samples == 2)
        asked.set()
        if end == "fails":
            raise OSError("the environment broke")
        if end == "is cancelled":
            await asyncio.Event().wait()
        return 1.0

    asked = asyncio.Event()
    once = FailurePolicy(retries=0)
    async with trainer.rollouts(rollout, range(1), agents=AGENTS, on_failure=once, **PAIRS) as stream:
        if end == "is cancelled":
            await asked.wait()
        else:
            with suppress(RolloutError):  # where all have failed
                assert await loop(trainer, stream) == []
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all("rollout_closed" in str(each) for each in answers)
    await eventually(lambda: engine.waiting_samples == 0)
    assert [call.status for each in agents for call in each.calls] == ["cancelled"] * 2
    assert all(each.closed for each in agents)


async def test_an_agent_has_ended_before_its_client_is_closed(
    trainer: TrainingClient, engine: WatchedEngine, colour: Colour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take the end for a lost connection, and try again."""
    monkeypatch.setitem(sys.modules, "openai", openai_stub.module())
    engine.hold_samples()
    clients: list[Any] = []
    was_closed: list[bool] = []

    async def rollout(ctx: RolloutContext, task: int) -> float:
        client = colour.own(ctx.openai).openai_client()
        clients.append(client)
        try:
            await ask(ctx, user(task))
        finally:
            was_closed.append(client.is_closed)
        return 1.0

    async with trainer.rollouts(rollout, range(1), agents=AGENTS, **PAIRS):
        await eventually(lambda: engine.waiting_samples == 2)
    assert was_closed == [False] * 2
    assert all(each.is_closed for each in clients)


async def test_leaving_the_stream_cancels_the_samples_of_agents(trainer: TrainingClient, engine: WatchedEngine) -> None:
    engine.hold_samples()
    async with trainer.rollouts(two_turns, range(2), agents=AGENTS, **PAIRS):
        await eventually(lambda: engine.waiting_samples == 4)
    await eventually(lambda: engine.waiting_samples == 0)


async def test_a_blocking_agent_ends_when_its_rollout_is_cancelled(local: LocalService, engine: WatchedEngine) -> None:
    """Its thread cannot be interrupted, but its call is answered."""
    ended: list[int] = []

    def rollout(ctx: loops_sync.RolloutContext, task: int) -> float:
        body = json.dumps({"messages": [user(task)]}).encode()
        headers = {"authorization": f"Bearer {ctx.openai.api_key}", "content-type": "application/json"}
        try:
            urllib.request.urlopen(urllib.request.Request(f"{ctx.openai.base_url}/chat/completions", body, headers))
        except urllib.error.HTTPError as error:
            ended.append(error.code)
            error.close()
        return 0.0

    def run() -> None:
        with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            trainer = service.create_lora_training_client(engine.name, rank=8)
            with trainer.rollouts(rollout, range(2), agents=AGENTS, **PAIRS):
                reached.wait(60)

    reached = threading.Event()
    engine.hold_samples()
    running = asyncio.create_task(asyncio.to_thread(run))
    await eventually(lambda: engine.waiting_samples == 4)
    reached.set()
    await running
    assert ended == [410] * 4
    await eventually(lambda: engine.waiting_samples == 0)


@pytest.mark.parametrize("end", ["fails", "returns a reward"])
async def test_a_budget_ends_the_stream_whatever_the_agent_makes_of_its_error(
    service: ServiceClient, trainer: TrainingClient, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> float:
        try:
            await ask(ctx, user(task))
        except AssertionError:  # the status is not 200
            if end == "fails":
                raise OSError("what may pass") from None
        return float(ctx.member % 2)

    service.budget = Budget(samples=6)  # a step and a half
    async with trainer.rollouts(rollout, range(100), agents=AGENTS, max_staleness=0, **PAIRS) as stream:
        with pytest.raises(BudgetExceededError, match="samples=6"):
            await loop(trainer, stream)
        state = await stream.save("end")
    assert (state.version, state.pending, state.failed) == (1, [2, 3], 0)
    assert not any(said in caplog.text for said in ("has failed", "is left out"))

    service.budget = None
    async with trainer.rollouts(rollout, range(4), agents=AGENTS, state=state, **PAIRS) as stream:
        assert sorted(tasks_of(await loop(trainer, stream))) == [2, 3]


async def test_a_rollout_without_any_answer_is_left_out(
    trainer: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> float:
        assert ctx.openai.calls == []
        return 1.0

    async with trainer.rollouts(rollout, range(2), agents=AGENTS, **PAIRS) as stream:
        assert await loop(trainer, stream) == []
    assert "none of its calls was answered" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [({}, "agents"), ({"agents": {}, "unit": "group"}, "unit"), ({"agents": AGENTS}, "ctx.openai")],
)
async def test_mistakes_are_named(trainer: TrainingClient, options: dict[str, Any], problem: str) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Any:
        return 1.0 if problem == "ctx.openai" else ctx.openai

    given = {name: AGENTS if name == "agents" else each for name, each in options.items()}
    at_once = FailurePolicy(max_failures_in_a_row=1)
    with pytest.raises(RolloutError) as caught:
        async with trainer.rollouts(rollout, range(2), on_failure=at_once, **given, **PAIRS) as stream:
            await loop(trainer, stream)
    assert isinstance(caught.value.__cause__, InputError)
    assert problem in str(caught.value.__cause__)


@pytest.mark.parametrize("agents", [{"hosts": "x"}, {"history": "x"}, 3])
async def test_wrong_options_are_refused_before_anything_is_sent(trainer: TrainingClient, agents: Any) -> None:
    with pytest.raises(ConfigError, match=r"agents|history"):
        trainer.rollouts(two_turns, range(2), agents=agents, **PAIRS)


async def test_an_evaluation_may_use_agents(trainer: TrainingClient) -> None:
    async with trainer.rollouts(two_turns, range(2), agents=AGENTS, **PAIRS) as stream:
        result = await (await stream.evaluate(two_turns, range(3), group_size=2))
    assert [group.rewards for group in result.groups] == [[0.0, 1.0]] * 3
    assert all(isinstance(episode, Episode) for group in result.groups for episode in group.episodes)
