"""Reference logprobs of preference pairs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import pytest

from loops_async import Datum, InputError, SamplingClient, ServiceClient, TrainingClient
from loops_local.engine.echo import logprob
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine

Attach: TypeAlias = Callable[[list[Datum], SamplingClient], Awaitable[list[Datum]]]


@pytest.fixture
def attach(colour: Colour) -> Attach:
    return colour.function("attach_reference_logprobs")


@pytest.fixture
async def sampler(service: ServiceClient, engine: WatchedEngine) -> SamplingClient:
    return await service.create_sampling_client(engine.name)


def pair(tokens: list[int], targets: list[int], weights: list[float] | None = None) -> Datum:
    inputs: dict[str, Any] = {"target_tokens": targets}
    return Datum(model_input=tokens, loss_fn_inputs=inputs if weights is None else inputs | {"weights": weights})


async def test_every_weighted_target_is_scored_the_last_one_too(attach: Attach, sampler: SamplingClient) -> None:
    (scored,) = await attach([pair([5, 6, 7], [6, 7, 8], [0.0, 1.0, 1.0])], sampler)
    reference = scored.loss_fn_inputs["ref_logprobs"]
    assert reference.dtype == "float32"
    assert reference.data == pytest.approx([0.0, logprob(6, 7, 0), logprob(7, 8, 0)])


async def test_it_is_what_the_trainer_gives_the_same_weights(
    attach: Attach, trainer: TrainingClient, sampler: SamplingClient
) -> None:
    data = [pair([5, 6, 7], [6, 7, 8], [1.0] * 3), pair([5, 9], [9, 4], [1.0] * 2)]
    scored = await attach(data, sampler)
    forward = await (await trainer.forward(data))
    for datum, output in zip(scored, forward.loss_fn_outputs, strict=True):
        assert datum.loss_fn_inputs["ref_logprobs"].data == pytest.approx(output["logprobs"].data, abs=1e-6)
    step = await (await trainer.forward_backward(scored, "dpo"))
    assert len(step.loss_fn_outputs) == 2


async def test_masked_targets_may_be_anything(attach: Attach, sampler: SamplingClient) -> None:
    (scored,) = await attach([pair([5, 6, 7], [-100, 7, -100])], sampler)
    assert scored.loss_fn_inputs["ref_logprobs"].data == pytest.approx([0.0, logprob(6, 7, 0), 0.0])


@pytest.mark.parametrize(
    ("datum", "problem"),
    [
        (pair([5, 6, 7], [6, 9, 8], [1.0] * 3), "position 1"),
        (Datum(model_input=[5]), "target_tokens"),
        (Datum(model_input=[5], loss_fn_inputs={"target_tokens": [[5, 6]]}), "one target"),
    ],
)
async def test_what_no_sampler_can_score_is_refused(
    attach: Attach, sampler: SamplingClient, datum: Datum, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        await attach([datum], sampler)
