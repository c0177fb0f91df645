"""Choosing tokens: the same as by sorting the whole vocabulary, which is the plain form kept here as the reference."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loops_async.types import SamplingParams
from loops_local.engine.pytorch.picking import pick


def _sorted_pick(logprobs: NDArray[np.float32], rule: SamplingParams, draw: float) -> int:
    """Choose as in the definition: temperature, top_k, top_p, then the cumulative probability that passes the draw."""
    scaled = (logprobs - logprobs.max()).astype(np.float64) / rule.temperature
    order = np.arange(len(scaled))
    if rule.top_k > 0 or rule.top_p < 1:
        order = np.argsort(-scaled, kind="stable")
    kept = np.exp(scaled[order])
    if rule.top_k > 0:
        kept[rule.top_k :] = 0
    kept /= kept.sum()
    before = kept.cumsum() - kept
    if rule.top_p < 1:
        kept[(before >= rule.top_p) & (np.arange(len(kept)) > 0)] = 0
    cumulative = kept.cumsum()
    return int(order[np.searchsorted(cumulative, draw * cumulative[-1], side="right")])


@pytest.mark.parametrize("size", [5, 128, 259, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.05, "temperature": 2.0},
        {"top_p": 0.9999},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 100_000},
        {"top_k": 40, "top_p": 0.7},
    ],
)
def test_the_tokens_are_those_of_the_definition(size: int, spread: float, settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(size)
    logprobs = (torch.randn(40, size, generator=generator) * spread).log_softmax(-1)
    draws = [random.Random(i).random() for i in range(40)]
    rule = SamplingParams(**settings)
    expected = [_sorted_pick(row, rule, draw) for row, draw in zip(logprobs.numpy(), draws, strict=True)]
    assert pick(logprobs, [rule] * 40, draws) == expected


def test_rows_with_different_rules_do_not_depend_on_each_other() -> None:
    logprobs = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    rules = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=3, top_p=0.5, temperature=0.7),
    ]
    draws = [0.1, 0.2, 0.9, 0.999999, 0.5]
    alone = [pick(logprobs[i : i + 1], [rules[i]], [draws[i]])[0] for i in range(5)]
    assert pick(logprobs, rules, draws) == alone


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.5}, {"top_k": 2}, {"temperature": 1e-5}])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_impossible_tokens_are_never_chosen(settings: dict[str, float], draw: float) -> None:
    logprobs = torch.full((1, 300), -torch.inf)
    logprobs[0, [150, 151]] = -0.6931472
    assert pick(logprobs, [SamplingParams(**settings)], [draw])[0] in (150, 151)
