"""Objects of the control plane. Newer services add fields and words: fields we do not know are ignored,
and every status or kind is a plain string that may hold a word we do not know.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

__all__ = [
    "AvailabilityModel",
    "Checkpoint",
    "CheckpointDownload",
    "CheckpointFile",
    "CheckpointFilesResponse",
    "CheckpointTarget",
    "CreateRunRequest",
    "CreateSamplerRequest",
    "CreateSessionRequest",
    "Deployment",
    "LoraAdapterConfig",
    "Run",
    "Sampler",
    "ServerCapabilities",
    "Session",
    "Status",
    "SupportedModel",
    "User",
]


class CheckpointTarget(StrEnum):
    """What a checkpoint is for: ``trainer`` to resume from, ``sampler`` to serve and deploy."""

    SAMPLER = "sampler"
    TRAINER = "trainer"


class AvailabilityModel(StrEnum):
    """Dedicated machines, or cheaper spot machines that may be taken away."""

    DEDICATED = "dedicated"
    SPOT = "spot"


_Id = Annotated[str, Meta(min_length=1)]
_Positive = Annotated[int, Meta(ge=1)]
_Name = Annotated[str, Meta(min_length=1, max_length=255)]


class CreateSessionRequest(Struct, frozen=True, kw_only=True):
    """Body of ``POST sessions``; the project is only sent when one was given."""

    training_project_id: str | None | UnsetType = UNSET


class CreateRunRequest(Struct, frozen=True, kw_only=True):
    """Body of ``POST /v1/loops/runs``, which makes a trainer and its paired sampler.

    `max_seq_len` None is the model's maximum. `lora_rank` defaults to 64 here, as on the wire;
    `ServiceClient.create_lora_training_client` sends 32. `scale_down_delay_seconds` is how long the trainer
    stays up unused. `path` is a ``bt://loops:<run>/weights/<name>`` to start from.
    Source: control-plane reference 3.2; the fields after `reuse_from_session_id` are newer and are only sent
    when given.
    """

    session_id: _Id
    base_model: _Id
    max_seq_len: _Positive | None = None
    lora_rank: _Positive = 64
    seed: int | None = None
    scale_down_delay_seconds: Annotated[int, Meta(gt=0)] = 3600
    replicas: _Positive = 1
    path: str | None = None
    reuse_from_session_id: str | None = None
    name: _Name | None | UnsetType = UNSET
    reuse_from_run_id: str | None | UnsetType = UNSET
    availability_model: AvailabilityModel | UnsetType = UNSET
    sampler_num_replicas: _Positive | None | UnsetType = UNSET


class CreateSamplerRequest(Struct, frozen=True, kw_only=True):
    """Body of ``POST samplers``. `model_path` is a ``bt://loops:<run>/sampler_weights/<name>``."""

    session_id: _Id
    base_model: _Id | None | UnsetType = UNSET
    max_seq_length: _Positive | None = None
    model_path: str | None = None
    reuse_from_session_id: str | None | UnsetType = UNSET
    run_id: _Id | None | UnsetType = UNSET
    availability_model: AvailabilityModel | None | UnsetType = UNSET
    num_replicas: _Positive | None | UnsetType = UNSET


class Status(Struct, frozen=True):
    """The state of a run, sampler or deployment, as one word; None where the service says none."""

    name: str | None = None


class User(Struct, frozen=True):
    """Whoever made an object."""

    email: str | None = None


class Session(Struct, frozen=True, kw_only=True):
    """A session: what runs and samplers belong to."""

    id: str


class Sampler(Struct, frozen=True, kw_only=True):
    """A sampler. `model_id` and `deployment_id` are None for a serverless one."""

    id: str
    base_url: str
    base_model: str
    created_at: datetime
    model_id: str | None = None
    deployment_id: str | None = None
    status: Status = Status()
    user: User | None = None
    node_count: int | None = None
    base_checkpoint: str | None = None


class Run(Struct, frozen=True, kw_only=True):
    """A run: a trainer at `base_url`, with its paired sampler where it has one."""

    id: str
    session_id: str
    base_model: str
    base_url: str | None
    created_at: datetime
    sampler: Sampler | None = None
    name: str | None = None
    deployment_id: str | None = None
    lora_config_version: str | None = None
    status: Status = Status()
    user: User | None = None
    base_checkpoint: str | None = None


class Deployment(Struct, frozen=True, kw_only=True):
    """What a trainer runs on; `status` is such as RUNNING, SCALED_TO_ZERO or FAILED."""

    id: str
    base_model: str
    base_url: str | None = None
    status: Status = Status()
    sampler: Sampler | None = None
    user: User | None = None
    active_run_id: str | None = None
    latest_run_id: str | None = None
    created_at: datetime | None = None


class LoraAdapterConfig(Struct, frozen=True):
    """The shape of a saved adapter."""

    rank: int | None = msgspec.field(default=None, name="r")


class Checkpoint(Struct, frozen=True, kw_only=True):
    """A saved checkpoint. `id` is its key everywhere; `checkpoint_id` is the name it was saved under."""

    id: str = ""
    run_id: str
    checkpoint_id: str
    checkpoint_type: str | None = None
    created_at: datetime
    base_model: str | None = None
    lora_adapter_config: LoraAdapterConfig | None = None
    size_bytes: int = 0
    sync_status: str | None = None
    target: str | None = None


class CheckpointFile(Struct, frozen=True, kw_only=True):
    """One file of a checkpoint. `url` is short-lived and carries its own authorization."""

    url: str
    relative_file_name: str
    node_rank: int = 0
    size_bytes: int = 0
    last_modified: datetime | None = None

    def __repr__(self) -> str:
        shown = self.url.split("?", 1)[0]
        return (
            f"CheckpointFile(url={shown + '?…' if '?' in self.url else shown!r}, "
            f"relative_file_name={self.relative_file_name!r}, "
            f"node_rank={self.node_rank}, size_bytes={self.size_bytes}, last_modified={self.last_modified!r})"
        )

    def __rich_repr__(self) -> list[tuple[str, object]]:
        # rich reads fields by itself; it must not see more than `repr` shows.
        shown = self.url.split("?", 1)[0]
        return [("url", shown), ("relative_file_name", self.relative_file_name), ("size_bytes", self.size_bytes)]


class CheckpointFilesResponse(Struct, frozen=True, kw_only=True):
    """One page of a checkpoint's files; `next_page_token` is the offset of the next, None on the last."""

    presigned_urls: list[CheckpointFile]
    next_page_token: int | None = None
    total_count: int = 0


class CheckpointDownload(Struct, frozen=True, kw_only=True):
    """What a download wrote, and where."""

    dest_dir: Path
    file_count: int
    bytes_written: int


class SupportedModel(Struct, frozen=True, kw_only=True):
    """A base model that the service can train and serve."""

    model_name: str
    max_context_length: int | None = None


class ServerCapabilities(Struct, frozen=True, kw_only=True):
    """The base models that the service supports."""

    supported_models: list[SupportedModel] = []
