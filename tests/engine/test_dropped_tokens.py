"""Tokens that a loss drops have no gradient, however absurd their ratio is; all others have that of the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loops_async.types import AdamParams, Datum
from loops_local.engine.base import Trainer
from loops_local.engine.pytorch import losses

from .tools import dot, gradient, randomize, tokens

OVERFLOWS = -9999.0
"""What vLLM reports for a logprob of minus infinity: the ratio is infinite in float32, and in float64."""

SAMPLED = [-1e30, OVERFLOWS, -100.0, -80.0, -8.0, -5.2, -5.0, -4.9, -1.0, -0.1, 0.0, 50.0]
FULL = tokens(7, seed=4)


def slope_ppo(p: float, q: float, advantage: float, *, low: float, high: float) -> float:
    with np.errstate(over="ignore"):
        ratio = float(np.exp(p - q))
    dropped = ratio > high if advantage > 0 else ratio < low
    return 0.0 if dropped else -advantage * ratio


def slope_dppo(
    p: float, q: float, advantage: float, *, low: float, high: float, adv_tau: float, kl_tau: float
) -> float:
    with np.errstate(over="ignore"):
        ratio, moved = float(np.exp(p - q)), float(np.exp(p) - np.exp(q))
    dropped = moved > high if advantage > 0 else moved < -low
    distance = 2 * kl_tau * (p - q) if kl_tau else 0.0
    return distance - (0.0 if dropped else adv_tau * advantage * ratio)


PPO = [{"low": 0.8, "high": 1.2}, {"low": 0.0, "high": 4.0}, {"low": 1.0, "high": 1.0}]
DPPO = [
    {"low": 0.2, "high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3},
    {"low": 0.0, "high": 0.0, "adv_tau": 0.7, "kl_tau": 0.0},
]
CASES = [("ppo", settings) for settings in PPO] + [("dppo", settings) for settings in DPPO]


def config_of(name: str, settings: dict[str, float]) -> dict[str, float]:
    low, high = ("clip_low_threshold", "clip_high_threshold") if name == "ppo" else ("dppo_mask_low", "dppo_mask_high")
    rest = {key: value for key, value in settings.items() if key not in ("low", "high")}
    return {low: settings["low"], high: settings["high"], **rest}


@given(
    case=st.sampled_from(CASES),
    entries=st.lists(
        st.tuples(
            st.floats(-12, 0),
            st.sampled_from(SAMPLED),
            st.sampled_from([-1e4, -2.0, -0.5, 0.25, 1.0, 1e4]),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_the_slope_of_each_token(case: tuple[str, dict[str, float]], entries: list[tuple[float, float, float]]) -> None:
    """Against NumPy; where the formula itself overflows, the loss may too."""
    name, settings = case
    p, q, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*entries, strict=True))
    p.requires_grad_(True)
    loss = losses.find(name, config_of(name, settings)).function(p, logprobs=q, advantages=advantages)
    [found] = torch.autograd.grad(loss.sum(), p)
    slope = slope_ppo if name == "ppo" else slope_dppo
    for own, entry in zip(found.tolist(), entries, strict=True):
        expected = slope(*entry, **settings)
        if np.isfinite(expected):
            assert own == pytest.approx(expected, rel=1e-9, abs=1e-300)
            assert (own == 0) == (expected == 0)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ppo", {}),
        ("ppo", {"clip_low_threshold": 0.0, "clip_high_threshold": 9.0}),
        ("dppo", {"dppo_mask_high": 0.0, "kl_tau": 0.0}),
        ("cispo", {}),
    ],
)
@pytest.mark.parametrize("sampled", [-95.0, OVERFLOWS, -1e30])
def test_a_dropped_token_does_not_poison_the_step(
    trainer: Trainer, tmp_path: Path, name: str, config: dict[str, Any], sampled: float
) -> None:
    """The gradient is that of the other tokens alone; `cispo` drops none, but bounds the weight of each."""
    advantages = np.array([1.0, -1.0, 2.0, 0.5, 1.0, 1.0])
    ordinary = np.array([-5.0, -5.6, -5.5, -5.4, -5.6, -5.5])
    absurd = np.where([True, False, False, False, True, False], sampled, ordinary)
    start = randomize(trainer, tmp_path)

    def after(q: Any, advantage: Any) -> Any:
        randomize(trainer, tmp_path)
        inputs = {"target_tokens": FULL[1:], "logprobs": q, "advantages": advantage}
        datum = Datum(model_input=FULL[:-1], loss_fn_inputs=inputs)
        trainer.forward([datum], name, {**config, "skip_token_normalization": True}, backward=True)
        return gradient(trainer, tmp_path)

    found = after(absurd, advantages)
    bounded = name == "cispo"
    expected = after(
        np.where(absurd == sampled, -50.0, ordinary), advantages if bounded else advantages * (absurd != sampled)
    )
    assert dot(found, found) > 0
    for key in start:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-3, atol=1e-6)


def test_a_token_that_is_kept_with_an_absurd_ratio_is_said(trainer: Trainer) -> None:
    """With a negative advantage a ratio has no upper bound, so the gradient really overflows: no step is taken."""
    inputs = {"target_tokens": FULL[1:], "logprobs": [OVERFLOWS] * 6, "advantages": [-1.0] * 6}
    trainer.forward([Datum(model_input=FULL[:-1], loss_fn_inputs=inputs)], "ppo", {}, backward=True)
    with pytest.raises(ValueError, match="not finite"):
        trainer.optim_step(AdamParams())
