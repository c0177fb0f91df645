"""What the service keeps: runs, checkpoints, models."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

from ._value import Value
from .training import AdamOptimizerConfig

__all__ = [
    "Checkpoint",
    "CheckpointType",
    "CheckpointsListResponse",
    "Cursor",
    "ExternalWeightsUrlsResponse",
    "GetServerCapabilitiesResponse",
    "ModelID",
    "ParsedCheckpointTinkerPath",
    "SupportedModel",
    "TrainingRun",
    "TrainingRunsResponse",
    "WeightsInfoResponse",
]

ModelID: TypeAlias = str
CheckpointType: TypeAlias = Literal["training", "sampler", "external"]

_TYPES: Final[dict[str, CheckpointType]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
"""The kinds of a path, and what they are called."""

_PATH: Final = re.compile(r"tinker://([^/]+)/(weights|sampler_weights|external_weights)/([^/]+)")


@dataclass(frozen=True, kw_only=True)
class ParsedCheckpointTinkerPath(Value):
    """The parts of ``tinker://RUN/KIND/NAME``; `checkpoint_id` is ``KIND/NAME``."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Parse a path, or raise a `ValueError`."""
        match = _PATH.fullmatch(tinker_path)
        if match is None:
            raise ValueError(f"Invalid tinker path: {tinker_path}")
        run, kind, name = match.groups()
        return cls(
            tinker_path=tinker_path,
            training_run_id=run,
            checkpoint_type=_TYPES[kind],
            checkpoint_id=f"{kind}/{name}",
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Value):
    """A saved checkpoint; `checkpoint_id` is ``weights/NAME`` or ``sampler_weights/NAME``."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Cursor(Value):
    """Which part of a list was returned."""

    offset: int
    limit: int
    total_count: int


@dataclass(frozen=True, kw_only=True)
class CheckpointsListResponse(Value):
    """A list of checkpoints."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Value):
    """A run; Loops keeps no metadata of users, and tells no time but that of the creation."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRunsResponse(Value):
    """A list of runs."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class WeightsInfoResponse(Value):
    """The model and the adapter of a checkpoint."""

    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: Any = field(default_factory=AdamOptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class ExternalWeightsUrlsResponse(Value):
    """The files of a checkpoint: short-lived URLs by name."""

    urls: dict[str, str]
    expires: datetime


@dataclass(frozen=True, kw_only=True)
class SupportedModel(Value):
    """A base model, and its longest sequence in tokens."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GetServerCapabilitiesResponse(Value):
    """What the service can train and sample."""

    supported_models: list[SupportedModel]
