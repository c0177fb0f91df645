"""What the store keeps of each object; everything else is made from it when the service starts."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

from loops_async.protocol import CheckpointUri
from loops_async.types import AvailabilityModel

__all__ = [
    "CheckpointRecord",
    "DeploymentRecord",
    "LiveWeights",
    "Record",
    "RunRecord",
    "SamplerRecord",
    "SessionRecord",
    "TeamRecord",
    "UserConfigRecord",
    "new_id",
    "now",
]

_ALPHABET = "abcdefghijkmnopqrstuvwxyz0123456789"


def new_id() -> str:
    """Return an id of 10 characters: short to read, and 50 bits, so that no two meet."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(10))


def now() -> datetime:
    """Return the time with its zone."""
    return datetime.now(UTC)


class Record(Struct, kw_only=True):
    """What every object has. `created_at` orders listings."""

    id: str = msgspec.field(default_factory=new_id)
    created_at: datetime = msgspec.field(default_factory=now)


class SessionRecord(Record, kw_only=True):
    """A session."""


class TeamRecord(Record, kw_only=True):
    """A team; the service has one."""

    name: str = "default"


class UserConfigRecord(Record, kw_only=True):
    """Which GPUs the user prefers: kept, though there is none to choose."""

    trainer_accelerator_priority: list[str] | None = None
    sampler_accelerator_priority: list[str] | None = None


class DeploymentRecord(Record, kw_only=True):
    """What a trainer or a sampler runs on; that of local mode is up as soon as its model is loaded."""

    kind: Literal["trainer", "sampler"]
    base_model: str
    model_id: str = msgspec.field(default_factory=new_id)
    scale_down_delay_seconds: int
    availability_model: AvailabilityModel = "dedicated"
    local: bool = False
    stopped: bool = False


class LiveWeights(Struct, frozen=True, kw_only=True):
    """The weights that a run's sampler serves: `version` counts optimizer steps."""

    version: int
    checkpoint_id: str
    name: str


class RunRecord(Record, kw_only=True):
    """A run. `unsaved` tells that its trainer holds something that a kill would lose."""

    session_id: str
    base_model: str
    name: str | None
    lora_rank: int
    max_seq_len: int | None
    seed: int | None
    replicas: int
    path: str | None
    deployment_id: str
    local: bool = False
    active: bool = True
    unsaved: bool = False
    step: int = 0
    live: LiveWeights | None = None


class SamplerRecord(Record, kw_only=True):
    """A sampler: of a run, of a checkpoint (`model_path`), or of the base model."""

    session_id: str
    base_model: str
    deployment_id: str
    run_id: str | None = None
    model_path: str | None = None
    max_seq_length: int | None = None
    num_replicas: int | None = None


CheckpointTargetName: TypeAlias = Literal["trainer", "sampler"]


class CheckpointRecord(Record, kw_only=True):
    """A checkpoint: a directory of files. `targets` are the modules that the adapter changes."""

    run_id: str
    name: str
    target: CheckpointTargetName
    base_model: str
    rank: int
    targets: list[str] = []
    size_bytes: int
    local: bool = False
    expires_at: datetime | None = None

    @property
    def uri(self) -> CheckpointUri:
        """The ``bt://`` URI."""
        return CheckpointUri(self.run_id, "weights" if self.target == "trainer" else "sampler_weights", self.name)

    @property
    def expired(self) -> bool:
        """Whether its `ttl_seconds` are over."""
        return self.expires_at is not None and self.expires_at <= now()
