"""Sampling any number of prompts: bounded, in either order, with errors raised or kept, and in processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from loops_async import (
    Adaptive,
    ConfigError,
    InputError,
    Limiter,
    SampledPrompt,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    WorkerDiedError,
)
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import eventually

TWO_TOKENS = SamplingParams(max_tokens=2)


@pytest.fixture
async def sampler(service: ServiceClient, engine: WatchedEngine) -> SamplingClient:
    return await service.create_sampling_client(engine.name)


def prompts(count: int) -> Iterator[list[int]]:
    return ([number % 200, 7] for number in range(count))


def first_token(done: SampledPrompt) -> int:
    assert done.response is not None
    return done.response.sequences[0].tokens[0]


async def test_every_prompt_is_answered_once(sampler: SamplingClient) -> None:
    seen = {
        done.index: first_token(done)
        async for done in sampler.sample_many(prompts(100), sampling_params=TWO_TOKENS, limit=16)
    }

    # The echo engine continues a prompt with its own beginning.
    assert seen == {number: number for number in range(100)}


async def test_an_order_that_is_asked_for_is_kept(sampler: SamplingClient) -> None:
    results = sampler.sample_many(prompts(60), sampling_params=TWO_TOKENS, limit=16, ordered=True)

    assert [done.index async for done in results] == list(range(60))


async def test_reads_no_further_ahead_than_the_limit(sampler: SamplingClient) -> None:
    read = 0

    def counted() -> Iterator[list[int]]:
        nonlocal read
        for prompt in prompts(1_000_000):
            read += 1
            yield prompt

    taken = 0
    async with aclosing(sampler.sample_many(counted(), sampling_params=TWO_TOKENS, limit=8)) as results:  # type: ignore[type-var]  # it is an async generator
        async for _ in results:
            taken += 1
            assert read <= taken + 8 + 1  # the one more waits for a place
            if taken == 40:
                break
    assert read <= 40 + 8 + 1


async def test_prompts_may_come_one_after_the_other(sampler: SamplingClient, colour: Colour) -> None:
    async def arriving() -> AsyncIterator[list[int]]:
        for prompt in prompts(20):
            yield prompt

    source = arriving() if colour.module.__name__ == "loops_async" else prompts(20)

    assert len([done async for done in sampler.sample_many(source, sampling_params=TWO_TOKENS)]) == 20


async def test_the_first_error_ends_it(sampler: SamplingClient) -> None:
    with pytest.raises(InputError, match="at least one token"):
        async for _ in sampler.sample_many([[1], [], [2]], sampling_params=TWO_TOKENS, ordered=True):
            pass


async def test_errors_that_are_kept_end_nothing(sampler: SamplingClient) -> None:
    results = sampler.sample_many([[1], [], [2]], sampling_params=TWO_TOKENS, ordered=True, keep_errors=True)

    first, broken, last = [done async for done in results]
    assert isinstance(broken.error, InputError)
    assert broken.response is None
    assert (first_token(first), first.error, first_token(last), last.error) == (1, None, 2, None)


async def test_errors_that_are_skipped_are_logged(sampler: SamplingClient, caplog: pytest.LogCaptureFixture) -> None:
    results = sampler.sample_many([[1], [], [2]], sampling_params=TWO_TOKENS, ordered=True, on_error="skip")

    assert [(done.index, done.error) async for done in results] == [(0, None), (2, None)]
    assert "prompt 1 is skipped: prompt: must have at least one token" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "skip", "keep_errors": True}, "on_error: contradicts keep_errors=True, which means 'return'"),
        ({"on_error": "raise", "keep_errors": True}, "on_error: contradicts keep_errors=True"),
        ({"on_error": "ignore"}, "on_error: must be 'raise', 'return' or 'skip'; got 'ignore'"),
        ({"limit": Adaptive(maximum=0)}, "limit.maximum: expected `int` >= 1; got 0"),
        ({"limit": Limiter(8), "processes": 2}, "limit: must be a number with `processes`"),
    ],
)
async def test_options_that_are_refused(sampler: SamplingClient, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        async for _ in sampler.sample_many([[1]], **options):
            pass


async def test_a_limit_counts_completions(sampler: SamplingClient, engine: WatchedEngine) -> None:
    limiter = Limiter(7)
    engine.hold_samples()

    async def indices() -> list[int]:
        return [done.index async for done in sampler.sample_many(prompts(9), num_samples=3, limit=limiter)]

    sampling = asyncio.ensure_future(indices())
    await eventually(lambda: engine.waiting_samples == 2 and limiter.waiting == 3)
    assert (limiter.limit, limiter.in_flight) == (7, 6)
    engine.release_samples()

    assert sorted(await sampling) == [*range(9)]
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


async def test_a_limiter_is_shared(sampler: SamplingClient, engine: WatchedEngine) -> None:
    limiter = Limiter(4)
    engine.hold_samples()

    async def count() -> int:
        return len([done async for done in sampler.sample_many(prompts(9), limit=limiter)])

    sampling = asyncio.gather(count(), count())
    await eventually(lambda: engine.waiting_samples == 4 and limiter.waiting >= 2)
    engine.release_samples()

    assert await sampling == [9, 9]


async def test_leaving_early_gives_all_places_back(sampler: SamplingClient, engine: WatchedEngine) -> None:
    limiter = Limiter(4)
    async with aclosing(sampler.sample_many(prompts(50), sampling_params=TWO_TOKENS, limit=limiter)) as results:  # type: ignore[type-var]  # it is an async generator
        async for _ in results:
            engine.hold_samples()
            break

    assert (limiter.in_flight, limiter.waiting) == (0, 0)


@pytest.mark.parametrize("status", [429, 503])
async def test_rejections_within_a_sample_shrink_an_adaptive_limit(
    sampler: SamplingClient, local: LocalService, status: int
) -> None:
    limiter = Limiter(Adaptive(initial=100))
    error = {"error": {"code": "busy", "message": "too many requests"}}
    local.faults.answer("POST */sample", status, error, times=2)

    results = [done async for done in sampler.sample_many(prompts(20), sampling_params=TWO_TOKENS, limit=limiter)]

    assert len(results) == 20
    assert (limiter.rejections, limiter.limit) == (2, 85)


async def test_an_adaptive_limit_answers_every_prompt_once(sampler: SamplingClient) -> None:
    results = sampler.sample_many(
        prompts(150), sampling_params=TWO_TOKENS, limit=Adaptive(initial=1, maximum=8), ordered=True
    )

    assert [(done.index, first_token(done)) async for done in results] == [(number, number) for number in range(150)]


async def test_a_source_that_fails_is_heard(sampler: SamplingClient) -> None:
    def broken() -> Iterator[list[int]]:
        yield [1]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        async for _ in sampler.sample_many(broken(), sampling_params=TWO_TOKENS):
            pass


async def test_a_limit_is_positive(sampler: SamplingClient) -> None:
    with pytest.raises(InputError, match="limit: must be a whole number of at least 1; got 0"):
        async for _ in sampler.sample_many([[1]], limit=0):
            pass


async def test_processes_share_the_work(
    sampler: SamplingClient, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", local.api_key)
    results = sampler.sample_many(
        prompts(40), sampling_params=TWO_TOKENS, limit=16, ordered=True, processes=2, keep_errors=True
    )

    assert [(done.index, first_token(done)) async for done in results] == [(number, number) for number in range(40)]


async def test_a_process_that_dies_fails_the_prompts_that_it_had(
    sampler: SamplingClient, local: LocalService, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", local.api_key)
    others = set(multiprocessing.active_children())
    engine.hold_samples()

    async def sampled(**options: Any) -> list[SampledPrompt]:
        many = sampler.sample_many(prompts(12), sampling_params=TWO_TOKENS, limit=4, processes=1, **options)
        return [done async for done in many]

    kept, raised = asyncio.create_task(sampled(keep_errors=True)), asyncio.create_task(sampled())
    await eventually(lambda: engine.waiting_samples == 8)
    for process in set(multiprocessing.active_children()) - others:
        process.kill()
    with pytest.raises(WorkerDiedError, match="has ended with exit code -9"):
        await raised
    engine.release_samples()
    outcomes = {done.index: done for done in await kept}
    died = [number for number, done in outcomes.items() if isinstance(done.error, WorkerDiedError)]
    assert sorted(died) == [0, 1, 2, 3]
    assert all(first_token(outcomes[number]) == number for number in range(4, 12))


async def test_a_program_whose_main_module_processes_cannot_import_is_told(local: LocalService) -> None:
    program = """
import asyncio, sys, loops_async
__import__("__main__").__file__ = "<stdin>"  # as it is for a program from standard input

async def main():
    async with loops_async.ServiceClient() as service:
        sampler = await service.create_sampling_client("echo")
        try:
            async for _ in sampler.sample_many([[1]], processes=1):
                pass
        except loops_async.ConfigError as error:
            print(str(error).partition(".")[0])

asyncio.run(main())
"""
    environment = {**os.environ, "BASETEN_API_KEY": local.api_key, "LOOPS_BASE_URL": local.base_url}
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert ended.stdout == "a worker process ended with exit code 1 before it was ready\n", ended.stderr


async def test_processes_need_the_key_in_the_environment(
    sampler: SamplingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BASETEN_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="BASETEN_API_KEY"):
        async for _ in sampler.sample_many([[1]], processes=2):
            pass
