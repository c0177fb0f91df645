"""What a trainer promises beyond its losses: what it returns, accumulation, the optimizer, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from loops_async.types import AdamParams, Datum
from loops_local.engine.base import Engine, RefusedError, Sampler, Trainer
from loops_local.engine.pytorch import passes

from .tools import dot, gradient, job, logprobs, randomize, set_weights, text, tokens, weights

BATCH = [text("a:", "zibble"), text("longer question:", "qux"), text("c", "florp flop"), text("dd:", "m")]


def test_masked_is_nan_and_weightless_is_scored(trainer: Trainer) -> None:
    full = tokens(5, seed=1)
    inputs = {"target_tokens": [-100, full[2], full[3], full[4]], "weights": [1.0, 0.0, 1.0, 2.0]}
    output = trainer.forward([Datum(model_input=full[:-1], loss_fn_inputs=inputs)], "cross_entropy", {}, backward=True)
    [p] = logprobs(output)
    assert np.isnan(p).tolist() == [True, False, False, False]
    assert output.metrics["tokens"] == 2
    assert output.loss == pytest.approx(-(p[2] + 2 * p[3]) / 2)


def test_zero_advantage_reports_zero(trainer: Trainer) -> None:
    full = tokens(5, seed=1)
    inputs = {"target_tokens": full[1:], "logprobs": [0.0, math.nan, -1, -1], "advantages": [0.0, 0.0, 1.0, -1.0]}
    output = trainer.forward([Datum(model_input=full[:-1], loss_fn_inputs=inputs)], "ppo", {}, backward=True)
    [p] = logprobs(output)
    assert p[:2].tolist() == [0.0, 0.0]
    assert (p[2:] < 0).all()
    assert output.metrics["tokens"] == 2


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "dppo"])
def test_zero_advantage_is_scored_if_asked(trainer: Trainer, tmp_path: Path, loss_fn: str) -> None:
    """The logprobs are those of cross_entropy; the loss, the tokens and the gradients are the same as without."""
    randomize(trainer, tmp_path)
    full = tokens(5, seed=1)
    targets = [-100, *full[2:]]
    inputs = {"target_tokens": targets, "logprobs": [math.nan, -1, -1, -1], "advantages": [0.0, 0.0, 1.0, -1.0]}
    data = [Datum(model_input=full[:-1], loss_fn_inputs=inputs)]
    plain = trainer.forward(data, loss_fn, {}, backward=True)
    gradients = gradient(trainer, tmp_path)
    randomize(trainer, tmp_path)
    output = trainer.forward(data, loss_fn, {"score_all_targets": True}, backward=True)
    [p] = logprobs(output)
    expected = Datum(model_input=full[:-1], loss_fn_inputs={"target_tokens": targets})
    [q] = logprobs(trainer.forward([expected], "cross_entropy", {}, backward=False))
    np.testing.assert_allclose(p, q, atol=1e-5)
    assert np.isnan(p).tolist() == [True, False, False, False]
    assert output.metrics == pytest.approx(plain.metrics)
    found = gradient(trainer, tmp_path)
    assert dot(found, found) > 0
    for name in found:
        np.testing.assert_allclose(found[name], gradients[name], atol=1e-5)


def test_sums_and_counts_are_metrics(trainer: Trainer) -> None:
    output = trainer.forward(BATCH, "cross_entropy", {}, backward=False)
    tokens_with_weight = output.metrics["tokens"]
    assert output.metrics["loss:sum"] == pytest.approx(-sum(np.nansum(p) for p in logprobs(output)))
    assert output.metrics["loss:sum"] == pytest.approx(output.loss * tokens_with_weight)
    assert output.metrics["tokens:sum"] == tokens_with_weight == sum(np.isfinite(p).sum() for p in logprobs(output))


def test_without_targets_the_input_is_scored(trainer: Trainer) -> None:
    full = tokens(5, seed=1)
    [given] = logprobs(trainer.forward([Datum(model_input=full)], "cross_entropy", {}, backward=False))
    shifted = Datum(model_input=full[:-1], loss_fn_inputs={"target_tokens": full[1:]})
    [expected] = logprobs(trainer.forward([shifted], "cross_entropy", {}, backward=False))
    np.testing.assert_allclose(given[:-1], expected, atol=1e-5)
    assert given[-1] == 0.0


def test_top_k(trainer: Trainer) -> None:
    output = trainer.forward(BATCH[:1], "cross_entropy", {}, backward=True, top_k=20).loss_fn_outputs[0]
    ids, best = output["topk_token_ids"].to_numpy(), output["topk_logprobs"].to_numpy()
    own = output["logprobs"].to_numpy()
    assert ids.shape == best.shape == (len(own), 20)
    assert ids.dtype == np.int64
    assert (ids[0] == -1).all()
    assert np.isnan(best[0]).all()
    assert (np.diff(best[1:], axis=1) <= 0).all()
    targets = BATCH[0].loss_fn_inputs["target_tokens"].to_numpy()
    found = [(i, k) for i in range(1, len(own)) for k in range(20) if ids[i, k] == targets[i]]
    assert found
    for i, k in found:
        assert best[i, k] == pytest.approx(own[i], abs=1e-5)


def test_padding_and_company_change_nothing(trainer: Trainer, tmp_path: Path) -> None:
    randomize(trainer, tmp_path)
    together = logprobs(trainer.forward(BATCH, "cross_entropy", {}, backward=False))
    for datum, expected in zip(BATCH, together, strict=True):
        [alone] = logprobs(trainer.forward([datum], "cross_entropy", {}, backward=False))
        np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_several_calls_are_one_big_call(trainer: Trainer, tmp_path: Path) -> None:
    start = randomize(trainer, tmp_path)
    trainer.forward(BATCH, "cross_entropy", {}, backward=True)
    once = gradient(trainer, tmp_path)
    randomize(trainer, tmp_path)
    for datum in BATCH:
        trainer.forward([datum], "cross_entropy", {}, backward=True)
        trainer.forward(BATCH, "cross_entropy", {}, backward=False)
    parts = gradient(trainer, tmp_path)
    assert dot(once, once) > 0.01
    for name in start:
        np.testing.assert_allclose(parts[name], once[name], atol=1e-5)


def test_memory_bounds_change_nothing(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches, recomputed layers and chunks of the head are ways to the same numbers."""
    randomize(trainer, tmp_path)
    plain = logprobs(trainer.forward(BATCH, "cross_entropy", {}, backward=True))
    expected = gradient(trainer, tmp_path)
    randomize(trainer, tmp_path)
    monkeypatch.setattr(passes, "MICRO_BATCH_TOKENS", 8)
    monkeypatch.setattr(passes, "HEAD_POSITIONS", 2)
    small = logprobs(trainer.forward(BATCH, "cross_entropy", {}, backward=True))
    found = gradient(trainer, tmp_path)
    for one, other in zip(plain, small, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_normalised_by_tokens_unless_skipped(trainer: Trainer, tmp_path: Path) -> None:
    randomize(trainer, tmp_path)
    output = trainer.forward(BATCH, "cross_entropy", {"skip_token_normalization": True}, backward=True)
    assert output.metrics["skip_token_normalization"] == 1.0
    total = gradient(trainer, tmp_path)
    randomize(trainer, tmp_path)
    output = trainer.forward(BATCH, "cross_entropy", {}, backward=True)
    assert "skip_token_normalization" not in output.metrics
    mean = gradient(trainer, tmp_path)
    for name in total:
        np.testing.assert_allclose(mean[name], total[name] / output.metrics["tokens"], atol=1e-5)


def test_normalised_and_skipped_do_not_mix(trainer: Trainer, tmp_path: Path) -> None:
    start = randomize(trainer, tmp_path)
    trainer.forward(BATCH[:1], "cross_entropy", {}, backward=True)
    with pytest.raises(RefusedError, match="skip_token_normalization"):
        trainer.forward(BATCH[1:], "cross_entropy", {"skip_token_normalization": True}, backward=True)
    trainer.forward(BATCH[1:], "cross_entropy", {"skip_token_normalization": True}, backward=False)
    refused = gradient(trainer, tmp_path)
    randomize(trainer, tmp_path)
    trainer.forward(BATCH[:1], "cross_entropy", {}, backward=True)
    alone = gradient(trainer, tmp_path)
    assert all(np.array_equal(refused[name], alone[name]) for name in start)
    trainer.forward(BATCH[1:], "cross_entropy", {"skip_token_normalization": True}, backward=True)


def test_adam_is_torchs_adamw(engine: Engine, trainer: Trainer, tmp_path: Path) -> None:
    start = randomize(trainer, tmp_path)
    twin = {name: torch.tensor(part, requires_grad=True) for name, part in start.items()}
    params = AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.5)
    adamw = torch.optim.AdamW(twin.values(), lr=3e-3, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        other = engine.trainer(4)
        set_weights(other, weights(trainer, tmp_path), tmp_path)
        for each in (trainer, other):
            each.forward(BATCH[step:], "cross_entropy", {}, backward=True)
        for name, part in gradient(other, tmp_path).items():
            twin[name].grad = torch.tensor(part)
        norm = float(torch.nn.utils.clip_grad_norm_(twin.values(), 0.5))
        assert norm > 0.5
        adamw.step()
        metrics = trainer.optim_step(params)
        expected = {"step": step + 1, "learning_rate": 3e-3, "lr": 3e-3, "grad_norm": pytest.approx(norm, rel=1e-3)}
        assert {name: metrics[name] for name in expected} == expected
        now = weights(trainer, tmp_path)
        for name, part in twin.items():
            np.testing.assert_allclose(now[name], part.detach().numpy(), atol=1e-4)


def test_a_step_forgets_the_gradients_and_needs_none(trainer: Trainer, tmp_path: Path) -> None:
    start = randomize(trainer, tmp_path)
    assert trainer.optim_step(AdamParams(learning_rate=1.0)) == {
        "step": 1,
        "learning_rate": 1.0,
        "lr": 1.0,
        "grad_norm": 0.0,
        "tokens": 0.0,
        "backward_passes": 0.0,
    }
    assert all(np.array_equal(part, start[name]) for name, part in weights(trainer, tmp_path).items())
    trainer.forward(BATCH, "cross_entropy", {}, backward=True)
    assert dot(first := gradient(trainer, tmp_path), first) > 0
    assert dot(second := gradient(trainer, tmp_path), second) == 0
    assert trainer.step == 3


def test_a_step_says_how_many_backward_passes_it_applied(engine: Engine, trainer: Trainer, tmp_path: Path) -> None:
    for backward in (True, False, True):
        trainer.forward(BATCH, "cross_entropy", {}, backward=backward)
    trainer.save(tmp_path)
    trainer.save_gradients(tmp_path)
    again = engine.trainer(4)
    again.load(tmp_path, optimizer=True)
    again.load_gradients(tmp_path)
    for one in (trainer, again):
        assert [one.optim_step(AdamParams())["backward_passes"] for _ in range(2)] == [2, 0]


def test_a_gradient_that_is_not_finite_is_dropped(trainer: Trainer, tmp_path: Path) -> None:
    full = tokens(5, seed=1)
    inputs = {"target_tokens": full[1:], "logprobs": [-1000.0] * 4, "advantages": [1.0] * 4}
    trainer.forward([Datum(model_input=full[:-1], loss_fn_inputs=inputs)], "importance_sampling", {}, backward=True)
    before = weights(trainer, tmp_path)
    with pytest.raises(RefusedError, match="not finite"):
        trainer.optim_step(AdamParams())
    assert trainer.step == 0
    assert all(np.array_equal(part, before[name]) for name, part in weights(trainer, tmp_path).items())
    trainer.forward(BATCH, "cross_entropy", {}, backward=True)
    assert math.isfinite(trainer.optim_step(AdamParams())["grad_norm"])


def test_seeds(engine: Engine, tmp_path: Path) -> None:
    one, same, other, free = (weights(engine.trainer(4, seed=seed), tmp_path) for seed in (1, 1, 2, None))
    name = next(name for name in one if "lora_A" in name)
    assert np.array_equal(one[name], same[name])
    assert not np.array_equal(one[name], other[name])
    assert not np.array_equal(one[name], free[name])


def test_fine_tuning_memorises(engine: Engine, sampler: Sampler) -> None:
    trainer = engine.trainer(8, seed=0)
    for _ in range(25):
        loss = trainer.forward(BATCH, "cross_entropy", {}, backward=True).loss
        trainer.optim_step(AdamParams(learning_rate=1e-2))
    assert loss < 0.05
    adapter = trainer.adapter()
    for prompt, answer in (("a:", "zibble"), ("longer question:", "qux"), ("c", "florp flop"), ("dd:", "m")):
        [completion] = sampler.submit(job(prompt, adapter, temperature=0.0, max_tokens=20)).result().completions
        assert (completion.text, completion.finish_reason) == (answer, "stop")


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "dppo"])
def test_rewards_rise(engine: Engine, sampler: Sampler, loss_fn: str) -> None:
    """Reward: the part of the sampled bytes that are lower-case letters."""
    trainer = engine.trainer(8, seed=0)
    rewards = [_policy_step(trainer, sampler, loss_fn, seed) for seed in range(20)]
    assert np.mean(rewards[:2]) < 0.2
    assert np.mean(rewards[-3:]) > 0.6


def _policy_step(trainer: Trainer, sampler: Sampler, loss_fn: str, seed: int) -> float:
    prompt = list(b"say:")
    answers = sampler.submit(job(prompt, trainer.adapter(), n=16, seed=seed, max_tokens=8)).result().completions
    rewards = np.array([np.mean([97 <= token <= 122 for token in answer.tokens]) for answer in answers])
    data = []
    for answer, advantage in zip(answers, rewards - rewards.mean(), strict=True):
        full = prompt + answer.tokens
        skipped, n = len(prompt) - 1, len(answer.tokens)
        inputs = {
            "target_tokens": full[1:],
            "logprobs": [0.0] * skipped + answer.logprobs,
            "advantages": [0.0] * skipped + [float(advantage)] * n,
        }
        data.append(Datum(model_input=full[:-1], loss_fn_inputs=inputs))
    trainer.forward(data, loss_fn, {}, backward=True)
    trainer.optim_step(AdamParams(learning_rate=1e-2))
    return float(rewards.mean())
