"""Choosing the next token of every row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from loops_async.types import SamplingParams

__all__ = ["pick"]

_GREEDY_BELOW = 1e-6
"""At lower temperatures, float32 leaves only the best token."""

_RUN = 128
"""The tokens whose probabilities are summed first, so that only one run of them is cumulated."""

_BINS = 2048
_BINS_PER_NAT = 128.0
"""The bins of `_draw_best_first` are so narrow that few tokens share one; the last has all that are improbable."""

_Array: TypeAlias = NDArray[Any]


def pick(logprobs: Tensor, rules: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Choose by `draws`, one number in [0, 1) for each row: the token at which the cumulative probability passes it.

    Tokens are cumulated in the order of their ids, or best first where top_k or top_p excludes some.

    Args:
        logprobs: (rows, vocabulary), at temperature 1.
        rules: temperature, then top_k, then top_p over the tokens that top_k keeps, as in vLLM.
        draws: one random number for each row, so that its tokens depend on its seed and not on other rows.
    """
    chosen = torch.zeros(len(rules), dtype=torch.int64)
    random = [row for row, rule in enumerate(rules) if rule.temperature >= _GREEDY_BELOW]
    greedy = [row for row, rule in enumerate(rules) if rule.temperature < _GREEDY_BELOW]
    top_k = [row for row in random if rules[row].top_k > 0]
    top_p = [row for row in random if rules[row].top_k < 1 and rules[row].top_p < 1]
    plain = [row for row in random if rules[row].top_k < 1 and rules[row].top_p >= 1]
    if greedy:
        chosen[greedy] = logprobs[greedy].argmax(-1)
    if plain:
        chosen[plain] = _draw(_tempered(logprobs, rules, plain).exp_(), draws, plain)
    if top_k:
        scaled = _tempered(logprobs, rules, top_k)
        best = scaled.topk(min(scaled.shape[-1], max(rules[row].top_k for row in top_k)))
        kept = _cut(best.values, [rules[row] for row in top_k])
        chosen[top_k] = best.indices.gather(1, _draw(kept, draws, top_k)[:, None])[:, 0]
    if top_p:
        scaled = _tempered(logprobs, rules, top_p)
        for row, own in zip(top_p, scaled.numpy(), strict=True):
            chosen[row] = _draw_best_first(own, rules[row].top_p, draws[row])
    tokens: list[int] = chosen.tolist()
    return tokens


def _tempered(logprobs: Tensor, rules: Sequence[SamplingParams], rows: list[int]) -> Tensor:
    own = logprobs if len(rows) == len(logprobs) else logprobs[rows]
    # Shifted so that the best is 0, since otherwise a low temperature could give infinity.
    return (own - own.amax(-1, keepdim=True)).div_(torch.tensor([[rules[row].temperature] for row in rows]))


def _cut(best_first: Tensor, rules: Sequence[SamplingParams]) -> Tensor:
    """Return the probabilities of the best tokens, with zeros where top_k or top_p excludes one."""
    count = best_first.shape[-1]
    top_k = torch.tensor([[rule.top_k] for rule in rules])
    top_p = torch.tensor([[rule.top_p] for rule in rules])
    kept = best_first.masked_fill(torch.arange(count) >= top_k, -torch.inf).softmax(-1)
    before = kept.cumsum(-1) - kept
    return kept.masked_fill((before >= top_p) & (torch.arange(count) > 0), 0.0)


def _draw(probabilities: Tensor, draws: Sequence[float], rows: list[int]) -> Tensor:
    """Draw from probabilities (rows, tokens) of any sum."""
    runs = pad(probabilities, (0, -probabilities.shape[-1] % _RUN)).unflatten(-1, (-1, _RUN))
    # Double precision: with 49,152 small terms, the rounding errors of float32 would favour the last tokens.
    sums = runs.sum(-1, dtype=torch.float64).cumsum(-1)
    aims = torch.tensor([[draws[row]] for row in rows], dtype=torch.float64) * sums[:, -1:]
    run = _passing(sums, aims)
    before = pad(sums, (1, 0)).gather(1, run)
    inside = runs.gather(1, run[:, :, None].expand(-1, -1, _RUN))[:, 0].cumsum(-1, dtype=torch.float64)
    return (run * _RUN + _passing(inside, aims - before))[:, 0]


def _passing(cumulative: Tensor, aims: Tensor) -> Tensor:
    """Return where each row of `cumulative` (rows, n) passes its aim (rows, 1): at a term above zero."""
    # Rounding may put an aim at the end, or past it.
    end = cumulative[:, -1:]
    return torch.searchsorted(cumulative, torch.minimum(aims, end.nextafter(torch.zeros_like(end))), right=True)


def _draw_best_first(scaled: _Array, top_p: float, draw: float) -> int:
    """Draw from the fewest best tokens whose probability is at least `top_p`, without sorting all of them.

    Tokens are counted into bins of similar probability. Only the bin in which top_p is reached and the bin in which the
    draw falls are sorted.

    Args:
        scaled: logprobs (vocabulary,) divided by the temperature, of which the best is 0.
        top_p: the probability to keep.
        draw: a number in [0, 1).
    """
    probabilities = np.exp(scaled)
    bins = np.minimum(scaled * -_BINS_PER_NAT, _BINS - 1).astype(np.int32)
    sums = np.cumsum(np.bincount(bins, weights=probabilities, minlength=_BINS))

    def sorted_bin(number: int) -> tuple[_Array, _Array]:
        """Return the tokens of a bin, best first, and the sums of all tokens up to each of them."""
        tokens = np.flatnonzero(bins == number)
        tokens = tokens[np.argsort(-scaled[tokens], kind="stable")]
        before = sums[number - 1] if number else 0.0
        return tokens, before + np.cumsum(probabilities[tokens], dtype=np.float64)

    reached = int(np.searchsorted(sums, top_p * sums[-1]))
    tokens, cumulative = sorted_bin(reached)
    last = min(int(np.searchsorted(cumulative, top_p * sums[-1])), len(tokens) - 1)
    aim = min(draw * cumulative[last], np.nextafter(cumulative[last], 0.0))
    drawn = int(np.searchsorted(sums, aim, side="right"))
    if drawn < reached:
        tokens, cumulative = sorted_bin(drawn)
        last = len(tokens) - 1
    return int(tokens[min(int(np.searchsorted(cumulative, aim, side="right")), last)])
