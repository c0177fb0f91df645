"""Values of scripts as values of Loops, and back: the only place that knows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import uuid4

import numpy as np

import loops_async as loops

from . import types
from .errors import UnsupportedError
from .paths import from_loops, parts

__all__ = [
    "adam_params",
    "checkpoint",
    "custom_data",
    "info",
    "loss_config",
    "loss_data",
    "model_input",
    "optim_response",
    "output",
    "pass_output",
    "sample_response",
    "sampling_params",
    "training_run",
]

FOR_CUSTOM_LOSS: Final = ("target_tokens", "weights")
"""What the trainer needs of a datum whose loss is computed here."""

NOT_SENT: Final = frozenset({"mask"})
"""What scripts put into datums for metrics of their own."""

NOT_ZERO: Final = 1e-30
"""Stands for an advantage of 0: targets whose advantage is 0 are not scored, and scripts read their logprobs.

It changes no gradient, since the smallest one that matters is larger by far.
"""

LOSS_SUM: Final = "loss:sum"

SCORED_WHERE_ZERO: Final = frozenset({"importance_sampling", "ppo", "cispo"})
"""The losses that are the advantage times something, so that `NOT_ZERO` adds nothing; ``dro`` has a second term."""

REFUSED_LOSSES: Final[Mapping[str, str]] = {
    "stable_reinforce": "it needs what Tinker's sampler records of sequences; use 'ppo' or 'importance_sampling'",
    "gspo": "use 'ppo', or write the ratio of sequences as a function for forward_backward_custom",
    "custom": "give the function to forward_backward_custom",
}

DEFAULTS: Final[Mapping[str, Mapping[str, float]]] = {"cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}}
"""The settings of losses whose defaults differ."""


def loss_config(loss_fn: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a loss: sums over tokens, without a division by their number.

    Raises:
        UnsupportedError: Loops has no such loss.
    """
    if loss_fn in REFUSED_LOSSES:
        raise UnsupportedError(f"loss_fn={loss_fn!r} is not a loss of Loops: {REFUSED_LOSSES[loss_fn]}")
    return {**DEFAULTS.get(loss_fn, {}), **(config or {}), "skip_token_normalization": True}


def loss_data(data: Sequence[types.Datum], loss_fn: str) -> list[loops.Datum]:
    """Return the datums of a pass."""
    scores_zero = loss_fn in SCORED_WHERE_ZERO
    return [_datum(datum, f"data[{index}]", scores_zero=scores_zero) for index, datum in enumerate(data)]


def custom_data(data: Sequence[types.Datum]) -> list[loops.Datum]:
    """Return the datums of a custom loss, with what the trainer needs of them."""
    return [_datum(datum, f"data[{index}]", only=FOR_CUSTOM_LOSS) for index, datum in enumerate(data)]


def _datum(datum: Any, path: str, *, scores_zero: bool = False, only: Sequence[str] | None = None) -> loops.Datum:
    if not isinstance(datum, types.Datum):
        raise TypeError(f"{path} must be a Datum; got {type(datum).__name__}")
    names = [name for name in datum.loss_fn_inputs if name not in NOT_SENT and (only is None or name in only)]
    arrays = {name: datum.loss_fn_inputs[name].to_numpy() for name in names}
    if scores_zero and (advantages := arrays.get("advantages")) is not None:
        arrays["advantages"] = np.where(advantages == 0, np.float32(NOT_ZERO), advantages)
    return loops.Datum(model_input=model_input(datum.model_input), loss_fn_inputs=arrays)


def model_input(given: Any) -> loops.ModelInput:
    """Return the input of a model."""
    if not isinstance(given, types.ModelInput):
        raise TypeError(f"expected a ModelInput; got {type(given).__name__}")
    return loops.ModelInput([_chunk(chunk) for chunk in given.chunks])


def _chunk(chunk: types.ModelInputChunk) -> loops.EncodedTextChunk | loops.ImageChunk:
    if isinstance(chunk, types.EncodedTextChunk):
        return loops.EncodedTextChunk(chunk.tokens)
    if isinstance(chunk, types.ImageChunk):
        return loops.ImageChunk(data=chunk.data, format=chunk.format, expected_tokens=chunk.length)
    raise UnsupportedError(f"{type(chunk).__name__}: Loops takes text and the bytes of images (ImageChunk)")


def sampling_params(given: types.SamplingParams | None) -> loops.SamplingParams:
    """Return how to sample."""
    return loops.SamplingParams(**vars(given or types.SamplingParams()))


