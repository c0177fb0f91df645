"""Losses that the user writes in torch, and the trainer replays as a cross entropy with computed weights.

The trainer's cross entropy is ``-sum(w * p)`` over the targets' logprobs p. Its gradient is that of a user's loss C(p)
when ``w = -dC/dp``, so a forward pass, C's own backward pass here and one weighted cross entropy train with C.
Source: data-plane reference 2.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from anyio import to_thread
from msgspec.structs import replace

from .._operations.batch import Batch, EncodedBatch
from .._operations.submitter import Submitter
from ..errors import InputError, ProtocolError, UnsupportedError
from ..protocol import SKIP_NORMALIZATION, TARGET_TOKENS, WEIGHTS, ForwardBody
from ..types import CustomLossFn, Datum, ForwardBackwardOutput, TensorData
from ..types.tensors import FLOATS

if TYPE_CHECKING:
    import torch

SURROGATE: Final = "cross_entropy"
SURROGATE_CONFIG: Final = {SKIP_NORMALIZATION: True}
"""A normalisation by the number of tokens would scale the gradients of C."""


_SENT: Final = frozenset({TARGET_TOKENS, WEIGHTS})


class CustomLossBatch:
    """One operation: a forward pass, the user's loss in this process, and the backward pass that replays it."""

    name = "forward_backward"
    result = ForwardBackwardOutput
    is_dependent = True
    loss_fn: str | None = "custom"

    def __init__(
        self,
        data: Sequence[Datum],
        scored: Sequence[Datum],
        loss_fn: CustomLossFn,
        body: ForwardBody,
        submitter: Submitter,
    ) -> None:
        self._data = data
        self._scored = scored
        self._loss_fn = loss_fn
        self._body = body
        self._submitter = submitter

    async def encode(self) -> Replay:
        """Score the targets and compute the gradients; this operation keeps its turn meanwhile."""
        forward = await self._submitter.send(Batch("forward", scoring_data(self._scored), self._body))
        data, report = await to_thread.run_sync(replayed, self._data, await forward, self._loss_fn)
        return Replay(await Batch(self.name, data, self._body).encode(), report)


