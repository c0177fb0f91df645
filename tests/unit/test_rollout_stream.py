"""The stream as a whole keeps its promises in any order of events, with a trainer and a sampler that take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loops_async import (
    Episode,
    FailurePolicy,
    Limiter,
    RolloutBatch,
    RolloutContext,
    RolloutError,
    RolloutState,
    RolloutStream,
    SampledSequence,
    SampleResponse,
    SamplingClient,
    SamplingParams,
)
from loops_async._http import retry
from loops_async._rollouts.options import Options
from loops_async._rollouts.policy import Policy

TOLERANT = FailurePolicy(
    retries=1, max_failures_in_a_row=1000, max_failure_share=1.0, window=1000, max_drops_in_a_row=1000
)


class World:
    """A trainer, and the sampler that it publishes to; how long anything takes is random, in turns of the loop."""

    run_id = "run"

    def __init__(self, random: Random, version: int) -> None:
        self.random = random
        self.trained = version
        self.served = version
        self.in_flight = 0

    async def pause(self, most: int = 6) -> None:
        for _ in range(self.random.randint(0, most)):
            await asyncio.sleep(0)

    async def max_seq_len(self) -> int | None:
        return None

    def log(self, metrics: Mapping[str, float]) -> None: ...

    async def publish(self, name: str) -> Awaitable[Policy]:
        version = self.trained
        await self.pause()
        if self.random.random() < 0.1:
            raise ConnectionError("the save was not accepted")

        async def served() -> Policy:
            await self.pause(20)
            if self.random.random() < 0.1:
                raise TimeoutError("the sampler does not serve it")
            self.served = max(self.served, version)
            return Policy(cast("SamplingClient", self), version)

        return served()

    async def freeze(self, name: str) -> Awaitable[Policy]:
        raise NotImplementedError

    async def save_state(self, name: str) -> Awaitable[str]:
        async def saved() -> str:
            return name

        return saved()

    async def sample(self, prompt: list[int], count: int, params: Any, *, affinity_key: str) -> SampleResponse:
        self.in_flight += count
        try:
            version = self.served
            await self.pause(self.random.choice([1, 5, 60]))
        finally:
            self.in_flight -= count
        sequences = [SampledSequence(tokens=[7], logprobs=[-1.0], stop_reason="stop") for _ in range(count)]
        return SampleResponse(sequences=sequences, policy_version=version)


class Ledger:
    """What became of each task, over all streams of one example."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.part: list[int] = []

    def add(self, batch: RolloutBatch) -> None:
        self.part += [group.index for group in batch.groups]
        if batch.is_last_of_step:
            self.trained += self.part
            self.part = []


async def rollout(random: Random, ctx: RolloutContext, task: int) -> Episode | None:
    episode = Episode.start([1, 2])
    for _ in range(random.randint(1, 3)):
        await ctx.sample(episode, SamplingParams(max_tokens=1))
    chance = random.random()
    if chance < 0.05:
        raise ValueError("for good")
    if chance < 0.15:
        raise ConnectionError("for now")
    if chance < 0.2:
        raise asyncio.CancelledError
    episode.reward = float(ctx.member) if task % 4 else 1.0
    return None if chance < 0.25 else episode


def check(batch: RolloutBatch, stream: RolloutStream, world: World, options: Options) -> None:
    assert batch.data
    for group in batch.groups:
        assert 0 <= batch.step - group.version <= options.max_staleness
    for episode in batch.episodes:
        versions = [version for version in episode.versions if version >= 0]
        assert versions
        assert all(batch.step - version <= options.max_staleness for version in versions)
        assert max(versions) <= world.trained
    assert stream.policy_version >= stream.version, "a publication was overtaken by an older one"
    gate = stream.gate
    assert gate.submitted == gate.accepted + gate.dropped + gate.failed + gate.running
    assert world.in_flight <= stream.limiter.limit


async def publish(stream: RolloutStream, *, wait: bool) -> None:
    """Publish, and try again when it fails."""
    while True:
        try:
            return await stream.publish(wait=wait)
        except (ConnectionError, TimeoutError):
            continue


async def run_until_left(
    options: Options, count: int, limit: int, random: Random, state: RolloutState | None, ledger: Ledger
) -> tuple[RolloutState, bool]:
    """Run one stream until its data end or it is left; return its state, and whether it has ended."""
    world = World(random, 0 if state is None else state.version)
    limiter = Limiter(limit)
    stream = RolloutStream(
        world, lambda ctx, task: rollout(random, ctx, task), range(count), options, limit=limiter, state=state
    )
    has_ended = False
    before = asyncio.all_tasks()
    try:
        async with stream:
            while random.random() > 0.1:
                try:
                    batch = await anext(stream)
                except StopAsyncIteration:
                    assert not ledger.part, "a step was begun, and has no last batch"
                    has_ended = True
                    break
                except RolloutError:  # nothing but failures, and no batch
                    assert stream.gate.failed
                    assert not ledger.trained
                    has_ended = True
                    break
                except (ConnectionError, TimeoutError):  # of a publication for which nothing waited
                    await publish(stream, wait=True)
                    continue
                check(batch, stream, world, options)
                ledger.add(batch)
                if batch.is_last_of_step:
                    world.trained += 1
                    await publish(stream, wait=options.max_staleness == 0 or random.random() < 0.5)
    except (ConnectionError, TimeoutError):  # of the first publication
        pass
    assert asyncio.all_tasks() == before
    assert [limiter.in_flight, limiter.waiting, world.in_flight] == [0, 0, 0]
    ledger.part = []
    return stream.state(), has_ended


@st.composite
def all_options(draw: st.DrawFn) -> Options:
    groups_per_step = draw(st.integers(1, 4))
    max_staleness = draw(st.integers(0, 3))
    return Options(
        group_size=draw(st.integers(2, 3)),
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        run_ahead=draw(st.integers(0, max_staleness)),
        minibatches=draw(st.sampled_from([each for each in (1, 2, 4) if groups_per_step % each == 0])),
        keep_constant_groups=draw(st.booleans()),
        drop_last=draw(st.booleans()),
        on_failure=TOLERANT,
    )


@settings(max_examples=60)
@given(options=all_options(), count=st.integers(0, 30), limit=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_promises_are_kept(options: Options, count: int, limit: int, seed: int) -> None:
    async def run() -> None:
        random, state, ledger, has_ended = Random(seed), None, Ledger(), False
        while not has_ended:
            state, has_ended = await run_until_left(options, count, limit, random, state, ledger)
        assert state is not None
        assert len(set(ledger.trained)) == len(ledger.trained)
        assert not set(ledger.trained) & set(state.pending)
        assert state.next_index == count
        assert len(ledger.trained) + state.dropped + state.failed + len(state.pending) == count
        assert not state.pending or options.drop_last

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "pause_before", lambda *_: 0.0)
        asyncio.run(asyncio.wait_for(run(), 20.0))
