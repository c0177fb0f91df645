"""Losses, gradients, logprobs and weights are those that scripts expect: only an engine that computes can show it."""

from __future__ import annotations

from typing import Any

import pytest

import loops_tinker as tinker
from loops_local import LocalService
from loops_tinker import types

pytestmark = pytest.mark.torch

PROMPT = types.ModelInput.from_ints([65, 66, 67])


def rollout(advantages: list[float]) -> types.Datum:
    inputs: dict[str, Any] = {"target_tokens": [66, 67, 68], "logprobs": [-1.0, -1.0, -1.0], "advantages": advantages}
    return types.Datum(PROMPT, inputs)


@pytest.fixture
def trainer(tiny: LocalService) -> tinker.TrainingClient:
    service = tinker.ServiceClient(base_url=tiny.base_url, api_key=tiny.api_key)
    return service.create_lora_training_client("tiny", rank=4, seed=1).result()


def test_losses_and_gradients_are_sums(trainer: tinker.TrainingClient) -> None:
    one = types.Datum(PROMPT, {"target_tokens": [66, 67, 68], "weights": [1.0, 1.0, 1.0]})
    passed = trainer.forward_backward([one, one], "cross_entropy").result()
    total = -sum(sum(each["logprobs"].tolist()) for each in passed.loss_fn_outputs)
    assert passed.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)
    metrics = trainer.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics
    trainer.forward_backward([one], "cross_entropy")
    half = trainer.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics
    assert metrics is not None
    assert half is not None
    assert metrics["grad_norm:mean"] == pytest.approx(2 * half["grad_norm:mean"], rel=1e-4)
    assert not {"step", "lr", "learning_rate"} & {*metrics, *passed.metrics}


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo"])
def test_logprobs_are_real_where_the_advantage_is_zero(
    trainer: tinker.TrainingClient, loss_fn: types.LossFnType
) -> None:
    with_zeros, without = rollout([0.0, 0.0, 1.0]), rollout([1.0, 1.0, 1.0])
    found, wanted = trainer.forward([with_zeros, without], loss_fn).result().loss_fn_outputs
    assert found["logprobs"].tolist() == pytest.approx(wanted["logprobs"].tolist(), abs=1e-5)
    assert all(found["logprobs"].tolist())


def test_a_zero_advantage_changes_no_gradient(trainer: tinker.TrainingClient) -> None:
    def gradient(advantages: list[float]) -> float:
        trainer.forward_backward([rollout(advantages)], "importance_sampling")
        metrics = trainer.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics
        assert metrics is not None
        return metrics["grad_norm:mean"]

    assert gradient([0.0, 0.0, 0.0]) == pytest.approx(0.0, abs=1e-20)


def test_cispo_clips_as_there(trainer: tinker.TrainingClient) -> None:
    default = trainer.forward([rollout([1.0, 1.0, 1.0])], "cispo").result().metrics
    wide = {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
    assert trainer.forward([rollout([1.0, 1.0, 1.0])], "cispo", wide).result().metrics == default
    ours = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert trainer.forward([rollout([1.0, 1.0, 1.0])], "cispo", ours).result().metrics != default


async def test_a_custom_loss_gets_the_datums_whole(trainer: tinker.TrainingClient) -> None:
    seen: list[types.Datum] = []

    def loss(data: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        seen.extend(data)
        weights = [each.loss_fn_inputs["advantages"].to_torch() for each in data]
        return -sum((w * p).sum() for w, p in zip(weights, logprobs, strict=True)), {"mine": 3.0}

    data = [rollout([1.0, 0.0, 2.0])]
    passed = await (await trainer.forward_backward_custom_async(data, loss))
    assert seen[0] is data[0]
    assert passed.metrics["mine"] == 3.0
    assert passed.metrics["loss:sum"] > 0
    assert "surrogate_loss:sum" in passed.metrics
    assert passed.loss_fn_outputs[0]["logprobs"].shape == [3]


def test_a_snapshot_stays(trainer: tinker.TrainingClient) -> None:
    datum = types.Datum(PROMPT, {"target_tokens": [66, 67, 68]})
    snapshot = trainer.save_weights_and_get_sampling_client("same")
    before = snapshot.compute_logprobs(PROMPT).result()
    for _ in range(2):
        trainer.forward_backward([datum], "cross_entropy")
        trainer.optim_step(types.AdamParams(learning_rate=0.05))
    after = trainer.save_weights_and_get_sampling_client("same")
    assert after.compute_logprobs(PROMPT).result() != before
    assert snapshot.compute_logprobs(PROMPT).result() == before


def test_a_tokenizer_of_the_model(trainer: tinker.TrainingClient) -> None:
    pytest.importorskip("transformers")
    for client in (trainer, trainer.save_weights_and_get_sampling_client()):
        assert client.get_tokenizer().decode([65, 66]) == "AB"
