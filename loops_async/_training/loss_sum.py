"""The sum of a loss over a batch, from the logprobs that the trainer returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from .._arguments import check_config, checked_data
from ..errors import InputError
from ..protocol import ADVANTAGES, LOSSES, WEIGHTS, loss_settings
from ..types import Datum, ForwardBackwardOutput, LossFnType, TensorData

__all__ = ["loss_sum"]

Settings: TypeAlias = Mapping[str, float]

Term: TypeAlias = Callable[[float, float, float, Settings], float]
"""The loss of one target, from its logprob p, the sampler's q, its advantage or weight, and the settings."""


def loss_sum(
    data: Sequence[Datum],
    output: ForwardBackwardOutput,
    loss_fn: LossFnType = "cross_entropy",
    loss_fn_config: Mapping[str, Any] | None = None,
) -> float:
    """Return the loss of a pass as a sum over its targets, or over the pairs of ``dpo``.

    `ForwardBackwardOutput.loss` is a mean. The trainer's gradients are those of this sum, before `optim_step` divides
    by the number of tokens. The formulas are those of the trainer (Tinker's documentation of losses; prime-rl for
    ``dppo``; arXiv 2305.18290 for ``dpo``), applied to the logprobs that it returned: targets whose weight or advantage
    is zero add nothing. The embedded service also reports the sum, as the metric ``loss:sum``.

    Args:
        data: the examples of the pass.
        output: its result.
        loss_fn: its loss.
        loss_fn_config: the settings of its loss.

    Returns:
        The sum in nats; infinite where a ratio of probabilities is too large for a float.

    Raises:
        InputError: an argument is invalid, or `output` has no logprob for each target of `data`.

    Example:
        >>> from loops_async import Datum, ForwardBackwardOutput, TensorData, loss_sum
        >>> data = [Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 2.0]})]
        >>> output = ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": TensorData.of([-0.5, -1.0])}])
        >>> loss_sum(data, output, "cross_entropy")
        2.5
    """
    settings = loss_settings(loss_fn, check_config(loss_fn, loss_fn_config) or {})
    examples = list(checked_data(data, loss_fn))
    if len(output.loss_fn_outputs) != len(examples):
        problem = f"has {len(output.loss_fn_outputs)} outputs, and data has {len(examples)} datums"
        raise InputError("output.loss_fn_outputs", f"{problem}; give the result of the pass over exactly this data")
    pairs = enumerate(zip(examples, output.loss_fn_outputs, strict=True))
    rows = [_row(datum, scored, index, loss_fn) for index, (datum, scored) in pairs]
    if loss_fn == "dpo":
        gains = [sum(weight * (p - ref) for p, ref, weight in row) for row in rows]
        margins = (chosen - rejected for chosen, rejected in zip(gains[::2], gains[1::2], strict=True))
        return math.fsum(_dpo(margin, settings) for margin in margins)
    term = _TERMS[loss_fn]
    return math.fsum(term(p, q, factor, settings) for row in rows for p, q, factor in row)


def _row(datum: Datum, output: Mapping[str, TensorData], index: int, loss_fn: str) -> list[tuple[float, float, float]]:
    """Return the logprob, that of the sampler or the reference, and the factor of each target that counts."""
    rule, given = LOSSES[loss_fn], datum.loss_fn_inputs
    counted = rule.counted_targets(datum)
    path = f"output.loss_fn_outputs[{index}]['logprobs']"
    if "logprobs" not in output or len(output["logprobs"].data) != len(counted):
        raise InputError(path, f"must have one number for each of the {len(counted)} targets of data[{index}]")
    theirs = given.get("logprobs") or given.get("ref_logprobs")
    columns = (output["logprobs"].data, _column(theirs, len(counted), 0.0), _factors(given, len(counted)))
    return [(p, q, factor) for p, q, factor, counts in zip(*map(_floats, columns), counted, strict=True) if counts]


def _factors(given: Mapping[str, TensorData], count: int) -> Sequence[Any]:
    return _column(given.get(ADVANTAGES) or given.get(WEIGHTS), count, 1.0)


def _column(tensor: TensorData | None, count: int, default: float) -> Sequence[Any]:
    """Return a number for each target; one advantage may hold for all."""
    if tensor is None:
        return [default] * count
    return tensor.data * (count // len(tensor.data))


def _floats(numbers: Sequence[Any]) -> Iterator[float]:
    return (math.nan if number is None else number for number in numbers)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _cross_entropy(p: float, q: float, weight: float, settings: Settings) -> float:
    return -weight * p


def _importance_sampling(p: float, q: float, advantage: float, settings: Settings) -> float:
    return -_exp(p - q) * advantage


def _ppo(p: float, q: float, advantage: float, settings: Settings) -> float:
    ratio = _exp(p - q)
    return -min(ratio * advantage, _clipped(ratio, settings) * advantage)


def _cispo(p: float, q: float, advantage: float, settings: Settings) -> float:
    return -_clipped(_exp(p - q), settings) * advantage * p


def _clipped(ratio: float, settings: Settings) -> float:
    return min(max(ratio, settings["clip_low_threshold"]), settings["clip_high_threshold"])


def _dro(p: float, q: float, advantage: float, settings: Settings) -> float:
    return -(advantage * p - 0.5 * settings["beta"] * (p - q) ** 2)


def _dppo(p: float, q: float, advantage: float, settings: Settings) -> float:
    moved = _exp(p) - _exp(q)
    dropped = moved > settings["dppo_mask_high"] if advantage > 0 else moved < -settings["dppo_mask_low"]
    gain = 0.0 if dropped else settings["adv_tau"] * advantage * _exp(p - q)
    return settings["kl_tau"] * (p - q) ** 2 - gain


def _dpo(margin: float, settings: Settings) -> float:
    z, smoothing = settings["beta"] * margin, settings["label_smoothing"]
    return (1 - smoothing) * _softplus(-z) + smoothing * _softplus(z)


def _softplus(x: float) -> float:
    """log(1 + exp(x)), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


_TERMS: Final[Mapping[str, Term]] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "dppo": _dppo,
}
