"""Losses of the user's own, in torch, on the engine that really trains."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch", reason="NOT TESTED: forward_backward_custom needs torch")

from loops_async import (  # noqa: E402
    AdamParams,
    Datum,
    InputError,
    ProtocolError,
    ServiceClient,
    TrainingClient,
    UnsupportedError,
)
from loops_local import LocalService  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def local(tiny: LocalService) -> LocalService:
    return tiny


@pytest.fixture
async def trainer(service: ServiceClient) -> TrainingClient:
    return await service.create_lora_training_client("tiny", rank=4, seed=3)


DATA = [
    Datum(model_input=[1, 2, 3, 4], loss_fn_inputs={"target_tokens": [2, 3, 4, -100]}),
    Datum(model_input=[9, 8, 7], loss_fn_inputs={"target_tokens": [8, 7, 6]}),
]
NO_CLIP = AdamParams(learning_rate=1e-2, grad_clip_norm=0.0)


def negative_sum(data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return -sum(one.sum() for one in logprobs), {"data": float(len(data))}


async def gradient_norm(trainer: TrainingClient) -> float:
    optim = await (await trainer.optim_step(NO_CLIP))
    assert optim.metrics is not None
    return optim.metrics["grad_norm"]


async def test_minus_the_sum_of_logprobs_is_cross_entropy(trainer: TrainingClient) -> None:
    custom = await (await trainer.forward_backward_custom(DATA, negative_sum))
    custom_norm = await gradient_norm(trainer)
    await (await trainer.init_trainer_server(4))
    own = await trainer.forward_backward(DATA, "cross_entropy", {"skip_token_normalization": True})
    logprobs = [one["logprobs"].to_torch() for one in (await own).loss_fn_outputs]
    assert custom_norm == pytest.approx(await gradient_norm(trainer), rel=1e-5)
    assert custom.loss == pytest.approx(-sum(float(one.nansum()) for one in logprobs), rel=1e-5)
    assert custom.metrics["data"] == 2.0
    for mine, theirs in zip(custom.loss_fn_outputs, logprobs, strict=True):
        assert torch.allclose(mine["logprobs"].to_torch(), theirs, atol=1e-5, equal_nan=True)


async def test_a_loss_that_no_trainer_has_is_minimised(trainer: TrainingClient) -> None:
    def aim(data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        likelihoods = torch.stack([one.exp().sum() for one in logprobs])
        return ((likelihoods - 1.0) ** 2).sum(), {}

    losses = []
    for _ in range(30):
        step = await trainer.forward_backward_custom(DATA, aim)
        await trainer.optim_step(AdamParams(learning_rate=3e-2))
        losses.append((await step).loss)
    assert losses[-1] < 0.1 * losses[0]


async def test_several_targets_at_each_position(trainer: TrainingClient) -> None:
    shapes: list[tuple[int, ...]] = []

    def look(data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        shapes.extend(tuple(one.shape) for one in logprobs)
        return -(logprobs[0] * torch.tensor([[1.0, 0.0], [0.5, 0.5]])).sum(), {}

    data = [Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [[2, 5], [3, 6]]})]
    step = await (await trainer.forward_backward_custom(data, look))
    assert shapes == [(2, 2)]
    assert step.loss_fn_outputs[0]["logprobs"].shape == [2, 2]


@pytest.mark.parametrize("colour", ["async"], indirect=True)  # gathered threads have no order
async def test_it_keeps_its_place_in_the_order_of_calls(trainer: TrainingClient) -> None:
    ran = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        loop.call_soon_threadsafe(ran.set)
        return negative_sum(data, logprobs)

    custom, optim = await asyncio.gather(trainer.forward_backward_custom(DATA, slow), trainer.optim_step(NO_CLIP))
    assert ran.is_set()
    stepped = await optim
    await custom
    assert stepped.metrics is not None
    assert stepped.metrics["grad_norm"] > 0  # so the gradients were there before the step


async def test_a_failing_function_fails_its_call_alone(trainer: TrainingClient) -> None:
    def broken(data: list[Datum], logprobs: list[Any]) -> Any:
        raise ZeroDivisionError("mine")

    custom, optim = await asyncio.gather(
        trainer.forward_backward_custom(DATA, broken), trainer.optim_step(NO_CLIP), return_exceptions=True
    )
    assert isinstance(custom, ZeroDivisionError)
    assert not isinstance(optim, BaseException)
    assert (await optim).metrics is not None


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (lambda p: p[0].sum(), "must return"),
        (lambda p: (p[0], {}), "must return"),
        (lambda p: (torch.tensor(1.0), {}), "does not depend"),
        (lambda p: ((p[0] - p[0].detach()).sqrt().sum(), {}), "not finite"),
        (lambda p: (p[0].sum(), {"mine": "good"}), "metric 'mine' that is not a number"),
    ],
)
async def test_what_it_returns_is_checked(trainer: TrainingClient, returned: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        await trainer.forward_backward_custom(DATA, lambda _, logprobs: returned(logprobs))


async def test_metrics_may_be_tensors(trainer: TrainingClient) -> None:
    step = await trainer.forward_backward_custom(DATA, lambda _, p: (p[0].sum(), {"mine": p[0].sum(), "ours": 2}))
    result = await step
    assert result.metrics["mine"] == pytest.approx(result.loss)
    assert result.metrics["ours"] == 2.0


async def test_a_trainer_that_does_not_score_everything_is_told(local: LocalService, trainer: TrainingClient) -> None:
    scored = {"loss_fn_outputs": [], "metrics": {"skip_token_normalization": 1.0}}
    local.faults.answer("GET */operations/*", 200, {"status": "done", "result": scored})
    with pytest.raises(ProtocolError, match="all 2 examples"):
        await trainer.forward_backward_custom(DATA, negative_sum)


async def test_a_trainer_that_normalises_cannot_be_used(local: LocalService, trainer: TrainingClient) -> None:
    local.faults.answer("GET */operations/*", 200, {"status": "done", "result": {"metrics": {}}})
    with pytest.raises(UnsupportedError, match="skip_token_normalization"):
        await trainer.forward_backward_custom(DATA, negative_sum)


async def test_masked_positions_are_zero_and_get_no_gradient(trainer: TrainingClient) -> None:
    seen: list[float] = []

    def look(data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        seen.append(logprobs[0][-1].item())
        return 1000.0 * logprobs[0][-1] - logprobs[0][0], {}

    result = await (await trainer.forward_backward_custom(DATA, look))
    assert seen == [0.0]
    assert math.isfinite(await gradient_norm(trainer))
    assert math.isnan(result.loss_fn_outputs[0]["logprobs"].to_numpy()[-1])


async def test_inputs_of_its_own_are_for_the_function_alone(trainer: TrainingClient) -> None:
    """They may have any shape, and the gradients are those of a loss that has them from elsewhere: these cancel."""
    rewards = [2.0, -1.0]
    own = [
        replace(
            datum,
            loss_fn_inputs={**datum.loss_fn_inputs, "reward": [reward], "advantages": [reward] * 9, "mask": [0.0]},
        )
        for datum, reward in zip(DATA, rewards, strict=True)
    ]

    def weighted(data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        factors = [datum.loss_fn_inputs["reward"].data[0] for datum in data]
        return -sum(factor * p.sum() for factor, p in zip(factors, logprobs, strict=True)), {}

    def closure(data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return sum(factor * p.sum() for factor, p in zip(rewards, logprobs, strict=True)), {}

    with_own = await (await trainer.forward_backward_custom(own, weighted))
    opposite = await (await trainer.forward_backward_custom(DATA, closure))
    assert with_own.loss == pytest.approx(-opposite.loss) != 0
    assert await gradient_norm(trainer) < 1e-4
    await (await trainer.forward_backward_custom(own, weighted))
    assert await gradient_norm(trainer) > 0.01


@pytest.mark.parametrize(
    ("data", "options", "problem"),
    [
        ([Datum(model_input=[1])], {}, "target_tokens"),
        (DATA, {"loss_type_input": "logits"}, "loss_type_input"),
        (DATA, {"loss_fn": "mine"}, "loss_fn"),
    ],
)
async def test_arguments_are_checked_before_anything_is_sent(
    trainer: TrainingClient, data: Any, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        await trainer.forward_backward_custom(data, **({"loss_fn": negative_sum} | options))
