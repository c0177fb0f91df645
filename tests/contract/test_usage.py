"""What a session has used, and what a budget does about it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

import loops_async as loops
from loops_async import (
    AdamParams,
    Budget,
    BudgetExceededError,
    Datum,
    Episode,
    InputError,
    Prices,
    RolloutContext,
    SamplingParams,
    ServiceClient,
    TrainingClient,
    Usage,
)
from loops_local import LocalService, serve_in_thread
from tests.support.colours import Colour
from tests.support.engines import Engines, WatchedEngine
from tests.support.rollouts import PAIRS, loop, one_turn
from tests.support.work import FEW_TOKENS, PROMPT, eventually, example

HALF = Datum(model_input=[1, 2, 3, 4], loss_fn_inputs={"target_tokens": [2, 3, 4, 5], "weights": [0.0, 1.0, 0.5, 0.0]})


async def test_a_sample_counts_its_prompt_once_and_all_its_completions(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client("here")
    before = service.usage
    await sampler.sample(PROMPT, 3, FEW_TOKENS)
    used = service.usage - before
    assert (used.samples, used.prompt_tokens, used.completion_tokens) == (1, len(PROMPT), 3 * 4)
    assert used.requests >= 1
    assert used.bytes_sent > 0
    assert used.bytes_received > 0
    assert used.by_run[trainer.run_id].completion_tokens == 12
    assert list(used.by_run) == [trainer.run_id]


async def test_an_operation_counts_its_datums_and_what_is_trained_of_them(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    assert service.usage.operations == 0  # to make the adapter is not the program's
    await trainer.forward_backward([HALF, example()])
    await trainer.forward([HALF])
    await (await trainer.optim_step(AdamParams()))
    used = service.usage.by_run[trainer.run_id]
    assert (used.operations, used.datums, used.trained_tokens) == (3, 3, 2 + 3)
    assert (used.samples, used.completion_tokens) == (0, 0)


async def test_what_was_created_is_up_until_it_is_deactivated(service: ServiceClient, trainer: TrainingClient) -> None:
    first = service.usage
    assert first.by_run[trainer.run_id].up_seconds > 0
    await eventually(lambda: service.usage.up_seconds > first.up_seconds)
    await trainer.deactivate()
    last = service.usage.up_seconds
    assert service.usage.up_seconds == last
    assert last > first.up_seconds


async def test_retries_are_counted_and_usage_remains_when_the_client_is_closed(
    service: ServiceClient, local: LocalService, engine: WatchedEngine
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    before = service.usage
    local.faults.answer("POST */sample", 429, {"error": "slow down"}, headers={"Retry-After": "0"}, times=2)
    await sampler.sample(PROMPT, 1, FEW_TOKENS)
    used = service.usage - before
    assert (used.retries, used.requests, used.samples) == (2, 3, 1)
    await service.close()
    assert service.usage.samples == 1


async def test_samples_of_a_queue_count_as_well(colour: Colour, engines: Engines) -> None:
    with serve_in_thread(engine=engines, serverless=True, provisioning_seconds=0.0, poll_hold_seconds=0.05) as local:
        async with colour.connected(
            base_url=local.base_url, api_key=local.api_key, budget=Budget(completion_tokens=6)
        ) as service:
            sampler = await service.create_sampling_client("queued")
            await sampler.sample(PROMPT, 2, SamplingParams(max_tokens=3))
            assert (service.usage.prompt_tokens, service.usage.completion_tokens) == (len(PROMPT), 6)
            with pytest.raises(BudgetExceededError):
                await sampler.sample(PROMPT, 1, FEW_TOKENS)


# --- budgets ---


async def test_beyond_a_budget_nothing_is_sent(colour: Colour, local: LocalService, engine: WatchedEngine) -> None:
    async with colour.connected(base_url=local.base_url, api_key=local.api_key, budget=Budget(samples=2)) as service:
        sampler = await service.create_sampling_client(engine.name)
        sent = local.faults.watch("POST */sample", times=5)
        for _ in range(2):
            await sampler.sample(PROMPT, 1, FEW_TOKENS)
        with pytest.raises(
            BudgetExceededError, match=r"sample was not sent.*samples=2: 2 are used.*at least 3"
        ) as raised:
            await sampler.sample(PROMPT, 1, FEW_TOKENS)
        assert (raised.value.limit, raised.value.most, raised.value.used, raised.value.would_be) == ("samples", 2, 2, 3)
        assert not raised.value.retryable
        assert len(sent) == 2
        service.budget = None
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
        assert len(sent) == 3
        local.faults.clear()


async def test_what_is_under_way_counts_with_all_that_it_may_generate(
    service: ServiceClient, engine: WatchedEngine
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    service.budget = Budget(completion_tokens=8)
    engine.hold_samples()
    samples = [asyncio.ensure_future(sampler.sample(PROMPT, 1, FEW_TOKENS)) for _ in range(5)]
    await eventually(lambda: sum(sample.done() for sample in samples) == 3)
    await eventually(lambda: engine.waiting_samples == 2)
    engine.release_samples()
    outcomes = await asyncio.gather(*samples, return_exceptions=True)
    assert [type(each) for each in outcomes].count(BudgetExceededError) == 3
    assert service.usage.completion_tokens == 8


async def test_what_ends_without_an_answer_is_free_again(service: ServiceClient, engine: WatchedEngine) -> None:
    sampler = await service.create_sampling_client(engine.name)
    service.budget = Budget(samples=1)
    engine.hold_samples()
    for _ in range(2):
        with pytest.raises(loops.LoopsError, match="no answer within"):
            await sampler.sample(PROMPT, 1, FEW_TOKENS, timeout=0.01)
    engine.release_samples()
    await sampler.sample(PROMPT, 1, FEW_TOKENS)


async def test_a_refused_operation_takes_no_place_and_what_was_trained_can_be_saved(
    service: ServiceClient, trainer: TrainingClient, local: LocalService, engine: WatchedEngine
) -> None:
    service.budget = Budget(trained_tokens=5)
    await trainer.forward_backward([HALF, example()])
    sent = local.faults.watch(f"POST */{trainer.run_id}/forward*", times=2)
    with pytest.raises(BudgetExceededError, match=r"trained_tokens=5.*at least 8"):
        await trainer.forward_backward([example()])
    await (await trainer.optim_step(AdamParams()))
    await (await trainer.save_state("kept"))
    assert sent == []
    assert [name for name, _ in engine.done] == ["forward_backward", "optim_step"]
    service.budget = Budget(operations=3)
    with pytest.raises(BudgetExceededError, match="operations=3"):
        await trainer.optim_step(AdamParams())
    local.faults.clear()


async def test_a_budget_of_costs_says_what_a_call_would_have_cost(
    service: ServiceClient, engine: WatchedEngine
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    prices = Prices(completion=1_000_000.0)  # one for each token
    service.budget = Budget(cost=4.0, prices=prices)
    await sampler.sample(PROMPT, 1, FEW_TOKENS)
    assert service.usage.cost(prices) == 4.0
    with pytest.raises(BudgetExceededError, match=r"cost=4: 4 are used.*would have cost at least 1\.") as raised:
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
    assert raised.value.limit == "cost"


async def test_a_budget_can_warn_once_or_ask(
    service: ServiceClient, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    service.budget = Budget(samples=0, on_exceeded="warn")
    for _ in range(2):
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
    said = [one for one in caplog.records if one.levelno == logging.WARNING and "samples=0" in one.getMessage()]
    assert len(said) == 1

    asked: list[BudgetExceededError] = []

    def refuse_the_second(error: BudgetExceededError) -> None:
        asked.append(error)
        if len(asked) == 2:
            raise error

    service.budget = Budget(samples=0, on_exceeded=refuse_the_second)
    await sampler.sample(PROMPT, 1, FEW_TOKENS)
    with pytest.raises(BudgetExceededError):
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
    assert [error.limit for error in asked] == ["samples", "samples"]


async def test_requests_and_time_are_limits_of_what_comes_after(service: ServiceClient, engine: WatchedEngine) -> None:
    sampler = await service.create_sampling_client(engine.name)
    for budget in (Budget(requests=1), Budget(up_seconds=0.0), Budget(bytes_sent=1)):
        service.budget = budget
        (limit,) = budget.limits
        with pytest.raises(BudgetExceededError, match=limit):
            await sampler.sample(PROMPT, 1, FEW_TOKENS)


async def test_many_prompts_stop_at_a_budget(service: ServiceClient, engine: WatchedEngine) -> None:
    sampler = await service.create_sampling_client(engine.name)
    service.budget = Budget(samples=3)
    outcomes = [
        done async for done in sampler.sample_many([PROMPT] * 5, sampling_params=FEW_TOKENS, on_error="return", limit=1)
    ]
    assert [type(done.error) for done in outcomes] == [type(None)] * 3 + [BudgetExceededError] * 2
    assert service.usage.samples == 3


async def test_a_budget_also_holds_for_worker_processes(
    service: ServiceClient, engine: WatchedEngine, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", local.api_key)
    sampler = await service.create_sampling_client(engine.name)
    service.budget = Budget(samples=2)
    many = sampler.sample_many([PROMPT] * 4, sampling_params=FEW_TOKENS, limit=2, processes=1, on_error="return")
    outcomes = [type(done.error) async for done in many]
    assert outcomes.count(type(None)) == 2
    assert outcomes.count(BudgetExceededError) == 2
    assert (service.usage.samples, service.usage.prompt_tokens, service.usage.completion_tokens) == (2, 4, 8)
    assert service.inflight() == []


async def test_a_stream_of_rollouts_ends_at_a_budget_and_counts_no_group_as_failed(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    service.budget = Budget(samples=6)  # a step and a half
    async with trainer.rollouts(one_turn, range(100), max_staleness=0, **PAIRS) as stream:
        with pytest.raises(BudgetExceededError, match="samples=6"):
            await loop(trainer, stream)
        state = await stream.save("end")
    assert (state.version, state.pending, state.failed) == (1, [2, 3], 0)


async def test_a_rollout_may_ask_again_once_the_budget_is_raised(
    service: ServiceClient, trainer: TrainingClient
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode | None:
        try:
            return await one_turn(ctx, task)
        except BudgetExceededError:
            if task:
                return None
        service.budget = Budget(samples=2)
        return await one_turn(ctx, task)

    service.budget = Budget(samples=0)
    async with trainer.rollouts(rollout, range(9), group_size=2, groups_per_step=1, max_staleness=0) as stream:
        assert (await anext(stream)).groups[0].rewards == [0.0, 1.0]
        await stream.publish()
        with pytest.raises(BudgetExceededError, match="samples=2"):
            await anext(stream)
        assert stream.state().pending == [1]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"samples": -1}, "samples"),
        ({"requests": True}, "requests"),
        ({"up_seconds": float("nan")}, "up_seconds"),
        ({"cost": 1.0}, "prices"),
        ({"prices": 1.0}, "prices"),
        ({"on_exceeded": "stop"}, "on_exceeded"),
    ],
)
def test_a_wrong_budget_names_its_field(given: dict[str, Any], path: str) -> None:
    with pytest.raises(InputError) as raised:
        Budget(**given)
    assert raised.value.path == path


async def test_only_a_budget_can_be_set(service: ServiceClient) -> None:
    with pytest.raises(InputError, match="must be a Budget or None"):
        service.budget = 3  # type: ignore[assignment]  # what a caller without types does
    assert service.budget is None


def test_prices_are_numbers() -> None:
    with pytest.raises(InputError, match="prompt"):
        Prices(prompt=-1.0)
    assert Usage(trained_tokens=500_000).cost(Prices(trained=2.0)) == 1.0
