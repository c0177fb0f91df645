"""The stored form of each object; at its start the service builds everything else from these."""

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
    "PublishedWeights",
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
    """Return an id of 10 characters: short to read, and with 50 bits practically unique."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(10))


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class Record(Struct, kw_only=True):
    """The fields of every object; the class name is its kind in the store. `created_at` orders listings."""

    id: str = msgspec.field(default_factory=new_id)
    created_at: datetime = msgspec.field(default_factory=now)


class SessionRecord(Record, kw_only=True):
    """A session."""


class TeamRecord(Record, kw_only=True):
    """A team; the service has one."""

    name: str = "default"


class UserConfigRecord(Record, kw_only=True):
    """Which GPUs the user prefers; stored, although this service has none to choose from."""

    trainer_accelerator_priority: list[str] | None = None
    sampler_accelerator_priority: list[str] | None = None


class DeploymentRecord(Record, kw_only=True):
    """The compute that a trainer or sampler runs on; in local mode it is ready as soon as its model is loaded."""

    kind: Literal["trainer", "sampler"]
    base_model: str
    model_id: str = msgspec.field(default_factory=new_id)
    scale_down_delay_seconds: int
    availability_model: AvailabilityModel = AvailabilityModel.DEDICATED
    local: bool = False
    stopped: bool = False


class PublishedWeights(Struct, frozen=True, kw_only=True):
    """The weights that a run's sampler serves; `version` is the number of optimizer steps behind them."""

    version: int
    checkpoint_id: str
    name: str


class RunRecord(Record, kw_only=True):
    """A run. `unsaved` is true while its trainer holds weights that are not on disk; `live` are the published ones."""

    session_id: str
    base_model: str
    name: str | None = None
    lora_rank: int
    max_seq_len: int | None = None
    seed: int | None = None
    replicas: int = 1
    path: str | None = None
    deployment_id: str
    local: bool = False
    active: bool = True
    unsaved: bool = False
    step: int = 0
    live: PublishedWeights | None = None


class SamplerRecord(Record, kw_only=True):
    """A sampler of a run, of a checkpoint (`model_path`, and its id), or of the base model."""

    session_id: str
    base_model: str
    deployment_id: str
    run_id: str | None = None
    model_path: str | None = None
    checkpoint_id: str | None = None
    max_seq_length: int | None = None
    num_replicas: int | None = None


CheckpointTargetName: TypeAlias = Literal["trainer", "sampler"]


class CheckpointRecord(Record, kw_only=True):
    """A checkpoint, which is a directory of files; `targets` are the modules that its adapter changes.

    `pinned_by` are the ids of the runs and samplers some of whose clients sample exactly this one; `replaced` is true
    when another one has its name now, and only they can still find it.
    """

    run_id: str
    name: str
    target: CheckpointTargetName
    base_model: str
    rank: int
    targets: list[str] = []
    size_bytes: int
    local: bool = False
    expires_at: datetime | None = None
    pinned_by: list[str] = []
    replaced: bool = False

    @property
    def uri(self) -> CheckpointUri:
        """The ``bt://`` URI."""
        return CheckpointUri(self.run_id, "weights" if self.target == "trainer" else "sampler_weights", self.name)

    @property
    def expired(self) -> bool:
        """Whether its lifetime has ended."""
        return self.expires_at is not None and self.expires_at <= now()
