"""Choosing the next token of every row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loops_async.types import SamplingParams

__all__ = ["pick"]

_GREEDY_BELOW = 1e-6
"""At lower temperatures, float32 leaves only the best token."""


def pick(logprobs: Tensor, rules: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Choose by `draws`, one number in [0, 1) for each row: the token at which the cumulative probability passes it.

    Args:
        logprobs: (rows, vocabulary), at temperature 1.
        rules: temperature, then top_k, then top_p over the tokens that top_k keeps, as in vLLM.
        draws: one random number for each row, so that its tokens depend on its seed and not on other rows.
    """
    chosen = logprobs.argmax(dim=-1)
    random = [row for row, rule in enumerate(rules) if rule.temperature >= _GREEDY_BELOW]
    plain = [row for row in random if rules[row].top_k < 1 and rules[row].top_p >= 1]
    cut = [row for row in random if row not in plain]
    if plain:
        chosen[plain] = _draw(_tempered(logprobs, rules, plain).softmax(-1), draws, plain)
    if cut:
        best_first, order = _tempered(logprobs, rules, cut).sort(dim=-1, descending=True)
        kept = _cut(best_first, [rules[row] for row in cut])
        chosen[cut] = order.gather(1, _draw(kept, draws, cut)[:, None])[:, 0]
    tokens: list[int] = chosen.tolist()
    return tokens


def _tempered(logprobs: Tensor, rules: Sequence[SamplingParams], rows: list[int]) -> Tensor:
    # Shifted so that the best is 0, since otherwise a low temperature could give infinity.
    own = logprobs[rows]
    return (own - own.amax(-1, keepdim=True)) / torch.tensor([[rules[row].temperature] for row in rows])


def _cut(best_first: Tensor, rules: Sequence[SamplingParams]) -> Tensor:
    """Return the probabilities (rows, vocabulary), best first, with zeros where top_k or top_p excludes a token."""
    vocabulary = best_first.shape[-1]
    top_k = torch.tensor([[rule.top_k if rule.top_k > 0 else vocabulary] for rule in rules])
    top_p = torch.tensor([[rule.top_p] for rule in rules])
    kept = best_first.masked_fill(torch.arange(vocabulary) >= top_k, -torch.inf).softmax(-1)
    before = kept.cumsum(-1) - kept
    return kept.masked_fill((before >= top_p) & (torch.arange(vocabulary) > 0), 0.0)


def _draw(probabilities: Tensor, draws: Sequence[float], rows: list[int]) -> Tensor:
    # Double precision: with 49,152 small terms, the rounding errors of float32 would favour the last tokens.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    aims = torch.tensor([[draws[row]] for row in rows], dtype=torch.float64) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, aims, right=True)[:, 0]
    return found.clamp(max=probabilities.shape[-1] - 1)
