"""From the wire's datums to arrays: what is scored at each position, and what has weight in the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loops_async.protocol import IGNORED_TARGET, TARGET_TOKENS
from loops_async.types import Datum, ModelInput, TensorData

from ..base import ModelInfo, RefusedError
from .losses import Loss

__all__ = ["Example", "check_tokens", "examples"]

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Example:
    """One datum of N positions with K targets each (K = 1 where the wire's targets have the shape (N,)).

    `scored` and `weighted` of shape (N, K) say which targets get a logprob, and which count in the loss;
    `inputs` are the loss's own, of shape (N, K). `unscored` of shape (N, K) has the logprobs to report for the others.
    """

    tokens: Ints
    targets: Ints
    scored: Bools
    weighted: Bools
    inputs: dict[str, Floats]
    unscored: Floats
    shape: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def weighted_positions(self) -> Ints:
        return np.flatnonzero(self.weighted.any(axis=1))

    def other_positions(self) -> Ints:
        """Positions that are scored and have no weight."""
        return np.flatnonzero(self.scored.any(axis=1) & ~self.weighted.any(axis=1))


def examples(data: Sequence[Datum], loss: Loss, model: ModelInfo) -> list[Example]:
    """Turn a batch that has passed `check_batch` into arrays; a `RefusedError` names what the model cannot take."""
    return [_example(datum, loss, model, f"data[{i}]") for i, datum in enumerate(data)]


def check_tokens(prompt: ModelInput, model: ModelInfo, where: str) -> list[int]:
    """Return the token ids of an input that the model can take."""
    if prompt.has_images:
        raise RefusedError(f"{where}: {model.name} is a text model and cannot see images")
    tokens = prompt.to_ints()
    if not tokens:
        raise RefusedError(f"{where}: must have at least one token")
    if len(tokens) > model.max_seq_len:
        raise RefusedError(f"{where}: has {len(tokens)} tokens; {model.name} takes at most {model.max_seq_len}")
    if min(tokens) < 0 or max(tokens) >= model.vocab_size:
        odd = next(token for token in tokens if not 0 <= token < model.vocab_size)
        raise RefusedError(
            f"{where}: token id {odd} is not in the vocabulary of {model.name} (0 to {model.vocab_size - 1})"
        )
    return tokens


def _example(datum: Datum, loss: Loss, model: ModelInfo, where: str) -> Example:
    given = datum.loss_fn_inputs
    tokens = np.array(check_tokens(datum.model_input, model, f"{where}.model_input"), dtype=np.int64)
    targets, shape = _targets(tokens, given.get(TARGET_TOKENS), model, f"{where}.loss_fn_inputs[{TARGET_TOKENS!r}]")
    inputs = {name: _floats(given[name], shape) for name in loss.inputs if name in given}
    if not loss.by_advantage:
        inputs.setdefault("weights", np.ones(targets.shape, np.float32))
    weighted = (targets != IGNORED_TARGET) & (inputs["advantages" if loss.by_advantage else "weights"] != 0)
    scored = weighted if loss.by_advantage and not loss.scores_all else targets != IGNORED_TARGET
    unscored = np.where(targets == IGNORED_TARGET, np.float32(math.nan), np.float32(0.0))
    if TARGET_TOKENS not in given:
        unscored[-1] = 0.0
    return Example(tokens, targets, scored, weighted, inputs, unscored, shape)


def _targets(tokens: Ints, given: TensorData | None, model: ModelInfo, where: str) -> tuple[Ints, list[int]]:
    """Return targets as (N, K) and the shape that they have on the wire; without any, the input scores itself."""
    n = len(tokens)
    if given is None:
        return np.append(tokens[1:], IGNORED_TARGET)[:, None], [n]
    targets = _array(given, np.int64).reshape(n, -1)
    if odd := targets[(targets != IGNORED_TARGET) & ((targets < 0) | (targets >= model.vocab_size))].tolist():
        vocabulary = f"a token id of {model.name} (0 to {model.vocab_size - 1})"
        raise RefusedError(f"{where}: {odd[0]} is neither {IGNORED_TARGET} nor {vocabulary}")
    return targets, given.shape


def _floats(given: TensorData, shape: list[int]) -> Floats:
    """Return an input as (N, K); one advantage alone is that of every position."""
    return np.broadcast_to(_array(given, np.float32), shape).reshape(shape[0], -1)


def _array(given: TensorData, dtype: type[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what overflows has no weight
        return np.array(given.data, dtype=dtype).reshape(given.shape)
