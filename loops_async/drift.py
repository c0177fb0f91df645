"""The difference between the sampler's and the trainer's logprobs, over the tokens that a policy gradient learns from.

With the same weights, both should assign a token the same logprob; if they differ, importance ratios are wrong. For one
token, ``d = train - sample`` is the difference of its logprobs in nats, and ``w = exp(d)`` its importance ratio. A
position counts when its ``mask`` is greater than 0, its advantage is not 0, and both logprobs are finite; an example
needs the mask or the advantages, or both.

These functions need numpy (the ``numpy`` extra); Weights & Biases is only needed to log to one of its runs.
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
        training_logprobs: for each example the trainer's logprobs of its targets, of shape (N,), e.g. the
            ``logprobs`` of `ForwardBackwardOutput.loss_fn_outputs`.
        prefix: stands before the names of the metrics.

    Returns:
        ``kl_sample_train_v1_loops`` = mean(-d), ``kl_sample_train_v2_loops`` = mean(d^2) / 2 and
        ``kl_sample_train_k3`` = mean(w - 1 - d) estimate the KL divergence of the sampler from the trainer
        (Schulman, "Approximating KL Divergence", 2020: k1, k2, k3). ``is_ratio_mean`` = mean(w) is 1 for equal
        weights; ``ess_fraction`` = (sum w)^2 / (n sum w^2), between 1/n and 1, is the effective sample size as a
        fraction of the tokens. ``diff_mean``, ``diff_abs_p50``, ``_p90``, ``_p99``, ``_max``, ``frac_abs_gt_1``, ``_2``
        and ``_4`` describe d; ``entropy`` = mean(-sample) is an estimate of the sampler's; ``n_action_tokens`` is n.
        Exponents are capped at 80. If no token counts, there is only ``n_action_tokens``, 0.

    Raises:
        InputError: lengths differ, or an input is missing.
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
        wandb_run: a Weights & Biases run, or any object with its ``log(metrics, step=…)``; None logs nothing.
        step: the step to log under.
        data: as in `loops_compute_kl_sample_train`.
        forward_backward_output: the result of `TrainingClient.forward_backward` for `data`.
        training_logprobs: the trainer's logprobs, instead of `forward_backward_output`.
        prefix: stands before the names of the metrics.
        log_histogram: log a histogram of d as ``per_token_diff_hist``.
        max_histogram_tokens: the largest number of tokens in the histogram, evenly chosen.
        log_worst_tokens: log the table of `top_divergent_tokens` as ``worst_tokens``.
        top_n: the number of rows of that table.
        tokenizer: shows the table's tokens as text, as in `top_divergent_tokens`.

    Returns:
        The logged metrics; the histogram and the table are only included if `wandb_run` is given and wandb is
        installed.

    Raises:
        InputError: neither `forward_backward_output` nor `training_logprobs` is given, lengths differ, or an input is
            missing.
        ImportError: numpy is not installed.
    """
    if training_logprobs is None:
        if forward_backward_output is None:
            raise InputError("training_logprobs", "pass forward_backward_output or training_logprobs")
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
        training_logprobs: as in `loops_compute_kl_sample_train`.
        top_n: the largest number of tokens to list.
        tokenizer: any object with ``decode(ids)``, to show tokens and their context as text; None shows ids.
        context_before: the number of tokens shown before each.
        context_after: the number of tokens shown after each.

    Returns:
        Dicts of ``rank`` (from 1), ``datum`` (the example's index), ``position`` (of the token in the whole sequence,
        i.e. 1 more than that of the input which predicts it), ``token``, ``logp_sampler``, ``logp_trainer``, ``diff``
        (d), ``is_weight`` (w) and ``context``, in which the token stands between ⟦ and ⟧.

    Raises:
        InputError: lengths differ, or an input is missing.
        ImportError: numpy is not installed.
    """
    import numpy as np

    compared = _compared(data, training_logprobs)
    worst = np.argsort(-np.abs(compared.diff), kind="stable")[:top_n]
    columns = np.stack([*compared, compared.diff, _ratios(compared.diff)])[:, worst]
    rows: list[dict[str, Any]] = []
    for rank, (datum, position, sample, train, diff, ratio) in enumerate(columns.T.tolist(), start=1):
        token, context = _token_and_context(data[int(datum)], int(position), tokenizer, context_before, context_after)
        values = (rank, int(datum), int(position) + 1, token, sample, train, diff, ratio, context)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


class _Compared(NamedTuple):
    """The tokens that count, of all examples in order; `datum` and `position` hold integers."""

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
        raise InputError(
            "training_logprobs", f"expected one entry for each of {len(data)} datums; got {len(training_logprobs)}"
        )
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
        at = np.flatnonzero(_counted(datum, index, len(sample)) & np.isfinite(sample) & np.isfinite(train))
        parts.append(np.stack([np.full(len(at), index, float), at.astype(float), sample[at], train[at]]))
    compared = _Compared(*np.concatenate(parts, axis=1))
    if len(compared.train) and not compared.train.any():
        log.warning(
            "all %d logprobs of the trainer are 0, so the drift metrics are meaningless: the loss reports no logprobs "
            "where the advantage is 0",
            len(compared.train),
        )
    return compared


def _counted(datum: Datum, index: int, count: int) -> NDArray[np.bool_]:
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
    for index, tensors in enumerate(output.loss_fn_outputs):
        if "logprobs" not in tensors:
            raise InputError(f"forward_backward_output.loss_fn_outputs[{index}]", "has no logprobs")
    return [tensors["logprobs"] for tensors in output.loss_fn_outputs]


def _token_and_context(datum: Datum, position: int, tokenizer: Any, before: int, after: int) -> tuple[str, str]:
    """Return the token that `position` predicts, alone and in its context, as text."""
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
        return import_module("wandb")  # an extra: the type checkers run without it
    except ImportError:
        return None