def adam_params(given: Any) -> loops.AdamParams:
    """Return the settings of the optimizer, which must be Adam."""
    if isinstance(given, types.DimuonParams):
        raise UnsupportedError("Dimuon is not an optimizer of Loops; use AdamParams")
    if not isinstance(given, types.AdamParams):
        raise TypeError(f"optim_params must be AdamParams; got {type(given).__name__}")
    return loops.AdamParams(**vars(given))


def sample_response(response: loops.SampleResponse) -> types.SampleResponse:
    """Return what was sampled."""
    unique = uuid4().hex
    return types.SampleResponse(
        sequences=[_sequence(sequence, f"{unique}-{index}") for index, sequence in enumerate(response.sequences)],
        prompt_logprobs=response.prompt_logprobs,
        topk_prompt_logprobs=response.topk_prompt_logprobs,
    )


def _sequence(sequence: loops.SampledSequence, sequence_id: str) -> types.SampledSequence:
    return types.SampledSequence(
        tokens=sequence.tokens,
        logprobs=sequence.logprobs,
        stop_reason="stop" if sequence.stop_reason == "stop" else "length",
        sequence_id=sequence_id,
    )


def output(
    result: loops.ForwardBackwardOutput, metrics: Mapping[str, float] | None = None
) -> types.ForwardBackwardOutput:
    """Return the result of a pass; `metrics` are added to those of the trainer."""
    outputs = [{name: _tensor(tensor) for name, tensor in each.items()} for each in result.loss_fn_outputs]
    return types.ForwardBackwardOutput(
        loss_fn_output_type=result.loss_fn_output_type,
        loss_fn_outputs=outputs,
        metrics={**_named(result.metrics), **(metrics or {})},
        loss=result.loss,
    )


def pass_output(
    data: Sequence[loops.Datum], loss_fn: Any, config: Mapping[str, Any], result: loops.ForwardBackwardOutput
) -> types.ForwardBackwardOutput:
    """Return the result of a pass over `data`, with the sum of its loss, also where the trainer has only the mean."""
    if LOSS_SUM in result.metrics:
        return output(result)
    return output(result, {LOSS_SUM: loops.loss_sum(data, result, loss_fn, config)})


def optim_response(result: loops.OptimStepResponse) -> types.OptimStepResponse:
    """Return the metrics of a step, under names that no caller has for a column of its own."""
    return types.OptimStepResponse(metrics=_named(result.metrics or {}))


def _tensor(tensor: loops.TensorData) -> types.TensorData:
    return types.TensorData.from_numpy(tensor.to_numpy())


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """Call each metric ``name:reduction``."""
    return {
        name if ":" in name else f"{name}:mean": value
        for name, value in metrics.items()
        if name != "skip_token_normalization"
    }


def info(core: loops.GetInfoResponse, run_id: str) -> types.GetInfoResponse:
    """Return what is known of a training client's model."""
    data = core.model_data
    return types.GetInfoResponse(
        model_data=types.ModelData(arch=data.arch, model_name=data.model_name, tokenizer_id=data.tokenizer_id),
        model_id=run_id,
        is_lora=core.is_lora,
        lora_rank=core.lora_rank,
        model_name=core.model_name,
    )


def checkpoint(core: loops.Checkpoint) -> types.Checkpoint:
    """Return a checkpoint."""
    kind = "sampler_weights" if core.target == loops.CheckpointTarget.SAMPLER else "weights"
    path = from_loops(f"bt://loops:{core.run_id}/{kind}/{core.checkpoint_id}")
    return types.Checkpoint(
        checkpoint_id="/".join(parts(path)[1:]),
        checkpoint_type="sampler" if kind == "sampler_weights" else "training",
        time=core.created_at,
        tinker_path=path,
        size_bytes=core.size_bytes,
    )


def training_run(run: loops.Run, checkpoints: Sequence[loops.Checkpoint]) -> types.TrainingRun:
    """Return a run with its last checkpoints."""
    made = sorted(map(checkpoint, checkpoints), key=lambda each: each.time)
    last = {each.checkpoint_type: each for each in made}
    ranks = [each.lora_adapter_config.rank for each in checkpoints if each.lora_adapter_config]
    return types.TrainingRun(
        training_run_id=run.id,
        base_model=run.base_model,
        model_owner=run.user.email if run.user and run.user.email else "",
        is_lora=True,
        lora_rank=ranks[-1] if ranks else None,
        last_request_time=max([run.created_at, *(each.time for each in made)]),
        last_checkpoint=last.get("training"),
        last_sampler_checkpoint=last.get("sampler"),
    )
