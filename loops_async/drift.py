"""How far the sampler's logprobs are from the trainer's, over the tokens that a policy gradient learns from.

Both should score a token alike when they hold the same weights; where they do not, importance ratios are off. For one
token, ``d = train - sample`` is the difference of its logprobs in nats, and ``w = exp(d)`` its importance ratio. A
position counts when its ``mask`` is greater than 0, its advantage is not 0, and both logprobs are finite; an example
may lack the mask or the advantages, not both.

These functions need numpy (the ``numpy`` extra), and Weights & Biases only where there is a run to log to.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .errors import InputError
from .types import ArrayLike, Datum, ForwardBackwardOutput, TensorData

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["loops_compute_kl_sample_train", "loops_log_kl_sample_train", "top_divergent_tokens"]

log: logging.Logger = logging.getLogger("loops_async")

PREFIX: Final = "optim/train-sample-div/"
LARGEST_EXPONENT: Final = 80.0
COLUMNS: Final = (
    "rank",
    "datum",
    "position",
    "token",
    "logp_sampler",
    "logp_trainer",
    "diff",
    "is_weight",
    "context",
)


def loops_compute_kl_sample_train(
    data: Sequence[Datum], training_logprobs: Sequence[ArrayLike], *, prefix: str = PREFIX
) -> dict[str, float]:
    """Compute the drift of a batch.

    Args:
        data: examples with the sampler's ``logprobs``, and ``mask`` or ``advantages`` or both, all of shape (N,).
        training_logprobs: for each example the trainer's logprobs of its targets, of shape (N,), such as the
            ``logprobs`` of `ForwardBackwardOutput.loss_fn_outputs`.
        prefix: what the names of the metrics begin with.

    Returns:
        ``kl_sample_train_v1_loops`` = mean(-d), ``kl_sample_train_v2_loops`` = mean(d^2) / 2 and
        ``kl_sample_train_k3`` = mean(w - 1 - d) estimate the KL divergence of the sampler from the trainer
        (Schulman, "Approximating KL Divergence", 2020: k1, k2, k3). ``is_ratio_mean`` = mean(w) is 1 for equal
        weights; ``ess_fraction`` = (sum w)^2 / (n sum w^2), between 1/n and 1, is the share of the tokens that still
        counts. ``diff_mean``, ``diff_abs_p50``, ``_p90``, ``_p99``, ``_max``, ``frac_abs_gt_1``, ``_2`` and ``_4``
        describe d; ``entropy`` = mean(-sample) is that of the sampler; ``n_action_tokens`` is n. Exponents are capped
        at 80. Without tokens there is only ``n_action_tokens``.

    Raises:
        InputError: lengths do not fit, or an input is missing.
        ImportError: numpy is not installed.
    """
    return {prefix + name: value for name, value in _metrics(_compared(data, training_logprobs)).items()}


def loops_log_kl_sample_train(
    wandb_run: Any,
    step: int,
    data: Sequence[Datum],
    forward_backward_output: ForwardBackwardOutput | None = None,
    *,
    training_logprobs: Sequence[ArrayLike] | None = None,
    prefix: str = PREFIX,
    log_histogram: bool = True,
    max_histogram_tokens: int = 50_000,
    log_worst_tokens: bool = True,
    top_n: int = 20,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Compute the drift of a batch, and log it with a histogram of d and a table of the worst tokens.

    Args:
        wandb_run: a Weights & Biases run, or anything with its ``log(metrics, step=…)``; None logs nothing.
        step: the step to log under.
        data: as in `loops_compute_kl_sample_train`.
        forward_backward_output: what `TrainingClient.forward_backward` returned for `data`.
        training_logprobs: instead of it, the trainer's logprobs.
        prefix: what the names of the metrics begin with.
        log_histogram: log ``per_token_diff_hist``.
        max_histogram_tokens: the most tokens in it, evenly chosen.
        log_worst_tokens: log ``worst_tokens``, see `top_divergent_tokens`.
        top_n: rows of that table.
        tokenizer: shows its tokens as text.

    Returns:
        All that was logged; the histogram and the table only where there is a run to log them to and wandb is
        installed.
    """
    if training_logprobs is None:
        if forward_backward_output is None:
            raise InputError("training_logprobs", "give forward_backward_output or training_logprobs")
        training_logprobs = _logprobs_of(forward_backward_output)
    compared = _compared(data, training_logprobs)
    metrics: dict[str, Any] = {prefix + name: value for name, value in _metrics(compared).items()}
    if wandb_run is None:
        return metrics
    wandb = _wandb() if len(compared.diff) else None
    if wandb is not None and log_histogram:
        stride = -(-len(compared.diff) // max_histogram_tokens)
        metrics[f"{prefix}per_token_diff_hist"] = wandb.Histogram(compared.diff[::stride])
    if wandb is not None and log_worst_tokens:
        rows = top_divergent_tokens(data, training_logprobs, top_n=top_n, tokenizer=tokenizer)
        table = [[row[column] for column in COLUMNS] for row in rows]
        metrics[f"{prefix}worst_tokens"] = wandb.Table(columns=list(COLUMNS), data=table)
    wandb_run.log(metrics, step=step)
    return metrics


def top_divergent_tokens(
    data: Sequence[Datum],
    training_logprobs: Sequence[ArrayLike],
    *,
    top_n: int = 20,
    tokenizer: Any = None,
    context_before: int = 40,
    context_after: int = 20,
) -> list[dict[str, Any]]:
    """List the tokens whose two logprobs differ most.

    Args:
        data: as in `loops_compute_kl_sample_train`.
        training_logprobs: as there.
        top_n: the most tokens to list.
        tokenizer: anything with ``decode(ids)``, to show tokens and their surroundings as text; None shows ids.
        context_before: tokens shown before each.
        context_after: tokens shown after each.

    Returns:
        Dicts of ``rank`` (from 1), ``datum`` (its index), ``position`` (of the token in the whole sequence: 1 more
        than that of the input which predicts it), ``token``, ``logp_sampler``, ``logp_trainer``, ``diff`` (d),
        ``is_weight`` (w) and ``context``, in which the token stands between ⟦ and ⟧.
    """
    import numpy as np

    compared = _compared(data, training_logprobs)
    worst = np.argsort(-np.abs(compared.diff), kind="stable")[:top_n]
    columns = np.stack([*compared, compared.diff, _ratios(compared.diff)])[:, worst]
    rows: list[dict[str, Any]] = []
    for rank, (datum, position, sample, train, diff, ratio) in enumerate(columns.T.tolist(), start=1):
        token, context = _shown(data[int(datum)], int(position), tokenizer, context_before, context_after)
        values = (rank, int(datum), int(position) + 1, token, sample, train, diff, ratio, context)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


class _Compared(NamedTuple):
    """The tokens that count, of all examples one after the other; `datum` and `position` are whole numbers."""

    datum: Floats
    position: Floats
    sample: Floats
    train: Floats

    @property
    def diff(self) -> Floats:
        return self.train - self.sample


def _compared(data: Sequence[Datum], training_logprobs: Sequence[ArrayLike]) -> _Compared:
    try:
        import numpy as np
    except ImportError as missing:
        raise ImportError("drift metrics need numpy: pip install 'loops-async[numpy]'") from missing

    if len(data) != len(training_logprobs):
        raise InputError("training_logprobs", f"needs one for each of {len(data)} datums; got {len(training_logprobs)}")
    parts: list[Floats] = [np.empty((4, 0))]
    for index, (datum, trained) in enumerate(zip(data, training_logprobs, strict=True)):
        sample = _input(datum, "logprobs", index)
        train = TensorData.of(trained, path=f"training_logprobs[{index}]").to_numpy().astype(np.float64).ravel()
        if sample is None:
            raise InputError(f"data[{index}].loss_fn_inputs", "needs the sampler's logprobs")
        if len(train) != len(sample):
            raise InputError(
                f"training_logprobs[{index}]", f"has {len(train)} entries, the sampler's logprobs {len(sample)}"
            )
        at = np.flatnonzero(_counting(datum, index, len(sample)) & np.isfinite(sample) & np.isfinite(train))
        parts.append(np.stack([np.full(len(at), index, float), at.astype(float), sample[at], train[at]]))
    compared = _Compared(*np.concatenate(parts, axis=1))
    if len(compared.train) and not compared.train.any():
        log.warning(
            "all %d logprobs of the trainer are 0, so the drift metrics say nothing: the loss reports none where the "
            "advantage is 0",
            len(compared.train),
        )
    return compared


def _counting(datum: Datum, index: int, count: int) -> NDArray[np.bool_]:
    import numpy as np

    mask, advantages = _input(datum, "mask", index), _input(datum, "advantages", index)
    if mask is None and advantages is None:
        raise InputError(f"data[{index}].loss_fn_inputs", "needs a mask or advantages, to know which tokens count")
    counting = np.ones(count, dtype=bool)
    for name, values in (("mask", None if mask is None else mask > 0), ("advantages", advantages)):
        if values is None:
            continue
        if len(values) not in (count, 1 if name == "advantages" else count):
            raise InputError(
                f"data[{index}].loss_fn_inputs[{name!r}]", f"has {len(values)} entries, the logprobs {count}"
            )
        counting &= values != 0
    return counting


def _input(datum: Datum, name: str, index: int) -> Floats | None:
    import numpy as np

    tensor = datum.loss_fn_inputs.get(name)
    if tensor is None:
        return None
    try:
        return tensor.to_numpy().astype(np.float64).ravel()
    except (TypeError, ValueError) as problem:
        raise InputError(f"data[{index}].loss_fn_inputs[{name!r}]", str(problem)) from problem


def _metrics(compared: _Compared) -> dict[str, float]:
    import numpy as np

    diff, count = compared.diff, len(compared.diff)
    if not count:
        return {"n_action_tokens": 0.0}
    ratios, sizes = _ratios(diff), np.abs(diff)
    p50, p90, p99 = np.percentile(sizes, (50, 90, 99))
    metrics = {
        "kl_sample_train_v1_loops": -diff.mean(),
        "kl_sample_train_v2_loops": 0.5 * (diff**2).mean(),
        "kl_sample_train_k3": (ratios - 1.0 - diff).mean(),
        "is_ratio_mean": ratios.mean(),
        "ess_fraction": ratios.sum() ** 2 / (count * (ratios**2).sum()),
        "diff_mean": diff.mean(),
        "diff_abs_p50": p50,
        "diff_abs_p90": p90,
        "diff_abs_p99": p99,
        "diff_abs_max": sizes.max(),
        **{f"frac_abs_gt_{limit}": (sizes > limit).mean() for limit in (1, 2, 4)},
        "entropy": -compared.sample.mean(),
        "n_action_tokens": count,
    }
    return {name: float(value) for name, value in metrics.items()}


def _ratios(diff: Floats) -> Floats:
    import numpy as np

    return np.exp(np.minimum(diff, LARGEST_EXPONENT))


def _logprobs_of(output: ForwardBackwardOutput) -> list[TensorData]:
    for index, one in enumerate(output.loss_fn_outputs):
        if "logprobs" not in one:
            raise InputError(f"forward_backward_output.loss_fn_outputs[{index}]", "has no logprobs")
    return [one["logprobs"] for one in output.loss_fn_outputs]


def _shown(datum: Datum, position: int, tokenizer: Any, before: int, after: int) -> tuple[str, str]:
    """Describe the token that `position` predicts, and what stands around it."""
    tokens = datum.model_input.to_positions()
    target = datum.loss_fn_inputs.get("target_tokens")
    own = target.data[position] if target is not None else tokens[position + 1] if position + 1 < len(tokens) else None
    start = max(0, position + 1 - before)
    text = _decoded(tokenizer, [own])
    left = _decoded(tokenizer, tokens[start : position + 1])
    right = _decoded(tokenizer, tokens[position + 2 : position + 2 + after])
    return text, f"{left}⟦{text}⟧{right}"


def _decoded(tokenizer: Any, tokens: Sequence[Any]) -> str:
    known = [int(token) for token in tokens if token is not None]
    return " ".join(map(str, known)) if tokenizer is None else str(tokenizer.decode(known)).replace("\n", "\\n")


def _wandb() -> Any:
    try:
        return import_module("wandb")  # an extra, of which the type checkers need know nothing
    except ImportError:
        return None
