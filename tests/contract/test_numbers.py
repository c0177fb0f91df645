"""Numbers, from the caller's arguments through the wire and the engine and back: each loss against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loops_async import AdamParams, Datum, ServiceClient, TrainingClient
from loops_async._operations import batch
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.work import body_of

pytestmark = pytest.mark.torch

NO_CLIP = AdamParams(learning_rate=1e-2, grad_clip_norm=0.0)
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(0, 250, (6, 9)).tolist()
SAMPLED = RNG.normal(-4.0, 1.0, (6, 8))
ADVANTAGES = RNG.normal(0.0, 1.0, (6, 8))
WEIGHTS = RNG.uniform(0.5, 1.5, (6, 8))


@pytest.fixture(scope="module")
def local(tiny: LocalService) -> LocalService:
    return tiny


@pytest.fixture
async def trainer(service: ServiceClient) -> TrainingClient:
    """A run that was trained a little, so that its adapter does something."""
    trainer = await service.create_lora_training_client("tiny", rank=4, seed=3)
    await trainer.forward_backward(examples())
    await (await trainer.optim_step(NO_CLIP))
    return trainer


def examples(**inputs: Any) -> list[Datum]:
    return [
        Datum(
            model_input=tokens[:-1],
            loss_fn_inputs={"target_tokens": tokens[1:]} | {name: rows[i] for name, rows in inputs.items()},
        )
        for i, tokens in enumerate(TOKENS)
    ]


async def gradient_norm(trainer: TrainingClient) -> float:
    stepped = await (await trainer.optim_step(AdamParams(learning_rate=0.0, grad_clip_norm=0.0)))
    assert stepped.metrics is not None
    return stepped.metrics["grad_norm"]


def dppo(p: Any, q: Any, a: Any) -> Any:
    moved = np.exp(p) - np.exp(q)
    kept = np.where(a > 0, moved <= 0.2, moved >= -0.2)
    return np.where(kept, -a * np.exp(p - q), 0.0) + 1e-3 * (p - q) ** 2


POLICY_LOSSES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "importance_sampling": lambda p, q, a: -np.exp(p - q) * a,
    "ppo": lambda p, q, a: -np.minimum(np.exp(p - q) * a, np.clip(np.exp(p - q), 0.8, 1.2) * a),
    "cispo": lambda p, q, a: -np.clip(np.exp(p - q), 0.8, 1.2) * a * p,
    "dro": lambda p, q, a: -(a * p - 0.5 * 0.05 * (p - q) ** 2),
    "dppo": dppo,
}


async def logprobs_of(trainer: TrainingClient) -> Any:
    forward = await (await trainer.forward(examples()))
    return np.array([one["logprobs"].data for one in forward.loss_fn_outputs])


@pytest.mark.parametrize("loss", POLICY_LOSSES)
async def test_policy_losses(trainer: TrainingClient, loss: str) -> None:
    p = await logprobs_of(trainer)
    sampled = p + (SAMPLED + 4.0) / 4
    step = await trainer.forward_backward(examples(logprobs=sampled, advantages=ADVANTAGES), loss)
    assert (await step).loss == pytest.approx(POLICY_LOSSES[loss](p, sampled, ADVANTAGES).mean(), rel=1e-4)
    assert await gradient_norm(trainer) > 0


async def test_cross_entropy(trainer: TrainingClient) -> None:
    p = await logprobs_of(trainer)
    step = await (await trainer.forward_backward(examples(weights=WEIGHTS)))
    assert step.loss == pytest.approx((-WEIGHTS * p).sum() / p.size, rel=1e-4)


async def test_preferences_of_a_reference(trainer: TrainingClient, colour: Colour) -> None:
    """Before anything differs from the reference, z is 0 and the loss is log 2."""
    reference = await trainer.save_weights_and_get_sampling_client("reference")
    attach_reference_logprobs = colour.function("attach_reference_logprobs")
    pairs = await attach_reference_logprobs(examples(weights=np.ones((6, 8))), reference)
    step = await (await trainer.forward_backward(pairs, "dpo", {"beta": 0.5}))
    assert step.loss == pytest.approx(math.log(2), abs=1e-4)
    await (await trainer.optim_step(NO_CLIP))
    p = await logprobs_of(trainer)
    gain = (p - np.array([one.loss_fn_inputs["ref_logprobs"].data for one in pairs])).sum(axis=1)
    z = 0.5 * (gain[0::2] - gain[1::2])
    after = await (await trainer.forward(pairs, "dpo", {"beta": 0.5}))
    assert after.loss == pytest.approx(np.log1p(np.exp(-z)).mean(), rel=1e-3)
    assert after.loss < step.loss


async def test_an_advantage_for_the_whole_row(trainer: TrainingClient) -> None:
    await trainer.forward_backward(examples(logprobs=SAMPLED, advantages=ADVANTAGES[:, :1]), "ppo")
    alone = await gradient_norm(trainer)
    rows = np.repeat(ADVANTAGES[:, :1], 8, axis=1)
    await trainer.forward_backward(examples(logprobs=SAMPLED, advantages=rows), "ppo")
    assert await gradient_norm(trainer) == pytest.approx(alone, rel=1e-5)


async def test_several_targets_are_as_many_terms(trainer: TrainingClient) -> None:
    single = await logprobs_of(trainer)
    targets = np.array([tokens[1:] for tokens in TOKENS])
    several = np.stack([targets, np.full_like(targets, 9)], axis=-1)
    data = [
        Datum(model_input=tokens[:-1], loss_fn_inputs={"target_tokens": several[i], "weights": np.ones((8, 2))})
        for i, tokens in enumerate(TOKENS)
    ]
    step = await (await trainer.forward(data))
    scored = np.array([one["logprobs"].tolist() for one in step.loss_fn_outputs])
    assert scored.shape == (6, 8, 2)
    assert scored[..., 0] == pytest.approx(single, abs=1e-5)


async def test_the_best_candidates_of_each_position(trainer: TrainingClient) -> None:
    single = await logprobs_of(trainer)
    step = await (await trainer.forward(examples(), top_k_logprobs=20))
    for output, tokens, own in zip(step.loss_fn_outputs, TOKENS, single, strict=True):
        ids, scores = output["topk_token_ids"].to_numpy(), output["topk_logprobs"].to_numpy()
        assert ids.shape == scores.shape == (8, 20)
        assert (np.diff(scores) <= 0).all()
        for position in range(8):
            if tokens[position + 1] in ids[position]:
                rank = ids[position].tolist().index(tokens[position + 1])
                assert scores[position, rank] == pytest.approx(own[position], abs=1e-5)


async def test_not_a_number_travels_both_ways(local: LocalService, trainer: TrainingClient) -> None:
    sampled, advantages = SAMPLED.copy(), ADVANTAGES.copy()
    sampled[:, 0], advantages[:, 0] = np.nan, 0.0
    sent = local.faults.watch("POST */forward_backward")
    targets = [[-100, *tokens[2:]] for tokens in TOKENS]
    data = [
        Datum(
            model_input=tokens[:-1],
            loss_fn_inputs={"target_tokens": targets[i], "logprobs": sampled[i], "advantages": advantages[i]},
        )
        for i, tokens in enumerate(TOKENS)
    ]
    step = await (await trainer.forward_backward(data, "ppo"))
    assert body_of(sent[0])["data"][0]["loss_fn_inputs"]["logprobs"]["data"][0] is None
    assert math.isnan(step.loss_fn_outputs[0]["logprobs"].data[0])
    assert math.isfinite(step.loss)


async def test_a_split_batch_has_the_gradients_of_the_whole(
    trainer: TrainingClient, local: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await trainer.forward_backward(examples(weights=WEIGHTS))
    whole = await gradient_norm(trainer)
    sent = local.faults.watch("POST */forward_backward", times=9)
    monkeypatch.setattr(batch, "MAX_REQUEST_BYTES", 1500)
    step = await (await trainer.forward_backward(examples(weights=WEIGHTS)))
    local.faults.clear()
    assert len(sent) > 1
    assert len(step.loss_fn_outputs) == 6
    assert await gradient_norm(trainer) == pytest.approx(whole, rel=1e-5)
