"""Reference logprobs for direct preference optimization (DPO)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec.structs import replace

from ._arguments import checked_examples
from ._tasks import gather_or_raise
from .errors import InputError
from .protocol import IGNORED_TARGET
from .sampling import SamplingClient
from .types import Datum, ModelInput, TensorData

__all__ = ["attach_reference_logprobs"]


async def attach_reference_logprobs(data: Sequence[Datum], reference: SamplingClient) -> list[Datum]:
    """Return copies of the examples with the ``ref_logprobs`` that the loss ``dpo`` needs.

    The reference is the model before training: score the whole dataset once, and use the result in every step.

    Args:
        data: pairs, chosen then rejected, with ``target_tokens`` (N,) and optionally ``weights`` (N,), by default 1 for
            every target except -100. Where the weight is not 0, the target must be the next token of the sequence.
        reference: a client that always samples the reference weights: those of the base model or of a checkpoint.

    Returns:
        Examples whose ``ref_logprobs`` (N,) are the logprobs of their targets in nats, 0.0 where the weight is 0.

    Raises:
        InputError: an example is invalid, or a sampler cannot score its targets.
        ApiError: the sampler rejected a request.

    Example:
        ::

            reference = await service.create_sampling_client(base_model)
            pairs = await loops.attach_reference_logprobs(pairs, reference)
            step = await trainer.forward_backward(pairs, "dpo", {"beta": 0.1})
    """
    listed = list(checked_examples(data, "cross_entropy"))
    sequences = [_sequence(datum, index) for index, datum in enumerate(listed)]
    scores = await gather_or_raise([reference.compute_logprobs(sequence) for sequence in sequences])
    return [_with_reference(datum, scored) for datum, scored in zip(listed, scores, strict=True)]


def _sequence(datum: Datum, index: int) -> ModelInput:
    """Return the input followed by its last target, so that every target is scored at its position in the sequence."""
    path = f"data[{index}].loss_fn_inputs['target_tokens']"
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is None or len(targets.shape) != 1:
        raise InputError(path, "expected one target at each position")
    last = targets.data[-1]
    sequence = datum.model_input.append_int(int(last)) if last is not None and last >= 0 else datum.model_input
    tokens = sequence.to_positions()
    for position, weight in enumerate(_weights(datum)):
        target = targets.data[position]
        following = tokens[position + 1] if position + 1 < len(tokens) else IGNORED_TARGET
        if weight and following not in (target, None):
            raise InputError(path, f"must be the next token where the weight is not 0; see position {position}")
    return sequence


def _with_reference(datum: Datum, scored: Sequence[float | None]) -> Datum:
    weights = _weights(datum)
    following = [*scored[1:], None][: len(weights)]
    logprobs = [
        score if weight and score is not None and math.isfinite(score) else 0.0
        for score, weight in zip(following, weights, strict=True)
    ]
    tensor = TensorData(data=[*logprobs], dtype="float32", shape=[len(logprobs)])
    return replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, "ref_logprobs": tensor})


def _weights(datum: Datum) -> Sequence[float | None]:
    """Return the weights; the default is 1 for each target that is not ignored."""
    given = datum.loss_fn_inputs.get("weights")
    if given is not None:
        return given.data
    return [float(target != IGNORED_TARGET) for target in datum.loss_fn_inputs["target_tokens"].data]
