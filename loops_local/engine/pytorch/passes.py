"""One pass over a batch: micro-batches through the model, logprobs of the needed positions, the loss, its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import cores
from .adapter import LoraAdapter
from .examples import Example, Floats, Ints
from .lora import pairs, using
from .losses import Loss
from .models import Base
from .recompute import recomputing

__all__ = ["Pass", "Score", "run"]

MICRO_BATCH_TOKENS = 1024
"""The positions, with padding, of one micro-batch. More is not faster. Longer rows recompute their activations."""

HEAD_POSITIONS = 512
"""The number of positions whose logits are in memory at once."""


@dataclass(eq=False)
class Score:
    """The result for one datum of N positions: logprobs (N, K), and the best tokens (N, top_k) with their logprobs."""

    logprobs: Floats
    top_ids: Ints
    top_logprobs: Floats


@dataclass(eq=False)
class Pass:
    """Sums over a batch: `loss` over `terms` (tokens, or pairs); `tokens` is the number of positions with weight."""

    loss: float
    terms: int
    tokens: int
    gradient: Tensor | None
    scores: list[Score]


def run(
    base: Base,
    adapter: LoraAdapter,
    given: Sequence[Example],
    loss: Loss,
    *,
    backward: bool,
    top_k: int,
) -> Pass:
    """Compute the logprobs and the loss of `given`; with `backward` also the gradient of the adapter's flat vector."""
    flat = adapter.flat.detach().requires_grad_(backward)
    scores = [_blank(example, top_k) for example in given]
    result = Pass(0.0, 0, 0, None, scores)
    for chosen in _micro_batches(given, group=loss.rule.group):
        cores.adjust()
        rows, out = [given[i] for i in chosen], [scores[i] for i in chosen]
        tokens = _padded(rows)
        weighted = _Positions(rows, [row.weighted_positions() for row in rows])
        others = _Positions(rows, [row.other_positions() for row in rows])
        with (
            torch.set_grad_enabled(backward),
            using(base.active(pairs(flat, base.shapes, adapter.rank), adapter.scale)),
            recomputing(tokens.numel() > MICRO_BATCH_TOKENS),
        ):
            hidden = base.hidden(tokens)
            logprobs = _score(base, hidden, weighted, out)
            with torch.no_grad():
                _score(base, hidden, others, out)
            terms = loss.function(**_arguments(loss, weighted, logprobs))
            total = terms.sum()
            if total.requires_grad:
                total.backward()
        result.loss += float(total.detach())
        result.terms += terms.numel() if loss.paired else len(weighted.at)
        result.tokens += len(weighted.at)
    result.gradient = flat.grad
    return result


def _blank(example: Example, top_k: int) -> Score:
    shape = (len(example), top_k)
    return Score(example.unscored.copy(), np.full(shape, -1), np.full(shape, np.nan, np.float32))


def _micro_batches(given: Sequence[Example], *, group: int) -> Iterator[list[int]]:
    """Yield indices of rows of similar length that fit in memory; `group` neighbours stay together, in order."""
    groups = [range(i, i + group) for i in range(0, len(given), group)]
    lengths = {rows: max(len(given[i]) for i in rows) for rows in groups}
    batch: list[int] = []
    longest = 0
    for rows in sorted(groups, key=lengths.__getitem__, reverse=True):
        if batch and (len(batch) + group) * longest > MICRO_BATCH_TOKENS:
            yield batch
            batch = []
        if not batch:
            longest = lengths[rows]
        batch += rows
    yield batch


def _padded(rows: Sequence[Example]) -> Tensor:
    """Pad on the right; no mask is needed, since causal attention uses no position to the right."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, example in zip(tokens, rows, strict=True):
        row[: len(example)] = torch.from_numpy(example.tokens)
    return tokens


class _Positions:
    """Some positions of a batch's rows, as flat arrays of P numbers."""

    def __init__(self, rows: Sequence[Example], by_row: Sequence[Ints]) -> None:
        self.rows = rows
        self.by_row = by_row
        self.row = np.repeat(np.arange(len(rows)), [len(at) for at in by_row])
        self.at = np.concatenate(by_row)

    def take(self, arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
        """Gather (P, ...) from an array (N, ...) of each row."""
        return np.concatenate([array[at] for array, at in zip(arrays, self.by_row, strict=True)])

    def scatter(self, logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor, out: Sequence[Score]) -> None:
        """Write the results of these P positions to the rows' scores."""
        counts = [len(at) for at in self.by_row]
        parts = zip(logprobs.split(counts), top_ids.split(counts), top_logprobs.split(counts), strict=True)
        for row, at, score, (own, ids, best) in zip(self.rows, self.by_row, out, parts, strict=True):
            score.logprobs[at] = np.where(row.scored[at], own.numpy(), row.unscored[at])
            score.top_ids[at] = ids.numpy()
            score.top_logprobs[at] = best.numpy()


def _score(base: Base, hidden: Tensor, where: _Positions, out: Sequence[Score]) -> Tensor:
    """Return the logprobs (P, K) of the targets at some positions, and write them to `out`."""
    states = hidden[torch.from_numpy(where.row), torch.from_numpy(where.at)]
    targets = torch.from_numpy(where.take(row.targets for row in where.rows).clip(min=0))
    top_k = out[0].top_ids.shape[1]
    parts = list(zip(states.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        done = [checkpoint(_head, base, *part, top_k, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        done = [_head(base, *part, top_k) for part in parts]
    logprobs, top_ids, top_logprobs = (torch.cat(column) for column in zip(*done, strict=True))
    where.scatter(logprobs.detach(), top_ids, top_logprobs, out)
    return logprobs


def _head(base: Base, states: Tensor, targets: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = base.logits(states)
    norm = logits.logsumexp(-1, keepdim=True)
    best = logits.detach().topk(top_k)
    own = logits.gather(1, targets.to(base.device)) - norm
    return own.cpu(), best.indices.cpu(), (best.values - norm.detach()).cpu()


def _arguments(loss: Loss, where: _Positions, logprobs: Tensor) -> dict[str, Any]:
    """Return the loss's arguments for the E targets with weight; with K targets, a position may have several."""
    entries = where.take(row.weighted for row in where.rows)
    arguments: dict[str, Any] = {"p": logprobs[torch.from_numpy(entries)]}
    for name in loss.inputs:
        arguments[name] = torch.from_numpy(where.take(row.inputs[name] for row in where.rows)[entries])
    if loss.paired:
        arguments |= {"rows": torch.from_numpy(where.row), "pairs": len(where.rows) // loss.rule.group}
    return arguments
