"""One result of several forward passes: of a batch that was split, or of the batches of one step.

Source: data-plane reference 1.7.
"""

from __future__ import annotations

from collections.abc import Sequence

from .types import ForwardBackwardOutput


def merged(parts: Sequence[ForwardBackwardOutput], counts: Sequence[int]) -> ForwardBackwardOutput:
    """Merge results; `counts` are their numbers of datums.

    Outputs are concatenated; the loss and each metric are means weighted by datums, over the parts that have them;
    ``skip_token_normalization`` holds if it holds everywhere.
    """
    if len(parts) == 1:
        return parts[0]
    names = {name: None for part in parts for name in part.metrics}
    return ForwardBackwardOutput(
        loss=_weighted_mean([part.loss for part in parts], counts),
        loss_fn_output_type=next((part.loss_fn_output_type for part in parts if part.loss_fn_output_type), ""),
        loss_fn_outputs=[output for part in parts for output in part.loss_fn_outputs],
        metrics={name: _merged_metric(name, parts, counts) for name in names},
    )


def _merged_metric(name: str, parts: Sequence[ForwardBackwardOutput], counts: Sequence[int]) -> float:
    having = [(part.metrics[name], count) for part, count in zip(parts, counts, strict=True) if name in part.metrics]
    if name == "skip_token_normalization":
        return float(len(having) == len(parts) and all(value for value, _ in having))
    return _weighted_mean([value for value, _ in having], [count for _, count in having])


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
