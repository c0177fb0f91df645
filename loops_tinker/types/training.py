"""Arguments and results of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ._value import Value
from .tensors import TensorData

__all__ = [
    "AdamOptimizerConfig",
    "AdamParams",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnOutput",
    "LossFnType",
    "ModelData",
    "OptimParams",
    "OptimStepResponse",
    "OptimizerConfig",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
]

LossFnType: TypeAlias = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce", "custom"
]
LossFnOutput: TypeAlias = dict[str, TensorData]


@dataclass(frozen=True, kw_only=True)
class AdamParams(Value):
    """Settings of AdamW for one step; `grad_clip_norm` 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DimuonParams(Value):
    """Settings of Dimuon, an optimizer that Loops does not have."""

    learning_rate: float
    grad_clip_norm: float = 0.0
    beta1: float = 0.9
    type: Literal["dimuon"] = "dimuon"


OptimParams: TypeAlias = AdamParams | DimuonParams


@dataclass(frozen=True, kw_only=True)
class AdamOptimizerConfig(Value):
    """AdamW."""

    type: Literal["adamw"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class DimuonOptimizerConfig(Value):
    """Dimuon, an optimizer that Loops does not have."""

    type: Literal["dimuon"] = "dimuon"
    version: Literal[1] = 1


OptimizerConfig: TypeAlias = AdamOptimizerConfig | DimuonOptimizerConfig


@dataclass(frozen=True, kw_only=True)
class ForwardBackwardOutput(Value):
    """The result of a pass: for each datum its ``logprobs``, and metrics called ``name:reduction``.

    `loss` is that of Loops, a mean over tokens; ``loss:sum`` of the metrics is the loss as a sum.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class OptimStepResponse(Value):
    """Metrics of one step of the optimizer."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class SaveWeightsResponse(Value):
    """Where weights and optimizer were saved."""

    path: str


@dataclass(frozen=True, kw_only=True)
class SaveWeightsForSamplerResponse(Value):
    """Where weights were saved to sample from."""

    path: str


@dataclass(frozen=True, kw_only=True)
class LoadWeightsResponse(Value):
    """Which weights were loaded."""

    path: str | None = None
    model_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Value):
    """The settings of a LoRA adapter."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelData(Value):
    """The model that is trained."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class GetInfoResponse(Value):
    """What is known of a training client's model."""

    model_data: ModelData
    model_id: str
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    optimizer_config: Any = field(default_factory=AdamOptimizerConfig)