class Replay:
    """The replay of a user's gradients; its result has the user's loss and metrics."""

    def __init__(self, batch: EncodedBatch, report: Mapping[str, float]) -> None:
        self.bodies = batch.bodies
        self.datums = batch.datums
        self.trained_tokens = batch.trained_tokens
        self.tokens = batch.tokens
        self.content = batch.content
        self._batch = batch
        self._report = report

    def merge(self, results: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
        output = self._batch.merge(results)
        return replace(output, loss=self._report["loss"], metrics={**output.metrics, **self._report})


def check_custom_loss(data: Sequence[Datum], loss_fn: Any, loss_type_input: Any) -> None:
    """Check the arguments of a custom loss; `data` is already valid for a cross entropy."""
    if find_spec("torch") is None:
        raise ImportError("forward_backward_custom needs torch: pip install 'loops-async[torch]'")
    if not callable(loss_fn):
        raise InputError("loss_fn", f"expected a function of (data, logprobs), got {type(loss_fn).__name__}")
    if loss_type_input != "logprobs":
        raise InputError("loss_type_input", f"must be 'logprobs'; got {loss_type_input!r}")
    for index, datum in enumerate(data):
        path = f"data[{index}].loss_fn_inputs"
        if "target_tokens" not in datum.loss_fn_inputs:
            raise InputError(path, "a custom loss needs target_tokens")


def without_own_inputs(datum: Any) -> Any:
    """Return a datum with what the trainer reads of it; the rest is for the user's loss alone, in any shape."""
    if not isinstance(datum, Datum) or datum.loss_fn_inputs.keys() <= _SENT:
        return datum
    return replace(datum, loss_fn_inputs={n: tensor for n, tensor in datum.loss_fn_inputs.items() if n in _SENT})


def scoring_data(data: Sequence[Datum]) -> list[Datum]:
    """Return data whose forward pass scores every target, weighted or not."""
    return [datum if "weights" in datum.loss_fn_inputs else _weighted(datum, _zeros(datum)) for datum in data]


def replayed(
    data: Sequence[Datum], scored: ForwardBackwardOutput, loss_fn: CustomLossFn
) -> tuple[list[Datum], dict[str, float]]:
    """Compute the user's loss and gradients from a forward pass.

    Returns:
        The data whose cross entropy has these gradients, and the user's metrics with ``loss``, unless they have it.

    Raises:
        UnsupportedError: the trainer normalised, so gradients could not be replayed.
        ProtocolError: the trainer did not score every example.
        InputError: `loss_fn` returned something invalid, or its gradients are not finite.
    """
    import torch

    if scored.metrics.get(SKIP_NORMALIZATION) != 1.0:
        raise UnsupportedError(
            "this trainer does not support skip_token_normalization, which forward_backward_custom needs; "
            "use one of the trainer's own losses"
        )
    scores = [output["logprobs"] for output in scored.loss_fn_outputs if "logprobs" in output]
    if [one.shape for one in scores] != [_targets(datum).shape for datum in data] or not all(map(_are_floats, scores)):
        raise ProtocolError(f"the trainer did not return a logprob for each target of all {len(data)} examples")
    logprobs = [one.to_torch() for one in scores]
    leaves = [torch.nan_to_num(one, nan=0.0).requires_grad_() for one in logprobs]
    returned = loss_fn(list(data), leaves)
    if not _is_loss_with_metrics(returned):
        raise InputError("loss_fn", f"must return (scalar tensor, dict of metrics); got {returned!r:.200}")
    loss, metrics = returned
    if not loss.requires_grad:
        raise InputError("loss_fn", "returned a loss that does not depend on the logprobs")
    torch.autograd.backward(loss)
    weights = [_weights(index, leaf, one) for index, (leaf, one) in enumerate(zip(leaves, logprobs, strict=True))]
    report = {"loss": loss.item()} | {str(name): _number(name, value) for name, value in metrics.items()}
    return [_weighted(datum, weight) for datum, weight in zip(data, weights, strict=True)], report


def _are_floats(scores: TensorData) -> bool:
    """Whether a tensor of the trainer is what torch can hold: of a known dtype, with a number for each place."""
    return scores.dtype in FLOATS and len(scores.data) == math.prod(scores.shape)


def _is_loss_with_metrics(returned: Any) -> TypeGuard[tuple[torch.Tensor, Mapping[str, Any]]]:
    import torch

    pair: Any = returned
    if not isinstance(returned, tuple) or len(pair) != 2:
        return False
    return isinstance(pair[0], torch.Tensor) and pair[0].numel() == 1 and isinstance(pair[1], Mapping)


def _number(name: Any, value: Any) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise InputError("loss_fn", f"returned a metric {name!r} that is not a number: {value!r:.80}") from problem


def _weights(index: int, leaf: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Return -dC/dp, which is 0 at positions that the trainer does not score or C does not use."""
    import torch

    if leaf.grad is None:
        return torch.zeros_like(logprobs)
    if not bool(torch.isfinite(leaf.grad).all()):
        raise InputError("loss_fn", f"has a gradient that is not finite in the logprobs of data[{index}]")
    return torch.where(torch.isnan(logprobs), 0.0, -leaf.grad)


def _weighted(datum: Datum, weights: torch.Tensor | TensorData) -> Datum:
    targets = _targets(datum)
    return replace(datum, loss_fn_inputs={"target_tokens": targets, "weights": TensorData.of(weights, "float32")})


def _zeros(datum: Datum) -> TensorData:
    targets = _targets(datum)
    return TensorData(data=[0.0] * len(targets.data), dtype="float32", shape=targets.shape)


def _targets(datum: Datum) -> TensorData:
    return datum.loss_fn_inputs["target_tokens"]
