"""Each loss against a few lines of plain arithmetic, and its gradient against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loops_async.protocol import LOSSES
from loops_async.types import AdamParams, Datum
from loops_local.engine.base import Engine, Trainer

from .tools import dot, gradient, logprobs, randomize, set_weights, tokens

Floats = NDArray[np.float64]
Row = dict[str, Floats]
LENGTH = 12


def cross_entropy(p: Floats, row: Row, now: Floats) -> float:
    return -sum(w * x for w, x in zip(row["weights"], p, strict=True))


def importance_sampling(p: Floats, row: Row, now: Floats) -> float:
    return -sum(a * math.exp(x - q) for x, q, a in zip(p, row["logprobs"], row["advantages"], strict=True))


def ppo(p: Floats, row: Row, now: Floats, low: float = 0.8, high: float = 1.2) -> float:
    total = 0.0
    for x, q, a in zip(p, row["logprobs"], row["advantages"], strict=True):
        r = math.exp(x - q)
        total -= min(r * a, min(max(r, low), high) * a)
    return total


def cispo(p: Floats, row: Row, now: Floats, low: float = 0.8, high: float = 1.2) -> float:
    ratios = [min(max(math.exp(x - q), low), high) for x, q in zip(now, row["logprobs"], strict=True)]
    return -sum(r * a * x for r, a, x in zip(ratios, row["advantages"], p, strict=True))


def dro(p: Floats, row: Row, now: Floats, beta: float = 0.05) -> float:
    return -sum(a * x - beta / 2 * (x - q) ** 2 for x, q, a in zip(p, row["logprobs"], row["advantages"], strict=True))


def dppo(
    p: Floats, row: Row, now: Floats, high: float = 0.2, low: float = 0.2, adv_tau: float = 1.0, kl_tau: float = 1e-3
) -> float:
    total = 0.0
    for x, q, a in zip(p, row["logprobs"], row["advantages"], strict=True):
        moved = math.exp(x) - math.exp(q)
        dropped = moved > high if a > 0 else moved < -low
        total += kl_tau * (x - q) ** 2 - (0.0 if dropped else adv_tau * a * math.exp(x - q))
    return total


REFERENCES: list[tuple[str, dict[str, float], Callable[..., float], dict[str, float]]] = [
    ("cross_entropy", {}, cross_entropy, {}),
    ("importance_sampling", {}, importance_sampling, {}),
    ("ppo", {}, ppo, {}),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}, ppo, {"low": 0.5, "high": 1.05}),
    ("cispo", {}, cispo, {}),
    ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, cispo, {"low": 0.0, "high": 4.0}),
    ("dro", {}, dro, {}),
    ("dro", {"beta": 1.5}, dro, {"beta": 1.5}),
    ("dppo", {}, dppo, {}),
    (
        "dppo",
        {"dppo_mask_high": 0.01, "dppo_mask_low": 0.01, "adv_tau": 0.7, "kl_tau": 0.5},
        dppo,
        {"high": 0.01, "low": 0.01, "adv_tau": 0.7, "kl_tau": 0.5},
    ),
]


def _data(trainer: Trainer, needs_advantages: bool) -> tuple[list[Datum], list[Row]]:
    """Rows of different lengths; the sampler's logprobs lie around the trainer's, so that ratios fall on all sides."""
    random = np.random.default_rng(7)
    data, rows = [], []
    for i in range(3):
        n = LENGTH - 2 * i
        full = tokens(n + 1, seed=i)
        plain = Datum(model_input=full[:-1], loss_fn_inputs={"target_tokens": full[1:]})
        [p] = logprobs(trainer.forward([plain], "cross_entropy", {}, backward=False))
        row: Row = {"weights": random.uniform(0.1, 2, n)}
        if needs_advantages:
            row = {"logprobs": p + random.normal(0, 0.3, n), "advantages": random.normal(0, 1, n)}
            row["logprobs"][:3] = np.log(random.uniform(0.2, 0.9, 3))
        rows.append(row)
        data.append(Datum(model_input=full[:-1], loss_fn_inputs={"target_tokens": full[1:], **row}))
    return data, rows


def _check_gradient(
    trainer: Trainer,
    data: list[Datum],
    name: str,
    config: Mapping[str, Any],
    total: Callable[[list[Floats]], float],
    tmp_path: Path,
) -> None:
    """Compare the slope along a random direction with that of `total`, a function of the logprobs."""
    start = randomize(trainer, tmp_path)
    random = np.random.default_rng(3)
    direction = {key: random.normal(0, 1, part.shape) for key, part in start.items()}
    trainer.forward(data, name, {**config, "skip_token_normalization": True}, backward=True)
    slope = dot(gradient(trainer, tmp_path), direction)
    step = 1e-4
    ends = []
    for sign in (1, -1):
        set_weights(trainer, {key: part + sign * step * direction[key] for key, part in start.items()}, tmp_path)
        ends.append(total(logprobs(trainer.forward(data, "cross_entropy", {}, backward=False))))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.01, abs=0.02)
    assert abs(slope) > 0.1


@pytest.mark.parametrize(("name", "config", "reference", "settings"), REFERENCES)
def test_loss_and_gradient(
    trainer: Trainer,
    tmp_path: Path,
    name: str,
    config: dict[str, float],
    reference: Callable[..., float],
    settings: dict[str, float],
) -> None:
    randomize(trainer, tmp_path)
    data, rows = _data(trainer, name != "cross_entropy")
    output = trainer.forward(data, name, config, backward=False)
    now = logprobs(output)

    def total(p: list[Floats]) -> float:
        return sum(reference(x, row, fixed, **settings) for x, row, fixed in zip(p, rows, now, strict=True))

    count = sum(map(len, now))
    assert output.metrics["tokens"] == count
    assert output.loss == pytest.approx(total(now) / count, rel=1e-4)
    _check_gradient(trainer, data, name, config, total, tmp_path)


@pytest.mark.parametrize(
    ("config", "beta", "smoothing"), [({}, 0.1, 0.0), ({"beta": 0.7, "label_smoothing": 0.2}, 0.7, 0.2)]
)
def test_dpo(trainer: Trainer, tmp_path: Path, config: dict[str, float], beta: float, smoothing: float) -> None:
    randomize(trainer, tmp_path)
    data, rows = _data(trainer, needs_advantages=False)
    random = np.random.default_rng(1)
    pairs = [data[0], data[1], data[2], data[0]]
    inputs = [rows[0], rows[1], rows[2], rows[0]]
    refs = [-random.uniform(1, 8, len(row["weights"])) for row in inputs]
    pairs = [
        Datum(model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, "ref_logprobs": ref})
        for datum, ref in zip(pairs, refs, strict=True)
    ]

    def total(p: list[Floats]) -> float:
        gains = [float(np.sum(row["weights"] * (x - ref))) for x, row, ref in zip(p, inputs, refs, strict=True)]
        margins = [beta * (gains[0] - gains[1]), beta * (gains[2] - gains[3])]
        return sum((1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z)) for z in margins)

    output = trainer.forward(pairs, "dpo", config, backward=False)
    assert output.loss == pytest.approx(total(logprobs(output)) / 2, rel=1e-4)
    _check_gradient(trainer, pairs, "dpo", config, total, tmp_path)


def test_without_weights_each_target_of_a_pair_counts(trainer: Trainer, tmp_path: Path) -> None:
    randomize(trainer, tmp_path)
    targets, ref = [-100, 7, -100, 9], [-3.0, -4.0, -5.0, -6.0]
    inputs = {"target_tokens": targets, "ref_logprobs": ref}
    plain = [Datum(model_input=[first, 6, 7, 8], loss_fn_inputs=inputs) for first in (1, 2)]
    weighted = [
        Datum(model_input=one.model_input, loss_fn_inputs={**inputs, "weights": [0.0, 1.0, 0.0, 1.0]}) for one in plain
    ]
    output = trainer.forward(plain, "dpo", {}, backward=False)
    assert output.loss == trainer.forward(weighted, "dpo", {}, backward=False).loss != 0
    assert output.metrics["tokens"] == 4


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_normalised_unless_that_is_skipped(engine: Engine, name: str) -> None:
    inputs = {
        "target_tokens": [6, 7, 8],
        "logprobs": [-5.0, -6.0, -5.0],
        "advantages": [1.0, -1.0, 0.5],
        "ref_logprobs": [-5.0, -4.0, -3.0],
    }
    needed = {key: inputs[key] for key in {"target_tokens", *LOSSES[name].required}}
    data = [Datum(model_input=[first, 6, 7], loss_fn_inputs=needed) for first in (1, 2)]
    norms = []
    for skip in (False, True):
        trainer = engine.trainer(4, seed=0)
        output = trainer.forward(data, name, {"skip_token_normalization": skip}, backward=True)
        assert output.metrics.get("skip_token_normalization", 0.0) == skip
        norms.append(trainer.optim_step(AdamParams())["grad_norm"])
    assert norms[1] == pytest.approx(6 * norms[0], rel=1e-4)
    assert norms[0] > 0


def test_many_targets_sum_over_k(trainer: Trainer, tmp_path: Path) -> None:
    randomize(trainer, tmp_path)
    inputs = tokens(6, seed=1)
    targets = np.array(tokens(18, seed=2)).reshape(6, 3)
    targets[2, 1] = -100
    targets[4] = -100
    weights = np.random.default_rng(0).uniform(0, 1, (6, 3))
    weights[5, 2] = 0.0
    datum = Datum(model_input=inputs, loss_fn_inputs={"target_tokens": targets, "weights": weights})
    output = trainer.forward([datum], "cross_entropy", {}, backward=False)
    [p] = logprobs(output)
    for k in range(3):
        alone = Datum(model_input=inputs, loss_fn_inputs={"target_tokens": targets[:, k]})
        [expected] = logprobs(trainer.forward([alone], "cross_entropy", {}, backward=False))
        np.testing.assert_allclose(p[:, k], expected, atol=1e-5)
    assert np.isnan(p[4]).all()
    assert np.isnan(p[2, 1])
    assert output.metrics["tokens"] == 5
    assert output.loss == pytest.approx(-np.nansum(weights * p) / 5, rel=1e-5)


def test_advantage_alone_is_that_of_the_row(trainer: Trainer) -> None:
    full = tokens(6, seed=1)
    q = [-1.0] * 5

    def loss(advantages: list[float]) -> float:
        inputs = {"target_tokens": full[1:], "logprobs": q, "advantages": advantages}
        datum = Datum(model_input=full[:-1], loss_fn_inputs=inputs)
        return trainer.forward([datum], "importance_sampling", {}, backward=False).loss

    assert loss([0.5]) == loss([0.5] * 5) != 0
