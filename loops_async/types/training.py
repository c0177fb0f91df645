"""Arguments and results of training operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from .._values import Value
from .inputs import Datum
from .tensors import TensorData

if TYPE_CHECKING:
    import torch

__all__ = [
    "AdamParams",
    "CustomLossFn",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "InitTrainerServerResponse",
    "LoadWeightsResponse",
    "LossFnType",
    "ModelData",
    "OptimStepResponse",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "StepMetrics",
    "StepResult",
    "WandbConfig",
]

LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "dppo", "cispo", "dro", "dpo"]
"""The name of a built-in loss."""

CustomLossFn: TypeAlias = "Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, Mapping[str, float]]]"
"""Computes a loss from examples and the logprobs of their targets; returns the loss and metrics to report."""

_Finite = Meta(ge=0.0, le=1e308)


class AdamParams(Value, Struct, frozen=True, kw_only=True):
    """Settings of AdamW for one optimizer step.

    `weight_decay` is decoupled; `grad_clip_norm` is the largest L2 norm of the whole gradient, 0 for no clipping.
    """

    learning_rate: Annotated[float, _Finite] = 1e-4
    beta1: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.95
    eps: Annotated[float, Meta(gt=0.0, le=1e308)] = 1e-12
    weight_decay: Annotated[float, _Finite] = 0.0
    grad_clip_norm: Annotated[float, _Finite] = 1.0


class WandbConfig(Value, Struct, frozen=True, kw_only=True):
    """Where training steps are logged: give either `project` or `run`.

    With `project`, the training client begins a run of Weights & Biases, of this `name` if one is given, and finishes
    it when it is closed. With `run`, it logs to a run that exists, of any tracker: an object with ``log(dict)``. That
    one is never finished by us.
    """

    project: Annotated[str, Meta(min_length=1)] | None = None
    name: str | None = None
    run: Any = None


class StepMetrics(Value, Struct, frozen=True, kw_only=True):
    """What is known of one optimizer step; `on_step` of the calls that create a training client gets one for each.

    `step` is the trainer's number of the step, as in its metrics. `metrics` are the same numbers under the same names
    as in `WandbConfig`: ``step``, ``loss``, ``tokens``, ``learning_rate`` and ``grad_norm``, as far as the service
    reports them; ``forward_backward/<name>`` for other metrics of the passes; those of `TrainingClient.log`.
    """

    step: int
    metrics: dict[str, Any]
    run_id: str


class ForwardBackwardOutput(Value, Struct, frozen=True, kw_only=True):
    """The result of a forward pass.

    `loss` is the mean over the batch, for monitoring. `loss_fn_outputs` has one dict for each datum, in order; its
    ``logprobs`` have the shape of the datum's ``target_tokens``: the logprob of each target in nats, NaN at masked
    positions.
    """

    loss: float = 0.0
    loss_fn_output_type: str = ""
    loss_fn_outputs: list[dict[str, TensorData]] = []
    metrics: dict[str, float] = {}


class OptimStepResponse(Value, Struct, frozen=True, kw_only=True):
    """Metrics of one optimizer step, e.g. ``step``, ``learning_rate`` and ``grad_norm``."""

    metrics: dict[str, float] | None = None


class StepResult(Value, Struct, frozen=True, kw_only=True):
    """The results of one training step: of its forward and backward pass, and of the optimizer."""

    forward_backward: ForwardBackwardOutput
    optim: OptimStepResponse

    @property
    def loss(self) -> float:
        """The loss of the pass."""
        return self.forward_backward.loss

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the pass and of the optimizer; where both have the same name, that of the optimizer counts."""
        return self.forward_backward.metrics | (self.optim.metrics or {})


class SaveWeightsResponse(Value, Struct, frozen=True, kw_only=True):
    """Where the training state was saved: `path` is a ``bt://`` URI."""

    mode: str = ""
    path: str = ""


class SaveWeightsForSamplerResponse(Value, Struct, frozen=True, kw_only=True):
    """Where the adapter was saved, and its `version`: the number of optimizer steps that led to it."""

    version: int = 0
    path: str = ""


class LoadWeightsResponse(Value, Struct, frozen=True, kw_only=True):
    """The trainer's step counter after loading."""

    step: int = 0


class InitTrainerServerResponse(Value, Struct, frozen=True, kw_only=True):
    """The trainer's step counter and LoRA rank after it was reset."""

    step: int = 0
    lora_rank: int


class ModelData(Value, Struct, frozen=True, kw_only=True):
    """The model that is trained."""

    arch: str | None = None
    model_name: str
    tokenizer_id: str


class GetInfoResponse(Value, Struct, frozen=True, kw_only=True):
    """What a training client knows about its run without a request.

    `lora_rank` is None for a client that was attached to a run, since the service does not report it. `max_seq_len` is
    the longest training example in tokens as the run was requested, None for the model's maximum.
    """

    model_data: ModelData
    model_name: str
    is_lora: bool = True
    lora_rank: int | None = None
    max_seq_len: int | None = None
